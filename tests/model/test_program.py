"""What the programs share: one process, one sentence where memory ends, and a word now and then on the way."""

from __future__ import annotations

import errno
import io
import json
import os
import pickletools
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from repository import ROOT
from rich.console import Console
from tiny_runs import RECORDS, arguments, contents, losses_of, run
from tiny_vision import encoder_folder

from model import demo, generate, pictures, resume, tokenizer_libraries, train, train_loop
from model import program as shared
from model.errors import UserError
from model.progress import EVERY, messages, progress
from zinit_kernels.checkpoints import tensor_files


def commands(folder, tmp_path):
    """The words of every program."""
    ask = ["--base", str(folder / "base"), "--prompt", "Say", "--max-new-tokens", "2"]
    return {
        "train": (train.main, arguments(folder, tmp_path / "out")),
        "generate": (generate.main, ask),
        "demo": (demo.main, ["--out", str(tmp_path / "demo")]),
    }


# of torchrun, mpirun (Open MPI, MVAPICH), jsrun, mpiexec and srun
LAUNCHERS = [
    "WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "JSM_NAMESPACE_SIZE", "PMI_SIZE",
    "SLURM_STEP_NUM_TASKS",
]  # fmt: skip


@pytest.mark.parametrize("name", ["train", "generate", "demo"])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_several_processes_are_refused_by_the_first(folder, tmp_path, capsys, monkeypatch, launcher, name):
    monkeypatch.setattr(shared, "_WAIT", 0)
    monkeypatch.setattr(shared.signal, "signal", lambda *_: None)
    main, words = commands(folder, tmp_path)[name]
    monkeypatch.setenv(launcher, "2")
    for rank, told in (("0", 1), ("1", 0)):
        monkeypatch.setenv(shared._LAUNCHERS[launcher], rank)
        assert run(*words, main=main) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == error.count("error: this was started as 2 processes") == told
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("count", ["1", "", "many"])
def test_one_process_of_a_launcher_runs(monkeypatch, count):
    monkeypatch.setenv("WORLD_SIZE", count)
    shared.refuse_several_processes()


def test_the_other_processes_wait_and_end_with_the_same_status():
    """A launcher ends all processes as soon as one has ended: none may end before the first has said why."""
    code = "from model.program import refuse_several_processes; print(flush=True); refuse_several_processes()"
    environment = os.environ | {"WORLD_SIZE": "2", "RANK": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, **pipes) as other:
        other.stdout.readline()
        time.sleep(0.5)
        assert other.poll() is None
        other.terminate()
        assert (other.wait(), other.stderr.read()) == (2, b"")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_asks_and_what_is_ignored_stays_so(number):
    """SIGHUP comes when the terminal is closed. nohup ignores it, and shell scripts ignore Ctrl-C for `command &`."""
    before = signal.signal(number, lambda *_: None)
    try:
        with shared.interruptible() as event:
            os.kill(os.getpid(), number)
            assert event.wait(10)
        signal.signal(number, signal.SIG_IGN)
        with shared.interruptible() as event:
            os.kill(os.getpid(), number)
            assert not event.wait(0.05) and signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_thread_that_takes_no_signals_is_not_refused():
    def work():
        with shared.interruptible() as event:
            return event.is_set()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(work).result(60) is False


def no_memory_of_torch() -> None:
    torch.empty(1 << 50)


def no_memory_of_cuda() -> None:
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of"
    )


def no_memory_of_the_kernels() -> None:
    raise RuntimeError(
        "aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), 0, &handle) API call failed at csrc/"
    )


def no_memory_of_python() -> None:
    raise MemoryError


@pytest.mark.parametrize(
    "fail", [no_memory_of_torch, no_memory_of_cuda, no_memory_of_the_kernels, no_memory_of_python]
)
def test_no_memory_left_is_one_sentence(folder, whole_run, tmp_path, capsys, monkeypatch, fail):
    real, calls = train_loop.batch_loss, []

    def full(*args):
        calls.append(None)
        if len(calls) == 7:
            fail()
        return real(*args)

    output = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(train_loop, "batch_loss", full)
        assert run(*arguments(folder, output)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    sentence = r"error: there is not enough memory( \(.* more were asked for\))?: lower --max-tokens or --max-seq-len"
    assert re.fullmatch(rf"{sentence}.*; --resume goes on from the last checkpoint\.", error), error
    assert run(*arguments(folder, output, "--resume")) == 0
    assert losses_of(output) == losses_of(whole_run)
    with monkeypatch.context() as patched:
        patched.setattr(generate, "generate", lambda *_, **__: fail())
        assert run(*commands(folder, tmp_path)["generate"][1], main=generate.main) == 2
    assert "not enough memory" in (error := capsys.readouterr().err) and "lower --batch-size" in error


DOORS = {  # what reads a file -> what it calls, and the program that does
    "checkpoint": (torch, "load", ["--resume"]),
    "digest": (resume, "_digest", ["--resume"]),
    "optimizer": (torch.optim.AdamW, "load_state_dict", ["--resume"]),
    "pickle": (pickletools, "genops", ["--resume"]),
    "device": (torch, "ones", []),
    "safetensors": (tensor_files, "safe_open", []),
}


FAILURES = [(door, no_memory_of_python) for door in DOORS]
FAILURES += [(door, no_memory_of_torch) for door in DOORS if door != "pickle"]  # read by Python alone


@pytest.mark.parametrize("door, fail", FAILURES)
def test_no_memory_to_read_a_file_is_no_damage(folder, whole_run, tmp_path, capsys, monkeypatch, door, fail):
    """The file was called damaged, or the device wrong, where there was no memory for it."""
    place, name, words = DOORS[door]
    output = tmp_path / "out"
    if words:
        shutil.copytree(whole_run, output)
    monkeypatch.setattr(place, name, lambda *_, **__: fail())
    assert run(*arguments(folder, output), *words) == 2
    assert re.search(r"error: there is not enough memory.*\.\n$", capsys.readouterr().err)


@pytest.mark.parametrize("fail", [no_memory_of_torch, no_memory_of_python])
def test_no_memory_in_a_library_is_no_damage(tmp_path, monkeypatch, fail):
    from transformers import AutoModel, ViTModel

    from evaluate.finetune.checkpoint import load_model
    from model.vision.encoders import load_encoder

    with pytest.raises((RuntimeError, MemoryError)) as error:
        tokenizer_libraries.guarded(fail, "the tokenizer cannot be read")
    assert not isinstance(error.value, UserError)
    encoder_folder(tmp_path / "vit", "vit")
    for automatic in (AutoModel, ViTModel):
        monkeypatch.setattr(automatic, "from_pretrained", lambda *_, **__: fail())
    for read in (lambda: load_model(AutoModel, tmp_path / "vit"), lambda: load_encoder(tmp_path / "vit")):
        with pytest.raises((RuntimeError, MemoryError)):
            read()


def test_a_file_that_cannot_be_mapped_is_not_called_damaged(folder, tmp_path, capsys, monkeypatch):
    def fail(path, **_):
        raise RuntimeError(f"unable to mmap 269060552 bytes from file <{path}>: Cannot allocate memory (12)")

    monkeypatch.setattr(tensor_files, "safe_open", fail)
    for main, words in list(commands(folder, tmp_path).values())[:2]:
        assert run(*words, main=main) == 2
        assert re.fullmatch(r"error: there is not enough memory: .*\.\n", capsys.readouterr().err)


def test_other_errors_are_not_taken_for_memory(folder, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(train_loop, "batch_loss", fail)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        run(*arguments(folder, tmp_path / "out"))


def test_training_says_how_far_it_is_where_stderr_is_no_terminal(folder, tmp_path, capsys):
    assert run(*arguments(folder, tmp_path / "out[/b]")) == 0
    lines = capsys.readouterr().err.splitlines()
    (first,) = [line for line in lines if line.startswith("epoch 1/3, step 1/6, loss ")]
    assert re.fullmatch(r"epoch 1/3, step 1/6, loss [\d.]+, [\d,]+ tokens/s, \d:\d\d:\d\d left", first)
    assert [line for line in lines if line.startswith("epoch 3/3, step 6/6, loss ")]
    validations = [line for line in lines if re.fullmatch(r"step \d: validation loss [\d.]+", line)]
    assert [line[5] for line in validations] == list("0246")
    assert lines[-1].endswith(f"The adapter is in {tmp_path / 'out[/b]' / 'adapter.safetensors'}.")


def test_progress_is_a_line_every_few_seconds(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with progress(messages(), total=100, done=10) as show:
        for done in range(11, 101):
            now[0] += EVERY / 4
            show(done, "prompts", "" if done % 2 else "loss 1", always=done == 11)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "prompts 11/100, 0:03:42 left" and len(lines) == 1 + 89 // 4
    assert lines[1] == "prompts 15/100, 0:03:32 left" and lines[2].startswith("prompts 19/100")


def test_preparing_much_data_is_not_silent(folder, tmp_path, capsys, monkeypatch):
    """Half a minute passed without a word for 30,000 records, on one core."""
    monkeypatch.setattr("model.progress.EVERY", 0.0)
    words = [*arguments(folder, tmp_path / "out"), "--dry-run"]
    for more, line in (
        ([], "records encoded 0/10"),
        (["--cache", str(tmp_path / "cache")], "records encoded 0"),
    ):
        assert run(*words, *more) == 0
        assert line in capsys.readouterr().err.splitlines()


def test_a_chat_template_for_no_conversation_is_said(folder, tmp_path, capsys):
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}</s>{% endfor %}")
    words = [*arguments(folder, tmp_path / "out"), "--dry-run", "--chat-template", str(template)]
    for more, said in (([], True), (["--template", "chat"], False)):
        assert run(*words, *more) == 0
        assert ("--chat-template has no effect" in capsys.readouterr().err) == said


def test_progress_is_a_bar_on_a_terminal():
    console = Console(force_terminal=True, width=100, _environ={"TERM": "xterm"})
    with console.capture() as shown, progress(console, total=4) as show:
        show(3, "epoch [1/2]", "loss [/b]")
    assert "epoch [1/2]" in shown.get() and "3/4" in shown.get() and "loss [/b]" in shown.get()


@pytest.mark.parametrize("backend", ["module://no_such_package.backend_inline", "garbage"])
def test_a_backend_that_the_environment_names_stops_no_picture(tmp_path, backend):
    """Jupyter exports MPLBACKEND to every program that is started in a cell."""
    code = (
        "import os, sys; from model.pictures import loss_picture\n"
        "loss_picture(sys.argv[1], [{'step': 0, 'loss': 1.0}, {'step': 1, 'val_loss': 2.0}])\n"
        f"assert os.environ['MPLBACKEND'] == {backend!r}"
    )
    environment = os.environ | {"MPLBACKEND": backend}
    command = [sys.executable, "-c", code, tmp_path / "loss.png"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_cannot_be_drawn_is_a_warning(folder, tmp_path, capsys, monkeypatch):
    import matplotlib.figure

    def fail(*_, **__):
        raise ValueError("no\nfonts")

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", fail)
    assert run(*arguments(folder, tmp_path / "out", "--epochs", "1")) == 0
    assert (
        f"warning: the picture {tmp_path / 'out' / 'loss.png'} was not drawn: no fonts."
        in capsys.readouterr().err
    )
    assert set(contents(tmp_path / "out")) == {
        "adapter.safetensors",
        "checkpoint.pt",
        "config.yaml",
        "metrics.jsonl",
    }
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    pictures.loss_picture(tmp_path / "loss.png", [])
    assert "was not drawn: import of matplotlib.figure halted" in capsys.readouterr().err


def test_what_the_recipe_cannot_reach_is_said(folder, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in RECORDS))
    words = ("--data", str(data), "--epochs", "1", "--warmup-epochs", "2", "--base-lr", "0.01")
    assert run(*arguments(folder, tmp_path / "out", *words)) == 0
    error = capsys.readouterr().err
    assert (
        "warning: the learning rate rises to 3.91e-05 and not to its peak of 0.000156: the warm-up of 2"
        in error
    )
    assert "warning: in 2 steps the gates, which start at 0, can move to about 3.9e-05 only" in error
    assert "; learning rate up to 3.91e-05" in error


def test_strict_refuses_what_would_be_left_out_or_cut(folder, tmp_path, capsys):
    cut = {"instruction": "a", "output": "b" * 600}
    for record, sentence in (
        (RECORDS[0] | {"output": ""}, "at lines 3, 4"),
        (cut, "2 answers are cut at 512 tokens"),
    ):
        data = tmp_path / "data.jsonl"
        data.write_text("\n".join(map(json.dumps, [*RECORDS[:2], record, record])))
        words = arguments(folder, tmp_path / "out", "--data", str(data))
        assert run(*words, "--strict") == 2
        assert sentence in capsys.readouterr().err and not (tmp_path / "out").exists()
        assert run(*words, "--overwrite") == 0
        for path in (tmp_path / "out").iterdir():
            path.unlink()
        (tmp_path / "out").rmdir()


def test_answers_that_are_mostly_cut_are_warned_of(folder, tmp_path, capsys):
    rows = [*RECORDS[:2], *[{"instruction": "a", "output": "b" * 600}] * 3]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert run(*arguments(folder, tmp_path / "out", "--data", str(tmp_path / "data.jsonl"))) == 0
    assert "warning: only 2 of 5 answers are whole" in capsys.readouterr().err


def test_a_log_that_cannot_be_written_ends_no_training(folder, whole_run, tmp_path, monkeypatch):
    """As a full disk behind 2>log, or a reader that has gone."""

    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sys, "stderr", Full())
    assert run(*arguments(folder, tmp_path / "out")) == 0
    assert losses_of(tmp_path / "out") == losses_of(whole_run)


def test_a_folder_that_cannot_be_is_refused_before_anything_is_read(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "load_base", lambda *_: pytest.fail("the base was loaded"))
    (tmp_path / "file").write_text("")
    assert run(*arguments(folder, tmp_path / "file" / "out")) == 2
    assert f"cannot be: {tmp_path / 'file'} is a file" in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert run(*arguments(folder, tmp_path / "new" / "out")) == 2
    assert f"cannot be written: no permission for {tmp_path}." in capsys.readouterr().err

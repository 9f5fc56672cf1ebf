"""What goes wrong in the programs: one sentence, exit code 2, and what was there stays as it was."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from repository import ROOT
from safetensors.torch import load_file, save_file
from tiny_runs import (
    CONFIG,
    RECORDS,
    arguments,
    contents,
    losses_of,
    make_base,
    run,
    write_tokenizer,
)

from model import generate
from model import train as program
from model.config import LlamaConfig
from model.errors import UserError
from model.loading import save_base
from model.run_folder import MetricsLog, read_metrics, write_file


def refused(capsys, sentence: str, words: list[str], main=program.main) -> None:
    assert run(*words, main=main) == 2
    error = capsys.readouterr().err
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert sentence in line and line.endswith("."), line
    assert "Traceback" not in error


def test_an_occupied_output_folder_is_refused(folder, whole_run, capsys):
    before = contents(whole_run)
    refused(capsys, "is not empty: go on with --resume, or replace", arguments(folder, whole_run))
    assert contents(whole_run) == before


@pytest.mark.parametrize("also", [(), ("--resume",), ("--overwrite",)])
def test_a_folder_that_another_run_writes_into_is_refused(folder, whole_run, tmp_path, capsys, also):
    output = tmp_path / "out"
    if also:
        shutil.copytree(whole_run, output)
    else:
        output.mkdir()
    before = contents(output)
    code = "import sys, time; from model.run_folder import held\n"
    code += "with held(sys.argv[1]): print(flush=True), time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code, output], stdout=subprocess.PIPE, cwd=ROOT)
    with other:
        other.stdout.readline()
        refused(
            capsys, f"another run is writing into {output}: wait for it", arguments(folder, output, *also)
        )
        assert contents(output) == before
        other.kill()
    assert run(*arguments(folder, output, *also)) == 0


def test_a_run_that_began_while_the_base_was_loaded_is_left_alone(folder, tmp_path, capsys, monkeypatch):
    output, real = tmp_path / "out", program.load_base

    def slow(*args):
        output.mkdir()
        (output / "checkpoint.pt").write_bytes(b"the other's")
        return real(*args)

    monkeypatch.setattr(program, "load_base", slow)
    refused(capsys, "is not empty: go on with --resume", arguments(folder, output))
    assert contents(output) == {"checkpoint.pt": b"the other's"}


def test_resume_and_overwrite_exclude_each_other(folder, whole_run, capsys):
    before = contents(whole_run)
    assert run(*arguments(folder, whole_run, "--resume", "--overwrite")) == 2
    assert "--overwrite: not allowed with argument --resume" in capsys.readouterr().err
    assert contents(whole_run) == before


def test_overwrite_replaces_the_run_and_nothing_else(folder, whole_run, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    (output / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n')
    (output / "adapter.pth").write_text("of a run with another --format")
    assert run(*arguments(folder, output, "--overwrite")) == 0
    assert losses_of(output) == losses_of(whole_run)
    assert (output / "notes.txt").read_text() == "mine" and not (output / "adapter.pth").exists()


GOOD = json.dumps(RECORDS[0])
BAD_DATA = {
    "a broken line": (GOOD + '\n{"instruction"', "line 2: not JSON at column"),
    "no object": (GOOD + "\n[1]", "line 2: a record must be an object with instruction, input and output"),
    "no output": (GOOD + '\n{"instruction": "a"}', "line 2: the field 'output' is missing"),
    "empty outputs": ('\n\n{"instruction": "a", "output": ""}', "holds no records with an answer"),
    "nothing": ("", "holds no records"),
    "one record": (GOOD, "--validation 0.2 took the only sample"),
    "only instructions beyond the context": (
        json.dumps({"instruction": "a" * 600, "output": "b"}),
        "leaves no sample to train on (0 answers are cut at 512 tokens and 1 samples are left out",
    ),
}


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl:2", "link.jsonl", "base/../data.jsonl"])
def test_a_file_of_data_that_is_named_twice_is_refused(folder, tmp_path, capsys, name):
    """A sample would be trained on and validated on at once."""
    for path in ("base", "data.jsonl"):
        (tmp_path / path).symlink_to(folder / path)
    (tmp_path / "link.jsonl").symlink_to("data.jsonl")
    words = arguments(tmp_path, tmp_path / "out")
    words.insert(words.index("--data") + 2, str(tmp_path / name))
    refused(capsys, ", twice: ", words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["", "adapter.safetensors"])
def test_overwrite_does_not_remove_the_adapter_to_start_from(folder, whole_run, tmp_path, capsys, name):
    """It was removed before the first epoch was done, and --resume then missed it."""
    output = tmp_path / "out"
    shutil.copytree(whole_run, output)
    before = contents(output)
    refused(
        capsys, "which --init starts from: move it out of",
        arguments(folder, output, "--init", str(output / name), "--overwrite"),
    )  # fmt: skip
    assert contents(output) == before


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_refused_before_anything_is_written(folder, tmp_path, capsys, case):
    (content, sentence), data, output = BAD_DATA[case], tmp_path / "bad.jsonl", tmp_path / "out"
    data.write_text(content)
    refused(capsys, sentence, arguments(folder, output, "--data", str(data)))
    assert not output.exists() and data.read_text() == content


def test_samples_beyond_the_context_are_counted_and_cut_as_said(folder, tmp_path, capsys):
    """128 tokens hold the template and a short answer, and no answer of 600."""
    long = [
        {"instruction": "a", "output": "b" * 600},
        {"instruction": "a" * 600, "output": "b"},
        {"instruction": "c", "output": "d" * 600},
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, RECORDS + long)))
    words = arguments(folder, tmp_path / "out", "--data", str(tmp_path / "data.jsonl"), "--epochs", "1")
    assert run(*words) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "13 records: 2 answers are cut at 512 tokens and 1 samples are left out" in told
    assert "10 samples to train on, 2 to validate" in told


def place_elsewhere(base: Path) -> None:
    """An index that names two shards, of which the second is not there."""
    names = list(load_file(base / "model.safetensors"))
    (base / "model.safetensors").rename(base / "model-1.safetensors")
    places = dict.fromkeys(names, "model-1.safetensors") | {names[0]: "model-2.safetensors"}
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def truncate(base: Path) -> None:
    weights = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(weights[: len(weights) // 2])


def add_key(base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}
    save_file(weights | bias, base / "model.safetensors", {"format": "pt"})


def drop_key(base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, base / "model.safetensors", {"format": "pt"})


def shrink_vocabulary(base: Path) -> None:
    save_base(make_base(config=LlamaConfig(**vars(CONFIG) | {"vocab_size": 60})), base)


BAD_BASES = {
    "no folder": (shutil.rmtree, "is not a directory"),
    "a missing shard": (place_elsewhere, "lacks model-2.safetensors of the 2 shards its index names"),
    "no weights": (lambda base: (base / "model.safetensors").unlink(), "neither model.safetensors nor"),
    "a truncated shard": (truncate, "model.safetensors is truncated"),
    "an unknown key": (add_key, "holds layers.0.self_attn.q_proj.bias, which a LLaMA does not have"),
    "a missing key": (drop_key, "lacks norm.weight"),
    "another vocabulary": (shrink_vocabulary, "they belong to different models"),
    "no tokenizer": (
        lambda base: (base / "tokenizer.json").unlink(),
        "neither tokenizer.json nor tokenizer.model",
    ),
    "a broken tokenizer": (lambda base: (base / "tokenizer.json").write_text("{"), "tokenizer.json"),
    "a broken configuration": (lambda base: (base / "config.json").write_text("{"), "is not valid JSON"),
}


@pytest.mark.parametrize("case", BAD_BASES)
def test_a_bad_base_is_refused_by_both_programs(folder, tmp_path, capsys, case):
    (damage, sentence), base, output = BAD_BASES[case], tmp_path / "base", tmp_path / "out"
    shutil.copytree(folder / "base", base)
    damage(base)
    before = contents(base) if base.exists() else None
    refused(capsys, sentence, arguments(folder, output, "--base", str(base)))
    refused(capsys, sentence, ["--base", str(base), "--prompt", "Say"], generate.main)
    assert not output.exists() and (contents(base) if base.exists() else None) == before


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("--max-seq-len", "4096", "--max-seq-len 4096 is beyond the model's context of 512"),
        ("--max-seq-len", "0", "--max-seq-len must be at least 2, got 0"),
        ("--validation", "1.5", "--validation must be a share from 0 to below 1, got 1.5"),
        ("--batch-size", "0", "batch_size must be above 0, got 0"),
        ("--layers", "9", "asks for 9 layers, the model has 4"),
        ("--prompt-length", "500", "prompt_length must lie in 1 .. 128, got 500"),
        ("--save-every", "-1", "--save-every must be at least 1, got -1"),
        ("--seed", str(1 << 70), "seed must lie in 0 .. 2**63 - 1"),
        ("--min-lr", "1", "min_lr 1.0 is above the learning rate's peak of 0.00781"),
        ("--device", "foo", "--device foo: "),
        ("--device", "meta", "--device meta: "),
        ("--backend", "foo", "--backend foo: backend must be 'auto' or one of"),
        ("--init", "/nowhere/adapter.safetensors", "/nowhere/adapter.safetensors: No such file or directory"),
    ],
)
def test_bad_options_are_refused(folder, tmp_path, capsys, option, value, sentence):
    output = tmp_path / "out"
    refused(capsys, sentence, arguments(folder, output, option, value))
    assert not output.exists()


def test_an_adapter_for_another_base_is_refused(folder, whole_run, tmp_path, capsys):
    save_base(make_base(config=LlamaConfig(**vars(CONFIG) | {"hidden_size": 64})), tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    words, adapter = ["--base", str(tmp_path / "base")], str(whole_run / "adapter.safetensors")
    sentence = "is for a base of hidden size 32"
    refused(capsys, sentence, arguments(folder, tmp_path / "out", *words, "--init", adapter))
    refused(capsys, sentence, [*words, "--adapter", adapter, "--prompt", "Say"], generate.main)
    assert not (tmp_path / "out").exists()


BAD_ADAPTERS = {
    "truncated": (
        lambda content: content[: len(content) // 2],
        "is truncated or damaged: it is no whole safetensors file",
    ),
    "no adapter": (
        lambda content: b"hello",
        "is truncated, or neither safetensors nor a file of torch.save",
    ),
    "of another format": (
        lambda content: pickled({"prompts": torch.ones(2)}),
        "no adapter in a known format",
    ),
}


def pickled(value: object) -> bytes:
    torch.save(value, buffer := io.BytesIO())
    return buffer.getvalue()


@pytest.mark.parametrize("case", BAD_ADAPTERS)
def test_a_bad_adapter_is_refused_by_both_programs(folder, whole_run, tmp_path, capsys, case):
    (damage, sentence), adapter = BAD_ADAPTERS[case], tmp_path / "adapter"
    adapter.write_bytes(damage((whole_run / "adapter.safetensors").read_bytes()))
    refused(capsys, sentence, arguments(folder, tmp_path / "out", "--init", str(adapter)))
    words = ["--base", str(folder / "base"), "--adapter", str(adapter), "--prompt", "Say"]
    refused(capsys, sentence, words, generate.main)
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_base_of_the_same_shape_is_warned_of(folder, whole_run, tmp_path, capsys):
    save_base(make_base(seed=1), tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    init = ("--init", str(whole_run / "adapter.safetensors"), "--epochs", "1")
    warning = "was trained on another base of the same shape"
    for base, output, expected in ((folder / "base", "same", 0), (tmp_path / "base", "other", 1)):
        assert run(*arguments(folder, tmp_path / output, "--base", str(base), *init)) == 0
        assert capsys.readouterr().err.count(warning) == expected
    ask = ["--prompt", "Say", "--max-new-tokens", "1", "--adapter", str(whole_run / "adapter.safetensors")]
    for base, dtype, expected in ((folder / "base", "bfloat16", 0), (tmp_path / "base", "float32", 1)):
        generate.main(["--base", str(base), "--dtype", dtype, *ask])
        assert capsys.readouterr().err.count(warning) == expected


def test_a_tokenizer_that_cannot_end_an_answer_is_warned_of(folder, tmp_path, capsys):
    shutil.copytree(folder / "base", tmp_path / "base")
    tokenizer = tmp_path / "base" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("</s>", "<over>"))
    for base, expected in ((folder / "base", 0), (tmp_path / "base", 1)):
        words = arguments(folder, tmp_path / f"out{expected}", "--base", str(base), "--epochs", "1")
        assert run(*words) == 0
        assert capsys.readouterr().err.count("will not learn where an answer ends") == expected


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("--seed", "1", "was written with"),
        ("--dtype", "bfloat16", "was written with base model"),
        ("--backend", "composed", "was written with backend = auto, this run has composed"),
        ("--base", "doubled", "was written with base model"),
        ("--epochs", "9", "was written with epochs = 3, this run has 9"),
        ("--base", "another", "was written with base model"),
    ],
)
def test_resuming_something_else_is_refused(folder, whole_run, tmp_path, capsys, option, value, sentence):
    if option == "--base":
        another = make_base(seed=value == "another")
        if value == "doubled":
            with torch.no_grad():
                another.layers[1].mlp.up_proj.weight.mul_(2)
        save_base(another, tmp_path / value)
        write_tokenizer(tmp_path / value)
        value = str(tmp_path / value)
    before = contents(whole_run)
    refused(capsys, sentence, arguments(folder, whole_run, option, value, "--resume"))
    assert contents(whole_run) == before


def test_resuming_nothing_or_something_damaged_is_refused(folder, whole_run, tmp_path, capsys):
    output = tmp_path / "out"
    advice = "to resume from: start without --resume, and with --overwrite if"
    refused(capsys, advice, arguments(folder, output, "--resume"))
    output.mkdir()
    for content in (
        b"",
        b"\x80\x02h\x05.",
        torch.ones(2),
        {"run": [1], "step": 1, "adapter": {}, "optimizer": {}},
    ):
        if isinstance(content, bytes):
            (output / "checkpoint.pt").write_bytes(content)
        else:
            torch.save(content, output / "checkpoint.pt")
        refused(capsys, "is not a training checkpoint or is damaged", arguments(folder, output, "--resume"))
    (output / "checkpoint.pt").write_bytes((whole_run / "checkpoint.pt").read_bytes()[:-100])
    before = contents(output)
    refused(capsys, "is not a training checkpoint or is damaged", arguments(folder, output, "--resume"))
    assert contents(output) == before


def cut_prompts(state: dict) -> None:
    state["adapter"]["prompts"] = state["adapter"]["prompts"][:1]


def drop_gates(state: dict) -> None:
    del state["adapter"]["gates"]


def cut_moments(state: dict) -> None:
    for moments in state["optimizer"]["state"].values():
        moments["exp_avg"] = moments["exp_avg"][:1]


def drop_groups(state: dict) -> None:
    del state["optimizer"]["param_groups"]


@pytest.mark.parametrize("damage", [cut_prompts, drop_gates, cut_moments, drop_groups])
def test_a_checkpoint_whose_tensors_do_not_fit_is_refused(folder, whole_run, tmp_path, capsys, damage):
    output = tmp_path / "out"
    shutil.copytree(whole_run, output)
    state = torch.load(output / "checkpoint.pt", weights_only=True)
    state["step"] = 2  # steps are left
    damage(state)
    torch.save(state, output / "checkpoint.pt")
    before = contents(output)
    refused(capsys, "is not a training checkpoint or is damaged (", arguments(folder, output, "--resume"))
    assert contents(output) == before


def test_metrics_that_are_none_are_refused_or_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0, "loss": 1.0}\n\xff\xfe\n')
    assert read_metrics(path) == [{"step": 0, "loss": 1.0}]
    for content in (b"[1]\n", b'{"loss": 1}\n', b"\xff\n\xfe\n"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="is no metrics file"):
            read_metrics(path)


@pytest.mark.parametrize(
    ("file", "writes", "step"), [("checkpoint.pt", 3, 2), ("adapter.safetensors", 2, 2), ("loss.png", 1, 6)]
)
def test_no_space_left_keeps_what_was_there(
    folder, whole_run, tmp_path, capsys, monkeypatch, file, writes, step
):
    """The disk fills while a file is written for the writes-th time: of the run, `step` steps are safe."""
    output, real, calls = tmp_path / "out", os.fsync, []

    def full(descriptor):
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if file in name:
            calls.append(name)
            if len(calls) == writes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    kept = "the file that was there is unchanged" if writes > 1 else "nothing was left there"
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        refused(capsys, f"{file}: No space left on device; {kept}", arguments(folder, output))
    assert len(calls) == writes and not Path(calls[-1]).exists()  # nothing half written is left
    assert torch.load(output / "checkpoint.pt", weights_only=True)["step"] == step
    assert run(*arguments(folder, output, "--resume")) == 0
    assert losses_of(output) == losses_of(whole_run)


class NoSpace(io.StringIO):
    def write(self, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_no_space_left_for_the_metrics(folder, whole_run, tmp_path, capsys, monkeypatch):
    """A line is lost, and with it nothing that a resumed run does not write again."""
    output, real, lines = tmp_path / "out", MetricsLog.write, []

    def full(log, **entry):
        lines.append(entry)
        if len(lines) == 5:
            log._file = NoSpace()
        real(log, **entry)

    with monkeypatch.context() as patched:
        patched.setattr(MetricsLog, "write", full)
        refused(capsys, "metrics.jsonl: No space left on device", arguments(folder, output))
    assert run(*arguments(folder, output, "--resume")) == 0
    assert losses_of(output) == losses_of(whole_run)


def test_what_a_killed_write_left_goes_with_the_next_run(folder, whole_run, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(whole_run, output)
    code = (
        "import os, signal, sys; os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        "from model.run_folder import write_file; write_file(sys.argv[1], b'half')"
    )
    command = [sys.executable, "-c", code, output / "checkpoint.pt"]
    assert subprocess.run(command, cwd=ROOT).returncode == -signal.SIGKILL
    assert len(contents(output)) == len(contents(whole_run)) + 1
    assert run(*arguments(folder, output, "--resume")) == 0
    assert contents(output).keys() == contents(whole_run).keys()


def test_threads_that_write_one_file_leave_one_of_theirs(tmp_path):
    path, whole = tmp_path / "file", [bytes([number]) * 100_000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda content: write_file(path, content), whole * 5))
    assert path.read_bytes() in whole and list(contents(tmp_path)) == ["file"]


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_file(path, b"old")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_file(path, b"new")
    assert contents(tmp_path) == {"file": b"old"}

"""Training: the recipe, what moves and what does not, resuming, and everything that can go wrong with files."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
from pathlib import Path

import pytest
import tokenizers
import torch

from model import checkpoint as checkpoint_module
from model import generate
from model import train as program
from model import training as training_module
from model.adapter import LlamaAdapter
from model.adapter_files import load_adapter
from model.config import AdapterConfig, LlamaConfig
from model.data import Sample, pack
from model.errors import UserError, run_program
from model.llama import Llama
from model.loading import load_base, save_base
from model.metrics import read_metrics
from model.storage import write_file
from model.training import Recipe, batch_loss, evaluate, make_optimizer, train

CONFIG = LlamaConfig(
    vocab_size=131,
    hidden_size=32,
    intermediate_size=48,
    num_layers=4,
    num_heads_q=4,
    num_heads_kv=2,
    head_dim=8,
    max_seq_len=512,
)  # fmt: skip


def make_base(seed: int = 0, config: LlamaConfig = CONFIG) -> Llama:
    torch.manual_seed(seed)
    return Llama(config).initialise(std=0.3).freeze()


def write_tokenizer(directory: Path) -> None:
    """One token per ASCII character."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {chr(code): code + 3 for code in range(128)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.save(str(directory / "tokenizer.json"))


RECORDS = [
    {"instruction": f"Say {word}.", "input": "twice" * (index % 2), "output": f"{word} {word}"}
    for index, word in enumerate(
        ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """base/ and data.jsonl, read by every test and written by none."""
    path = tmp_path_factory.mktemp("train")
    save_base(make_base(), path / "base")
    write_tokenizer(path / "base")
    (path / "data.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    return path


def samples(count: int = 9) -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    return [
        Sample(torch.randint(3, 131, (5 + 2 * index,), generator=generator).tolist(), 3)
        for index in range(count)
    ]


def make_adapter(base: Llama, **config) -> LlamaAdapter:
    return LlamaAdapter(
        base.config, AdapterConfig(prompt_length=3, **config), torch.Generator().manual_seed(0)
    )


# The recipe


def test_the_papers_learning_rates():
    recipe = Recipe()
    assert recipe.peak_lr == pytest.approx(9e-3 * 64 / 256)
    # warm-up over 2 of 5 epochs, then half a cosine to 0
    expected = {0.0: 0, 0.5: 0.25, 1.0: 0.5, 2.0: 1, 2.75: 0.5 + math.sqrt(0.5) / 2, 3.5: 0.5, 5.0: 0}
    for epoch, share in expected.items():
        assert recipe.learning_rate(epoch) == pytest.approx(2.25e-3 * share, abs=1e-12)
    floored = Recipe(epochs=3, warmup_epochs=0, min_lr=1e-4)
    assert (floored.learning_rate(0), floored.learning_rate(3)) == pytest.approx((2.25e-3, 1e-4))


def test_the_papers_optimizer():
    optimizer = make_optimizer(make_adapter(make_base()), Recipe())
    (group,) = optimizer.param_groups
    assert type(optimizer) is torch.optim.AdamW
    assert (group["betas"], group["weight_decay"], group["lr"]) == ((0.9, 0.95), 0.02, 2.25e-3)


@pytest.mark.parametrize(
    "field", ["epochs", "base_lr", "batch_size", "max_tokens", "max_grad_norm", "weight_decay"]
)
def test_impossible_recipes_are_refused(field):
    with pytest.raises(UserError, match=rf"{field} must be .*, got -1"):
        Recipe(**{field: -1})


# The loop


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("gate", [0.0, 0.7])
def test_a_step_is_the_mean_over_answer_tokens_however_it_is_cut(packed, gate):
    """Packing, padding and accumulation give the loss and the gradients of samples taken one by one."""
    base = make_base()
    adapter, separate = make_adapter(base), make_adapter(base)
    for one in (adapter, separate):
        torch.nn.init.constant_(one.gates, gate)
    chosen = samples()
    total = sum(len(sample.tokens) - sample.prompt_length for sample in chosen)
    losses = [batch_loss(base, separate, pack([sample])) for sample in chosen]
    (sum(losses) / total).backward()

    recipe = Recipe(batch_size=len(chosen), epochs=1, warmup_epochs=0, max_tokens=40, packed=packed)
    optimizer = make_optimizer(adapter, recipe)
    report = next(train(base, adapter, chosen, recipe, optimizer))
    assert report.loss == pytest.approx(sum(losses).item() / total, rel=1e-5)
    assert report.num_tokens == sum(len(sample.tokens) - 1 for sample in chosen)
    torch.testing.assert_close(adapter.gates.grad, separate.gates.grad, rtol=2e-4, atol=1e-7)
    torch.testing.assert_close(adapter.prompts.grad, separate.prompts.grad, rtol=2e-4, atol=1e-7)
    assert evaluate(base, separate, chosen, recipe) == pytest.approx(report.loss, rel=1e-5)


def test_the_adapter_moves_and_the_base_does_not():
    base = make_base()
    adapter = make_adapter(base)
    before = {name: tensor.clone() for name, tensor in (base.state_dict() | adapter.state_dict()).items()}
    recipe = Recipe(epochs=3, warmup_epochs=0, batch_size=4, base_lr=0.5)
    for _ in train(base, adapter, samples(), recipe, make_optimizer(adapter, recipe)):
        pass
    for name, parameter in adapter.named_parameters():
        assert parameter.grad.flatten(1).norm(dim=1).min() > 0, f"a layer of {name} got no gradient"
        assert not torch.isclose(parameter, before[name]).flatten(1).all(1).any(), (
            f"a layer of {name} did not move"
        )
    for name, parameter in base.named_parameters():
        assert parameter.grad is None and torch.equal(parameter, before[name]), name


def test_at_gate_zero_only_the_gates_get_gradients():
    base = make_base()
    adapter = make_adapter(base)
    batch_loss(base, adapter, pack(samples())).backward()
    assert adapter.gates.grad.abs().min() > 0 and not adapter.prompts.grad.any()


def test_the_loss_falls():
    base = make_base()
    adapter = make_adapter(base)
    recipe = Recipe(epochs=15, warmup_epochs=1, batch_size=9, base_lr=6.0)
    losses = [
        report.loss for report in train(base, adapter, samples(), recipe, make_optimizer(adapter, recipe))
    ]
    assert losses[-1] < losses[0] - 0.5


def test_an_infinite_gradient_is_not_stepped_on(monkeypatch):
    base = make_base()
    adapter = make_adapter(base)
    before = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    adapter.gates.register_hook(lambda grad: torch.full_like(grad, math.inf))
    with pytest.raises(UserError, match="the gradient's norm became inf at step 0: try a lower --base-lr"):
        next(train(base, adapter, samples(), Recipe(), make_optimizer(adapter, Recipe())))
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter.state_dict().items())


def test_clipping_bounds_the_step_and_reports_the_norm_before():
    base = make_base()
    norms = {}
    for limit in (None, 1e-3):
        adapter = make_adapter(base)
        recipe = Recipe(epochs=1, warmup_epochs=0, batch_size=9, max_grad_norm=limit)
        report = next(train(base, adapter, samples(), recipe, make_optimizer(adapter, recipe)))
        after = torch.cat([parameter.grad.flatten() for parameter in adapter.parameters()]).norm().item()
        norms[limit] = (report.grad_norm, after)
    assert norms[None][0] == pytest.approx(norms[None][1], rel=1e-5) and norms[None][0] > 1e-2
    assert norms[1e-3][0] == pytest.approx(norms[None][0], rel=1e-5)
    assert norms[1e-3][1] == pytest.approx(1e-3, rel=1e-2)


def test_autocast_trains_close_to_float32():
    base = make_base()
    losses = []
    for autocast in (False, True):
        adapter = make_adapter(base)
        torch.nn.init.constant_(adapter.gates, 0.5)
        recipe = Recipe(epochs=1, batch_size=9, autocast=autocast)
        losses.append(next(train(base, adapter, samples(), recipe, make_optimizer(adapter, recipe))).loss)
        assert adapter.gates.grad.dtype == torch.float32 and adapter.gates.grad.any()
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=2e-2)


def test_a_loss_that_is_not_a_number_ends_the_run():
    base = make_base()
    adapter = make_adapter(base)
    torch.nn.init.constant_(adapter.gates, math.nan)
    with pytest.raises(UserError, match="the loss became nan at step 0: try a lower --base-lr, or --clip 1"):
        next(train(base, adapter, samples(), Recipe(), make_optimizer(adapter, Recipe())))


# The program


def arguments(folder: Path, output: Path, *more: str) -> list[str]:
    fixed = {"--base": folder / "base", "--data": folder / "data.jsonl", "--out": output, "--device": "cpu"}
    small = {"--epochs": 3, "--batch-size": 4, "--prompt-length": 3, "--base-lr": 0.5, "--validation": 0.2}
    pairs = {
        **{k: str(v) for k, v in (fixed | small).items()},
        **dict(zip(more[::2], more[1::2], strict=False)),
    }
    flags = [word for word in more if word in ("--resume", "--overwrite", "--padded")]
    return [word for pair in pairs.items() if pair[0] not in flags for word in pair] + flags


def run(*words: str) -> int:
    """The program's exit status."""
    try:
        run_program(lambda: program.main(list(words)))
    except SystemExit as end:
        return end.code
    return 0


def losses_of(output: Path) -> list[tuple]:
    """Everything in the metrics that does not depend on the clock."""
    return [
        tuple(entry.get(key) for key in ("step", "loss", "grad_norm", "learning_rate", "val_loss"))
        for entry in read_metrics(output / "metrics.jsonl")
    ]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.fixture(scope="module")
def whole_run(folder, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "out"
    assert run(*arguments(folder, output)) == 0
    return output


def test_a_run_leaves_its_files(folder, whole_run):
    assert set(contents(whole_run)) == {"adapter.safetensors", "checkpoint.pt", "metrics.jsonl", "loss.png"}
    entries = read_metrics(whole_run / "metrics.jsonl")
    assert [entry["step"] for entry in entries if "loss" in entry] == list(range(6))
    assert [entry["step"] for entry in entries if "val_loss" in entry] == [0, 2, 4, 6]
    assert (whole_run / "loss.png").read_bytes().startswith(b"\x89PNG")
    base = load_base(folder / "base")
    adapter = load_adapter(whole_run / "adapter.safetensors", base.config)
    assert adapter.layers == (2, 3) and adapter.gates.abs().min() > 0


@pytest.mark.parametrize("after", [0, 2, 5])
def test_a_resumed_run_is_the_same_run(folder, whole_run, tmp_path, monkeypatch, after):
    """Ctrl-C after some steps, then --resume: each loss and the adapter are as without it, bit for bit."""
    real, done = training_module.batch_loss, []

    def pressing(*args):
        done.append(None)
        if len(done) == after + 1 + validations:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    validations = 1 + after // 2  # each one pass
    output = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(training_module, "batch_loss", pressing)
        assert run(*arguments(folder, output)) == 130
    assert len(losses_of(output)) == after + validations < len(losses_of(whole_run))
    assert run(*arguments(folder, output, "--resume")) == 0
    assert losses_of(output) == losses_of(whole_run)
    resumed, whole = (load_adapter(path / "adapter.safetensors", CONFIG) for path in (output, whole_run))
    assert torch.equal(resumed.prompts, whole.prompts) and torch.equal(resumed.gates, whole.gates)


@pytest.mark.parametrize("epoch", [0, 1, 3])
def test_ctrl_c_in_a_validation_ends_it_and_resuming_makes_up_for_it(
    folder, whole_run, tmp_path, monkeypatch, epoch
):
    real, validations = program.evaluate, []

    def pressing(*args):
        validations.append(None)
        if len(validations) == epoch + 1:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    output = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(program, "evaluate", pressing)
        assert run(*arguments(folder, output)) == 130
    assert len(validations) == epoch + 1
    assert losses_of(output) == losses_of(whole_run)[: 3 * epoch]
    assert run(*arguments(folder, output, "--resume")) == 0
    assert losses_of(output) == losses_of(whole_run)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_that_crashes_before_its_first_step_resumes(
    folder, whole_run, tmp_path, monkeypatch, overwrite
):
    """Also where --overwrite replaces a finished run: the old one is never gone on with."""
    output = tmp_path / "out"
    if overwrite:
        assert run(*arguments(folder, output, "--epochs", "1", "--seed", "5")) == 0

    def crash(*args):
        raise RuntimeError("power cut")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="power cut"):
        patched.setattr(training_module, "batch_loss", crash)
        program.main(arguments(folder, output, *["--overwrite"] * overwrite))
    assert torch.load(output / "checkpoint.pt", weights_only=True)["step"] == 0
    assert not (output / "adapter.safetensors").exists()
    assert run(*arguments(folder, output, "--resume")) == 0
    assert losses_of(output) == losses_of(whole_run)


def test_resume_after_a_crash_takes_the_last_checkpoint(folder, whole_run, tmp_path, monkeypatch):
    output = tmp_path / "out"
    real, saves = program.save_checkpoint, []

    def crash(*args):
        saves.append(None)
        if len(saves) == 5:
            raise RuntimeError("power cut")
        real(*args)

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="power cut"):
        patched.setattr(program, "save_checkpoint", crash)
        program.main(arguments(folder, output, "--save-every", "1"))
    with open(output / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')  # a line the crash cut short
    assert run(*arguments(folder, output, "--resume")) == 0
    assert losses_of(output) == losses_of(whole_run)


def test_the_official_format(folder, whole_run, tmp_path):
    output = tmp_path / "out"
    assert run(*arguments(folder, output, "--format", "official-v1")) == 0
    ours = load_adapter(whole_run / "adapter.safetensors", CONFIG)
    official = load_adapter(output / "adapter.pth", CONFIG, prompt_length=3)
    assert torch.equal(ours.prompts, official.prompts) and torch.equal(ours.gates, official.gates)
    ask = ["--base", str(folder / "base"), "--prompt", "Say", "--max-new-tokens", "1"]
    ask += ["--adapter", str(output / "adapter.pth"), "--prompt-length"]
    generate.main([*ask, "3", "--gate-activation", "identity"])
    with pytest.raises(UserError, match="is not a whole number of at most 4 layers of 5 prompts"):
        generate.main([*ask, "5"])


def test_padded_and_packed_runs_agree(folder, whole_run, tmp_path):
    output = tmp_path / "out"
    assert run(*arguments(folder, output, "--padded")) == 0
    for padded, packed in zip(losses_of(output), losses_of(whole_run), strict=True):
        assert [value or 0.0 for value in padded] == pytest.approx(
            [value or 0.0 for value in packed], rel=1e-3
        )


# What goes wrong: one sentence, exit code 2, nothing touched


def refused(capsys, sentence: str, words: list[str]) -> None:
    assert run(*words) == 2
    error = capsys.readouterr().err
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert sentence in line and line.endswith("."), line
    assert "Traceback" not in error


def test_an_occupied_output_folder_is_refused(folder, whole_run, capsys):
    before = contents(whole_run)
    refused(capsys, "is not empty: go on with --resume, or replace", arguments(folder, whole_run))
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


BAD_DATA = {
    '{"instruction": "a", "output": "b"}\n{"instruction"': "line 2: not JSON",
    '{"instruction": "a", "output": ""}': "line 1: the output is empty",
    json.dumps({"instruction": "a" * 600, "output": "b"}): "leaves no sample to train on",
    "": "holds no records",
    '{"instruction": "a", "output": "b"}': "--validation took the only sample",
}


@pytest.mark.parametrize("content", BAD_DATA)
def test_bad_data_is_refused_before_anything_is_written(folder, tmp_path, capsys, content):
    data, output = tmp_path / "bad.jsonl", tmp_path / "out"
    data.write_text(content)
    refused(capsys, BAD_DATA[content], arguments(folder, output, "--data", str(data)))
    assert not output.exists()


def damage_base(folder: Path, tmp_path: Path, what: str) -> Path:
    """A copy of the base with one thing wrong."""
    base = tmp_path / "base"
    if what == "missing":
        return base
    base.mkdir()
    for path in (folder / "base").iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    if what == "truncated":
        weights = (base / "model.safetensors").read_bytes()
        (base / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    elif what == "tokenizer missing":
        (base / "tokenizer.json").unlink()
    elif what == "wrong vocabulary":
        save_base(make_base(config=LlamaConfig(**vars(CONFIG) | {"vocab_size": 60})), base)
    return base


@pytest.mark.parametrize(
    ("what", "sentence"),
    {
        "missing": "is not a directory",
        "truncated": "truncated",
        "tokenizer missing": "neither tokenizer.json nor tokenizer.model",
        "wrong vocabulary": "they belong to different models",
    }.items(),
)
def test_a_bad_base_is_refused(folder, tmp_path, capsys, what, sentence):
    base, output = damage_base(folder, tmp_path, what), tmp_path / "out"
    refused(capsys, sentence, arguments(folder, output, "--base", str(base)))
    assert not output.exists()


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
    words = arguments(folder, tmp_path / "out", "--base", str(tmp_path / "base"))
    refused(
        capsys, "is for a base of hidden size 32", [*words, "--init", str(whole_run / "adapter.safetensors")]
    )
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
    for content in (b"", torch.ones(2), {"run": [1], "step": 1, "adapter": {}, "optimizer": {}}):
        if isinstance(content, bytes):
            (output / "checkpoint.pt").write_bytes(content)
        else:
            torch.save(content, output / "checkpoint.pt")
        refused(capsys, "is not a training checkpoint or is damaged", arguments(folder, output, "--resume"))
    (output / "checkpoint.pt").write_bytes((whole_run / "checkpoint.pt").read_bytes()[:-100])
    before = contents(output)
    refused(capsys, "is not a training checkpoint or is damaged", arguments(folder, output, "--resume"))
    assert contents(output) == before


def test_metrics_that_are_none_are_refused_or_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0, "loss": 1.0}\n\xff\xfe\n')
    assert read_metrics(path) == [{"step": 0, "loss": 1.0}]
    path.write_bytes(b"[1]\n")
    with pytest.raises(UserError, match="is no metrics file"):
        read_metrics(path)


def test_no_space_left_keeps_the_checkpoint_before(folder, whole_run, tmp_path, capsys, monkeypatch):
    """The disk fills while the second epoch's checkpoint is written."""
    output, real, calls = tmp_path / "out", os.fsync, []

    def full(descriptor):
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if "checkpoint.pt" in name:
            calls.append(name)
            if len(calls) == 3:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        refused(capsys, "checkpoint.pt: No space left on device; the file that was there is unchanged",
                arguments(folder, output))  # fmt: skip
    assert len(calls) == 3 and not Path(calls[2]).exists()  # nothing half written is left
    assert torch.load(output / "checkpoint.pt", weights_only=True)["step"] == 2
    assert run(*arguments(folder, output, "--resume")) == 0
    assert losses_of(output) == losses_of(whole_run)


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_file(path, b"old")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_file(path, b"new")
    assert contents(tmp_path) == {"file": b"old"}


def test_a_checkpoint_holds_tensors_and_plain_values_only(whole_run):
    state = torch.load(whole_run / "checkpoint.pt", weights_only=True)
    assert state.keys() == set(checkpoint_module.Checkpoint._fields)

"""Quantised bases: packed by this package or by torchao, the gradients of what the weights stand for, GGUF blocks as
they are in the file, adapters that fit the base, and one meaning of --quantise in every program."""

from __future__ import annotations

import sys

import pytest
import torch
from tiny_models import hf_directory, hf_model
from tiny_runs import arguments, losses_of, make_base, run
from torch import nn

from model import generate as generate_program
from model import serve as serve_program
from model.adapter import LlamaAdapter
from model.config import LlamaConfig
from model.data import Sample
from model.deltas import Delta, with_deltas
from model.errors import UserError
from model.fingerprint import adapter_metadata, base_fingerprint, is_of_base, run_fingerprints
from model.forecast import forecast
from model.llama import Llama
from model.loading import load_base, save_base
from model.lora import Lora, LoraChoice
from model.mixture import Mixture
from model.quantised import (
    FORMATS,
    QuantisedLinear,
    dequantised,
    is_packed_format,
    is_quantised,
    kept_as,
    num_weights,
    quantise,
    stored_bytes,
)
from model.recipe import Recipe
from model.train_setup import run_summary
from zinit_kernels.packed import Packed, PackedLinear

CONFIG = LlamaConfig(
    vocab_size=131, hidden_size=128, intermediate_size=256, num_layers=3, num_heads_q=4, num_heads_kv=2, head_dim=32,
    max_seq_len=128,
)  # fmt: skip
TOKENS = torch.randint(3, 131, (2, 20), generator=torch.Generator().manual_seed(0))
PACKED_TOKENS = torch.arange(3, 43)[None]


def has_torchao() -> bool:
    try:
        import torchao  # noqa: F401
    except ImportError:
        return False
    return True


needs_torchao = pytest.mark.skipif(not has_torchao(), reason="torchao is not installed")
FORMATS_HERE = ["int8", "int4", *(pytest.param(format, marks=needs_torchao) for format in ("nf4", "fp8"))]


def adapter():
    made = LlamaAdapter(CONFIG, generator=torch.Generator().manual_seed(1))
    nn.init.ones_(made.gates)
    return made


def step(base, adapter):
    """The logits, the gradients, and the shapes of what was kept for them."""
    kept = []

    def keep(tensor):
        if tensor.dtype.is_floating_point:
            kept.append(tuple(sorted(tensor.shape)))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = base(TOKENS, adapter)
    logits.float().square().sum().backward()
    return logits.detach(), [parameter.grad for parameter in adapter.parameters()], kept


def stands_for(module) -> torch.Tensor:
    """The numbers that a module's quantised weight stands for."""
    if isinstance(module, Packed):
        return module.packed.unpack(torch.float32)
    return dequantised(module.weight).detach().float()


@pytest.mark.parametrize("format", FORMATS_HERE)
def test_the_gradients_are_those_of_what_the_weights_stand_for(format):
    base, plain = (make_base(0, CONFIG) for _ in range(2))
    quantise(base, format)
    names = [n for n, module in base.named_modules() if isinstance(module, (Packed, QuantisedLinear))]
    assert len(names) == 7 * CONFIG.num_layers + 2 * (format in ("int8", "int4"))
    changed = 0.0
    for name in names:
        module, original = base.get_submodule(name), plain.get_submodule(name).weight
        changed = max(changed, (stands_for(module) - original).norm().item() / original.norm().item())
        few = format in ("nf4", "int4") and name.startswith("layers")
        assert stored_bytes(module.weight) < (0.6 if few else 1.15) * original.numel()
        original.data = stands_for(module)
    assert 1e-3 < changed < 0.2
    assert num_weights(base) == num_weights(plain)
    before = [stands_for(base.get_submodule(name)) for name in names]
    ours, expected = step(base, adapter()), step(plain, adapter())
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-3, atol=1e-2)
    for grad, wanted in zip(ours[1], expected[1], strict=True):
        assert (grad - wanted).norm() < 1e-2 * wanted.norm()
    assert all(map(torch.equal, before, [stands_for(base.get_submodule(name)) for name in names]))
    # of what is kept nothing has a weight's shape, which the plain layers do keep
    shapes = {tuple(sorted(plain.get_submodule(name).weight.shape)) for name in names}
    assert not shapes & set(ours[2]) and shapes & set(expected[2])


@pytest.mark.parametrize("format", FORMATS_HERE)
@pytest.mark.parametrize("first", ["quantised", "lora"])
def test_lora_is_trained_on_it(format, first):
    base = make_base(0, CONFIG)
    if first == "quantised":
        quantise(base, format)
    lora = Lora(base, LoraChoice(rank=2))
    if first == "lora":
        quantise(base, format)
    _, grads, _ = step(base, lora)
    assert all(grad is not None for grad in grads) and any(grad.abs().max() > 0 for grad in grads)
    assert not any(
        parameter.requires_grad for name, parameter in base.named_parameters() if "lora_" not in name
    )
    assert is_quantised(base)


def test_a_run_on_it_is_another_run(folder, whole_run, tmp_path, capsys):
    words = arguments(folder, tmp_path / "out", "--quantise", "int8")
    assert run(*words) == 0
    ours, theirs = (losses_of(path)[0][-1] for path in (tmp_path / "out", whole_run))
    assert ours != theirs and ours == pytest.approx(theirs, rel=0.05)
    assert run(*words, "--resume") == 0
    capsys.readouterr()
    assert run(*arguments(folder, tmp_path / "out"), "--resume") == 2
    assert "was written with quantise = packed int8, this run has None" in capsys.readouterr().err


def test_a_run_that_torchao_quantised_does_not_go_on_packed(folder, tmp_path, capsys, monkeypatch):
    """Its checkpoint says "int8", as all did before this package packed bases itself."""
    words = arguments(folder, tmp_path / "out", "--quantise", "int8")
    with monkeypatch.context() as patched:
        patched.setattr("model.train_setup.kept_as", lambda base, format: format)
        assert run(*words) == 0
    capsys.readouterr()
    assert run(*words, "--resume") == 2
    assert "was written with quantise = int8, this run has packed int8" in capsys.readouterr().err


@pytest.mark.parametrize("format", FORMATS_HERE)
def test_one_option_in_every_program(format, folder, tmp_path, monkeypatch, capsys):
    """An adapter is trained and used on the very same weights."""
    made = []

    def kept(*arguments):
        made.append(load_base(*arguments))
        return made[-1]

    for program in ("train", "generate", "serve"):
        monkeypatch.setattr(f"model.{program}.load_base", kept)
    monkeypatch.setattr("model.serve.Engine", stop)
    monkeypatch.setattr("model.serve._web", lambda: (type("App", (), {"check_name": str}), None))
    option = ("--quantise", format)
    assert run(*arguments(folder, tmp_path / "out", "--epochs", "1", *option)) == 0
    capsys.readouterr()
    asked = ("--base", str(folder / "base"), "--prompt", "the", "--max-new-tokens", "2", "--device", "cpu")
    assert run(*asked, *option, "--adapter", str(tmp_path / "out"), main=generate_program.main) == 0
    assert "warning" not in capsys.readouterr().err
    with pytest.raises(Stopped):
        serve_program.main(["--base", str(folder / "base"), "--device", "cpu", *option])
    assert len(made) == 3 and all(map(is_quantised, made))
    for name, module in made[0].named_modules():
        if isinstance(module, (Packed, QuantisedLinear)):
            for other in made[1:]:
                assert torch.equal(stands_for(module), stands_for(other.get_submodule(name))), name


class Stopped(Exception):
    pass


def stop(*arguments, **options):
    raise Stopped


def test_blocks_are_trained_on_as_they_are(tmp_path, monkeypatch):
    """A GGUF file's blocks are not made into numbers when a run begins."""
    pytest.importorskip("gguf")
    from tiny_gguf import write_model

    write_model(tmp_path / "a.gguf", hf_model("llama", hidden_size=64, intermediate_size=96), "Q4_1")
    base = load_base(tmp_path / "a.gguf", quantise="int8").freeze()
    lora = Lora(base, LoraChoice(rank=2))
    layer = base.layers[0].self_attn.q_proj.base_layer
    assert type(layer) is PackedLinear and layer.scheme == (4, 32, True)
    logits = base(PACKED_TOKENS, lora)
    logits.float().square().sum().backward()
    assert any(parameter.grad.abs().max() > 0 for parameter in lora.parameters())
    for format, kept in (("nf4", False), ("int4", True)):
        monkeypatch.setattr("model.quantised._quantise_by_torchao", lambda base, format: None)
        assert is_quantised(load_base(tmp_path / "a.gguf", quantise=format)) is kept


def test_who_quantises(monkeypatch):
    """This package packs int8 and int4 on a CPU; the rest is torchao's."""
    assert [is_packed_format(format, "cpu") for format in FORMATS] == [True, True, False, False]
    assert not any(is_packed_format(format, "cuda") for format in FORMATS)
    assert [kept_as(make_base(), format) for format in (None, "int4", "nf4")] == [None, "packed int4", "nf4"]
    asked = []
    monkeypatch.setattr("model.quantised._quantise_by_torchao", lambda base, format: asked.append(format))
    base = make_base()
    monkeypatch.setattr(Llama, "device", torch.device("cuda"))
    quantise(base, "int8")
    assert asked == ["int8"] and not is_quantised(base)


@needs_torchao
def test_checkpoints_know_the_weights_that_torchao_quantised():
    """As before there were packed bases: a run goes on with the base whose weights are those."""
    base, plain = make_base(), make_base()
    quantise(base, "nf4")
    assert run_fingerprints(base) == run_fingerprints(plain)
    assert adapter_metadata(base) == adapter_metadata(plain)
    assert run_fingerprints(quantise(plain, "int8")) != run_fingerprints(base)


def test_what_cannot_be_done_is_named(monkeypatch, folder, tmp_path, capsys):
    assert run(*arguments(folder, tmp_path / "out"), "--quantise", "int8", "--tensor-parallel", "2") == 2
    assert "--quantise takes a whole base" in capsys.readouterr().err
    for module in ("torchao", "torchao.quantization", "torchao.prototype._nf4tensor_api"):
        monkeypatch.setitem(sys.modules, module, None)
    for format in ("fp8", "nf4"):
        with pytest.raises(UserError, match=rf"--quantise {format} needs torchao 0.15 or newer"):
            quantise(make_base(), format)


def logits(base) -> torch.Tensor:
    with torch.no_grad():
        return base.logits(base.hidden_states(PACKED_TOKENS))[0]


def numbers(base) -> Llama:
    """The same model with its packed weights as float32 numbers."""
    plain = Llama(base.config).float()
    state = {
        name: base.get_submodule(path).packed.unpack(torch.float32)
        if isinstance(base.get_submodule(path := name.rpartition(".")[0]), Packed)
        else weight
        for name, weight in base.state_dict().items()
    }
    plain.load_state_dict(state)
    return plain.freeze()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_gguf_blocks_stay_as_they_are(tmp_path, kind):
    pytest.importorskip("gguf")
    from tiny_gguf import write_model

    write_model(tmp_path / "a.gguf", hf_model("llama", hidden_size=64, intermediate_size=96), kind)
    inflated = load_base(tmp_path, torch.float32)
    for how in ("int8", "int4"):
        kept = load_base(tmp_path, torch.float32, quantise=how)
        packed = {name: module.packed for name, module in kept.named_modules() if isinstance(module, Packed)}
        assert len(packed) == 7 * kept.config.num_layers + 2
        assert {weight.scheme[:2] for weight in packed.values()} == {(8 if kind == "Q8_0" else 4, 32)}
        for name, weight in packed.items():
            assert torch.equal(weight.unpack(torch.float32), inflated.get_submodule(name).weight), name
        assert adapter_metadata(kept) == adapter_metadata(inflated)
        torch.testing.assert_close(logits(kept), logits(inflated), rtol=1e-4, atol=1e-4)
    assert load_base(tmp_path, quantise="int8").dtype == torch.bfloat16


def test_matrices_of_other_blocks_are_quantised(tmp_path):
    pytest.importorskip("gguf")
    from tiny_gguf import write_model

    write_model(tmp_path / "a.gguf", hf_model("llama", hidden_size=64, intermediate_size=96), "Q5_0")
    base = load_base(tmp_path, quantise="int4")
    assert base.layers[0].mlp.up_proj.scheme == (4, 32, False)
    assert base.embed_tokens.scheme.bits == base.lm_head.scheme.bits == 8


@pytest.fixture
def hf_folder(tmp_path):
    hf_directory(tmp_path / "base")
    return tmp_path / "base"


def test_what_is_said_of_a_run_counts_packed_weights(hf_folder):
    """The share that is trained is that of the plain base, and the memory foreseen is that of the packed tensors."""
    base = load_base(hf_folder, quantise="int8").freeze()
    plain, adapter = numbers(base), LlamaAdapter(base.config)
    assert run_summary(Recipe(), base, adapter, 3, 1) == run_summary(Recipe(), plain, adapter, 3, 1)
    samples = [Sample(list(range(3, 20)), 8)] * 3
    packed, whole = (forecast(model, adapter, samples, Mixture.of([3]), Recipe()) for model in (base, plain))
    assert packed.base_parameters == whole.base_parameters
    assert whole.weights / 4 < packed.weights < whole.weights / 2


def test_an_adapter_fits_the_base_quantised_or_not(hf_folder):
    plain, packed = load_base(hf_folder), load_base(hf_folder, quantise="int4")
    assert adapter_metadata(packed) == adapter_metadata(plain)
    assert is_of_base(adapter_metadata(plain), packed) and is_of_base(adapter_metadata(packed), plain)
    assert not is_of_base({"base_fingerprint": "0" * 16}, packed)
    # a run goes on only with the base as it was
    assert base_fingerprint(packed) != base_fingerprint(plain)
    assert base_fingerprint(packed) != base_fingerprint(load_base(hf_folder, quantise="int8"))


def test_a_quantised_base_is_not_written(hf_folder, tmp_path):
    with pytest.raises(UserError, match="a quantised base is not written"):
        save_base(load_base(hf_folder, quantise="int8"), tmp_path / "other")


def test_weights_that_are_no_numbers(hf_folder):
    base = load_base(hf_folder)
    with torch.no_grad():
        base.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    with pytest.raises(UserError, match="--quantise int4: layers.1.mlp.up_proj.weight cannot be quantised"):
        quantise(base, "int4")


def test_an_adapter_that_changes_its_base_is_refused(hf_folder):
    delta = Delta(bias=torch.zeros(8))
    with pytest.raises(UserError, match="must not be quantised for it: leave out --quantise"):
        with_deltas(load_base(hf_folder, quantise="int8"), {"layers.0.mlp.up_proj": delta}, {})


def test_lookup_on_a_packed_base(folder, capsys):
    asked = ("--base", str(folder / "base"), "--prompt", "the", "--max-new-tokens", "4", "--quantise", "int8")
    assert run(*asked, "--lookup", "3", main=generate_program.main) == 0
    assert run(*asked, "--lookup", "-1", main=generate_program.main) == 2
    assert "--lookup must not be negative" in capsys.readouterr().err

"""Quantised bases: GGUF blocks as they are in the file, adapters that fit the base and train on it, what is refused."""

from __future__ import annotations

import pytest
import torch
from tiny_models import hf_directory, hf_model
from tiny_runs import arguments, make_folder, run

from model import generate as generate_program
from model.adapter import LlamaAdapter
from model.config import AdapterConfig
from model.data import Sample
from model.deltas import Delta, with_deltas
from model.errors import UserError
from model.fingerprint import adapter_metadata, base_fingerprint, is_of_base
from model.forecast import forecast
from model.llama import Llama
from model.loading import load_base, save_base
from model.loss import answer_loss
from model.mixture import Mixture
from model.packed_base import num_weights, quantise_base
from model.recipe import Recipe
from model.train_setup import run_summary
from zinit_kernels.packed import Packed

TOKENS = torch.arange(3, 43)[None]


def logits(base) -> torch.Tensor:
    with torch.no_grad():
        return base.logits(base.hidden_states(TOKENS))[0]


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
def folder(tmp_path):
    hf_directory(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("how", ["int8", "int4"])
def test_gradients_are_those_of_the_numbers(folder, how):
    """The adapter's gradients through packed weights are those through the numbers that they stand for."""
    base = load_base(folder, quantise=how).freeze()
    torch.manual_seed(0)
    adapter = LlamaAdapter(base.config, AdapterConfig(gate_init="random"))
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    found = []
    for model in (base, numbers(base)):
        adapter.zero_grad()
        loss = answer_loss(model.hidden_states(TOKENS, adapter), TOKENS.roll(-1), model.output_weight)
        loss.backward()
        found.append([loss.detach(), adapter.prompts.grad.clone(), adapter.gates.grad.clone()])
    for packed, plain in zip(*found, strict=True):
        torch.testing.assert_close(packed, plain, rtol=1e-3, atol=1e-5)
    assert all(torch.equal(tensor, state[name]) for name, tensor in base.state_dict().items())
    assert num_weights(base) == num_weights(numbers(base))


def test_what_is_said_of_a_run_counts_packed_weights(folder):
    """The share that is trained is that of the plain base, and the memory foreseen is that of the packed tensors."""
    base = load_base(folder, quantise="int8").freeze()
    plain, adapter = numbers(base), LlamaAdapter(base.config)
    assert run_summary(Recipe(), base, adapter, 3, 1) == run_summary(Recipe(), plain, adapter, 3, 1)
    samples = [Sample(list(range(3, 20)), 8)] * 3
    packed, whole = (forecast(model, adapter, samples, Mixture.of([3]), Recipe()) for model in (base, plain))
    assert packed.base_parameters == whole.base_parameters
    assert whole.weights / 4 < packed.weights < whole.weights / 2


def test_an_adapter_fits_the_base_quantised_or_not(folder):
    plain, packed = load_base(folder), load_base(folder, quantise="int4")
    assert adapter_metadata(packed) == adapter_metadata(plain)
    assert is_of_base(adapter_metadata(plain), packed) and is_of_base(adapter_metadata(packed), plain)
    assert not is_of_base({"base_fingerprint": "0" * 16}, packed)
    # a run goes on only with the base as it was
    assert base_fingerprint(packed) != base_fingerprint(plain)
    assert base_fingerprint(packed) != base_fingerprint(load_base(folder, quantise="int8"))


def test_a_quantised_base_is_not_written(folder, tmp_path):
    with pytest.raises(UserError, match="a quantised base is not written"):
        save_base(load_base(folder, quantise="int8"), tmp_path / "other")


def test_weights_that_are_no_numbers(folder):
    base = load_base(folder)
    with torch.no_grad():
        base.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    with pytest.raises(UserError, match="--quantise int4: layers.1.mlp.up_proj.weight cannot be quantised"):
        quantise_base(base, "int4")


def test_an_adapter_that_changes_its_base_is_refused(folder):
    delta = Delta(bias=torch.zeros(8))
    with pytest.raises(UserError, match="must not be quantised for it: leave out --quantise"):
        with_deltas(load_base(folder, quantise="int8"), {"layers.0.mlp.up_proj": delta}, {})


def test_the_program_takes_the_option(tmp_path, capsys):
    folder = make_folder(tmp_path)
    assert run(*arguments(folder, tmp_path / "out", "--epochs", "1")) == 0
    capsys.readouterr()
    asked = ("--base", str(folder / "base"), "--prompt", "the", "--max-new-tokens", "4", "--quantise", "int8")
    for more in ((), ("--adapter", str(tmp_path / "out")), ("--lookup", "3")):
        assert run(*asked, *more, main=generate_program.main) == 0
        assert "warning" not in capsys.readouterr().err
    assert run(*asked, "--lookup", "-1", main=generate_program.main) == 2
    assert "--lookup must not be negative" in capsys.readouterr().err

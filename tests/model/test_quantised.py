"""A base that torchao quantised: the gradients of what it stands for, from no more than it takes."""

from __future__ import annotations

import sys

import pytest
import torch
from tiny_runs import arguments, losses_of, make_base, run
from torch import nn

from model.adapter import LlamaAdapter
from model.config import LlamaConfig
from model.errors import UserError
from model.lora import Lora, LoraChoice
from model.quantised import QuantisedLinear, dequantised, quantise, stored_bytes

pytest.importorskip("torchao")
CONFIG = LlamaConfig(
    vocab_size=131, hidden_size=128, intermediate_size=256, num_layers=3, num_heads_q=4, num_heads_kv=2, head_dim=32,
    max_seq_len=128,
)  # fmt: skip
ON_CPU = ("int8", "nf4", "fp8")
TOKENS = torch.randint(3, 131, (2, 20), generator=torch.Generator().manual_seed(0))


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


@pytest.mark.parametrize("format", ON_CPU)
def test_the_gradients_are_those_of_what_the_weights_stand_for(format):
    base, plain = (make_base(0, CONFIG) for _ in range(2))
    quantise(base, format)
    names = [name for name, module in base.named_modules() if isinstance(module, QuantisedLinear)]
    assert len(names) == 7 * CONFIG.num_layers
    changed = 0.0
    for name in names:
        weight = base.get_submodule(name).weight
        stands_for = dequantised(weight).detach().float()
        original = plain.get_submodule(name).weight
        changed = max(changed, (stands_for - original).norm().item() / original.norm().item())
        assert stored_bytes(weight) < (0.6 if format == "nf4" else 1.1) * original.numel()
        original.data = stands_for
    assert 1e-3 < changed < 0.2
    ours, expected = step(base, adapter()), step(plain, adapter())
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-3, atol=1e-2)
    for grad, wanted in zip(ours[1], expected[1], strict=True):
        assert (grad - wanted).norm() < 1e-2 * wanted.norm()
    # of what is kept nothing has a weight's shape, which the plain layers do keep
    shapes = {tuple(sorted(plain.get_submodule(name).weight.shape)) for name in names}
    assert not shapes & set(ours[2]) and shapes & set(expected[2])


def test_lora_is_trained_on_it(folder, tmp_path):
    base = make_base(0, CONFIG)
    lora = Lora(base, LoraChoice(rank=2))
    quantise(base, "int8")
    _, grads, _ = step(base, lora)
    assert all(grad is not None for grad in grads) and any(grad.abs().max() > 0 for grad in grads)
    assert not any(
        parameter.requires_grad for name, parameter in base.named_parameters() if "lora_" not in name
    )


def test_a_run_on_it_is_another_run(folder, whole_run, tmp_path, capsys):
    words = arguments(folder, tmp_path / "out", "--quantise", "int8")
    assert run(*words) == 0
    ours, theirs = (losses_of(path)[0][-1] for path in (tmp_path / "out", whole_run))
    assert ours != theirs and ours == pytest.approx(theirs, rel=0.05)
    assert run(*words, "--resume") == 0
    capsys.readouterr()
    assert run(*arguments(folder, tmp_path / "out"), "--resume") == 2
    assert "was written with quantise = int8, this run has None" in capsys.readouterr().err


def test_what_cannot_be_done_is_named(monkeypatch, folder, tmp_path, capsys):
    assert run(*arguments(folder, tmp_path / "out"), "--quantise", "int8", "--tensor-parallel", "2") == 2
    assert "--quantise takes a whole base" in capsys.readouterr().err
    for module in ("torchao", "torchao.quantization", "torchao.prototype._nf4tensor_api"):
        monkeypatch.setitem(sys.modules, module, None)
    for format in ("int8", "nf4"):
        with pytest.raises(UserError, match=rf"--quantise {format} needs torchao 0.15 or newer"):
            quantise(make_base(), format)

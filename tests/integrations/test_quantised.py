"""Quantised bases: the layers' projections are called as they are, and no weight of theirs is looked at."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
from tiny_peft import CONFIGS, adapted, assert_same_step, base_model, batch  # noqa: E402

from zinit_kernels.integrations.peft import accelerate  # noqa: E402
from zinit_kernels.integrations.transformers import add_zero_init_attention  # noqa: E402


class Int8Linear(nn.Module):
    """As quantisers leave it: no nn.Linear, its weight integers [in, out] that nobody else can multiply with."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features  # PEFT asks
        self.scale = nn.Buffer(linear.weight.detach().abs().amax(1) / 127)
        self.weight = nn.Parameter(
            (linear.weight.detach() / self.scale[:, None]).round().to(torch.int8).T.contiguous(),
            requires_grad=False,
        )

    def forward(self, hidden):
        return hidden @ self.weight.to(hidden.dtype) * self.scale.to(hidden.dtype)


def by_hand(model):
    for parent in list(model.model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Int8Linear(child))
    return model


def by_torchao(model):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model.model, quantization.Int8WeightOnlyConfig())
    assert type(model.model.layers[0].self_attn.q_proj.weight) is not nn.Parameter
    return model


QUANTISERS = {"by hand": by_hand, "torchao": by_torchao}


@pytest.fixture(params=QUANTISERS)
def quantised(request):
    base = base_model(CONFIGS["llama-gqa"])
    with torch.no_grad():
        exact = base(**batch("whole")).logits
        quantised = QUANTISERS[request.param](base)
        difference = (quantised(**batch("whole")).logits - exact).norm() / exact.norm()
    assert 1e-3 < difference < 0.1
    return quantised


def prompts_alone(inputs):
    return {key: value for key, value in inputs.items() if key != "labels"}


@pytest.mark.parametrize("kind", ["whole", "left-padded"])
def test_peft(quantised, kind):
    model = adapted(CONFIGS["llama-gqa"], base=quantised)
    fused = accelerate(copy.deepcopy(model))
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            assert type(fused.get_submodule(name)) is type(module)
            assert type(fused.get_submodule(name).weight) is type(module.weight)
    assert_same_step(fused, model, batch(kind))
    options = {"max_new_tokens": 8, "do_sample": False}
    inputs = prompts_alone(batch(kind))
    assert fused.generate(**inputs, **options).tolist() == model.generate(**inputs, **options).tolist()


def test_transformers(quantised):
    """Decoded token by token it is the whole pass, and training reaches every prompt and gate."""
    model = add_zero_init_attention(quantised, 4, 3)
    for name, parameter in model.named_parameters():
        if name.endswith("zinit.gate"):
            nn.init.normal_(parameter, std=0.5)
    ids = batch("whole")["input_ids"]
    tokens = model.generate(ids, max_new_tokens=8, do_sample=False)
    whole = model(input_ids=tokens)
    assert tokens[:, 20:].tolist() == whole.logits[:, 19:-1].argmax(-1).tolist()
    model(input_ids=ids, labels=ids).loss.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(trained) == 6 and all(
        ".zinit." in name and gradient.any() for name, gradient in trained.items()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_adapters_decode_on_a_half_precision_base(dtype):
    model = accelerate(adapted(CONFIGS["llama-gqa"]))
    for name, parameter in model.named_parameters():
        if "adaption" not in name:
            parameter.data = parameter.data.to(dtype)
    ids = batch("whole", rows=1)["input_ids"]
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        cache = model(input_ids=ids[:, :12]).past_key_values
        steps = [model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits for i in range(12, 20)]
        with model.disable_adapter():
            base = model(input_ids=ids).logits
    assert whole.dtype == dtype
    difference = (torch.cat(steps, 1) - whole[:, 12:]).float().norm()
    assert difference < 0.1 * (base - whole)[:, 12:].float().norm()

"""litgpt's adapter, accelerated: its own numbers by one layout, the paper's formula by the other, and it trains."""

import copy

import pytest
import torch

pytest.importorskip("litgpt", reason="litgpt is not installed")
from litgpt import adapter, adapter_v2  # noqa: E402
from litgpt.model import CausalSelfAttention  # noqa: E402

from zinit_kernels import checkpoints  # noqa: E402
from zinit_kernels.integrations.litgpt import accelerate, restore  # noqa: E402

SIZES = {
    "n_layer": 4,
    "n_head": 4,
    "n_embd": 32,
    "block_size": 64,
    "padded_vocab_size": 96,
    "rotary_percentage": 1.0,
}
SIZES |= {"bias": False, "norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", "intermediate_size": 48}
SIZES |= {"parallel_residual": False, "adapter_prompt_length": 5, "adapter_start_layer": 1}
KINDS = {"multi-head": 4, "grouped": 2, "multi-query": 1}
SOFTCAP = {"attention_logit_softcapping": 2.0, "attention_scores_scalar": 16}
WINDOW = {"sliding_window_size": 4, "sliding_window_indices": [1, 1, 0, 1]}
BIASED = {"attn_bias": True}


def model_of(groups=2, room=adapter, gates=0.7, **options):
    torch.manual_seed(0)
    model = room.GPT(room.Config(**SIZES | options, n_query_groups=groups))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(room.adapter_filter(name, parameter))
        if name.endswith("gating_factor"):
            parameter.data.normal_(std=gates)
        elif parameter.dim() > 1:
            parameter.data.normal_(std=1.0 if "adapter_wte" in name else 0.2)
    return model


def tokens(rows=2, length=12):
    return torch.randint(96, (rows, length), generator=torch.Generator().manual_seed(1))


def step(model):
    model.zero_grad()
    logits = model(tokens())
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten()).backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def the_right_rows(model):
    """litgpt's own code on weights whose rows lie as it reads them; the base keeps its own."""

    class RightRows(adapter.CausalSelfAttention):
        def scaled_dot_product_attention(self, q, k, v, mask=None):
            out = CausalSelfAttention.scaled_dot_product_attention(self, q, k, v, mask)
            if self.block_idx < self.config.adapter_start_layer:
                return out
            config, width = self.config, self.config.n_query_groups * self.config.head_size
            made = self.qkv(self.adapter_wte.weight)
            repeat = config.n_head // config.n_query_groups
            key, value = (
                part.unflatten(-1, (-1, config.head_size)).transpose(0, 1).repeat_interleave(repeat, 0)[None]
                for part in made[:, config.n_head * config.head_size :].split(width, -1)
            )
            everything = torch.ones(q.shape[2], key.shape[2], dtype=torch.bool)
            prompts = CausalSelfAttention.scaled_dot_product_attention(self, q, key, value, everything)
            return out + self.gating_factor * prompts

    for layer in model.modules():
        if type(layer) is adapter.CausalSelfAttention:
            layer.__class__ = RightRows
    return model


@pytest.mark.parametrize("options", [{}, WINDOW, BIASED], ids=["plain", "window", "biased"])
@pytest.mark.parametrize("layout", ["interleaved", "blocked"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients(kind, layout, options):
    model = model_of(KINDS[kind], **options)
    fused = accelerate(copy.deepcopy(model), layout)
    other = accelerate(copy.deepcopy(model), "blocked" if layout == "interleaved" else "interleaved")
    expected, expected_gradients = step(
        model if layout == "interleaved" else the_right_rows(copy.deepcopy(model))
    )
    logits, gradients = step(fused)
    assert (logits - expected).abs().max() <= 1e-5
    assert gradients.keys() == expected_gradients.keys() and len(gradients) == 6
    for name, gradient in gradients.items():
        size = expected_gradients[name].norm()
        assert size > 0 and (gradient - expected_gradients[name]).norm() <= 1e-4 * size, name
    differ = (other(tokens()) - expected).abs().max() > 1e-2
    assert differ == (kind != "multi-query")


def test_soft_cap():
    """litgpt adds its prompts' boolean mask to capped scores (+1 for all, which the softmax cancels)."""
    model = model_of(**SOFTCAP)
    fused = accelerate(copy.deepcopy(model))
    torch.testing.assert_close(step(fused)[0], step(model)[0], rtol=0, atol=1e-5)


def test_adapter_v2():
    model = model_of(room=adapter_v2)
    fused = accelerate(copy.deepcopy(model))
    assert fused.state_dict().keys() == model.state_dict().keys()
    logits, gradients = step(fused)
    expected, expected_gradients = step(model)
    assert (logits - expected).abs().max() <= 1e-5
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-6)


def test_training_goes_on_where_litgpts_stops():
    broken = model_of()
    step(broken)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        step(broken)
    silent = model_of()
    with torch.no_grad():
        silent(tokens())
    assert not any("adapter_wte" in name for name in step(silent)[1])

    model = accelerate(model_of())
    expected = step(model)[1]
    with torch.no_grad():
        model(tokens())
    for _ in range(2):
        gradients = step(model)[1]
        assert len(gradients) == 6 and all(torch.equal(gradients[name], expected[name]) for name in expected)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    losses = []
    for _ in range(5):
        optimizer.step()
        losses.append(step(model)[0])
    assert not torch.equal(losses[0], losses[-1])


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_with_a_cache_is_the_whole_pass(kind):
    model = accelerate(model_of(KINDS[kind]), "blocked").eval()
    ids = tokens(rows=1)
    with torch.no_grad():
        expected = model(ids)
        model.set_kv_cache(1)
        found = [model(ids[:, :6], torch.arange(6))]
        found += [model(ids[:, i : i + 1], torch.tensor([i])) for i in range(6, ids.shape[1])]
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=0, atol=1e-5)
    with torch.no_grad():  # a changed prompt is seen by the next token
        model.transformer.h[2].attn.adapter_wte.weight.mul_(-2)
        assert not torch.equal(model(ids[:, -1:], torch.tensor([11])), found[-1])


def test_another_layout_is_seen_by_the_next_token():
    ids = tokens(rows=1)
    model = accelerate(model_of(), "interleaved").eval()
    with torch.no_grad():
        model.set_kv_cache(1)
        model(ids[:, :6], torch.arange(6))
        copied = copy.deepcopy(model)  # the same cache, and nothing kept of its prompts
        found, expected = (accelerate(m, "blocked")(ids[:, 6:7], torch.tensor([6])) for m in (model, copied))
    assert torch.equal(found, expected)


def test_at_gate_0_it_is_the_base():
    model = model_of(gates=0.0)
    base = copy.deepcopy(model)
    for layer in base.modules():
        if type(layer) is adapter.CausalSelfAttention:
            layer.__class__ = CausalSelfAttention
    logits, gradients = step(accelerate(model, "blocked"))
    assert torch.equal(logits, base(tokens()))
    assert all(bool(gradient.any()) == name.endswith("gating_factor") for name, gradient in gradients.items())


def test_restore_files_and_messages(tmp_path):
    model = model_of()
    expected = copy.deepcopy(model)(tokens())
    state = {name: p for name, p in model.state_dict().items() if "adapter_wte" in name or "gating" in name}
    torch.save({"model": state}, tmp_path / "lit_model.pth.adapter")
    loaded = checkpoints.load_adapter(tmp_path / "lit_model.pth.adapter", layout="interleaved")
    assert loaded.layers == (1, 2, 3) and loaded.num_heads == 4
    checkpoints.save_adapter(tmp_path / "back", loaded, "litgpt")
    fresh = accelerate(model_of(gates=0.0))
    fresh.load_state_dict(torch.load(tmp_path / "back")["model"], strict=False)
    torch.testing.assert_close(fresh(tokens()), expected, rtol=0, atol=1e-5)

    accelerate(accelerate(model), "blocked")
    assert restore(model) is model and type(model.transformer.h[2].attn) is adapter.CausalSelfAttention
    assert torch.equal(model(tokens()), expected)
    with pytest.raises(ValueError, match="layout must be one of blocked, interleaved, got 'other'"):
        accelerate(model, "other")
    with pytest.raises(TypeError, match="expected a litgpt.adapter.GPT or litgpt.adapter_v2.GPT, got Linear"):
        accelerate(torch.nn.Linear(2, 2))

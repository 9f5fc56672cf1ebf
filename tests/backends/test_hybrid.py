"""What holds for `hybrid` beside the cases of all backends: the vendor's bits, its one more rounding, its refusals.

On CPU tensors the vendor is PyTorch's CPU kernel, and Triton's interpreter runs the prompt kernels.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from zinit_kernels import explain, zero_init_attention
from zinit_kernels.backends import fused, hybrid
from zinit_kernels.backends.triton import INTERPRETED
from zinit_kernels.testing import Case, make_inputs

CASE = Case("case", heads_q=4, heads_kv=2, seqlens_q=(45,), head_dim=24)


def sdpa(query, key, value):
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def bits(tensor):
    return tensor.contiguous().view(torch.int16 if tensor.element_size() == 2 else torch.int32)


@pytest.mark.interpreted
@pytest.mark.parametrize("way", ["gate_zero", "no_row", "no_prompts"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_without_prompt_effect_it_has_the_vendors_bits(way, dtype):
    """Output and gradients of query, key and value, zeros with their signs."""
    inputs = make_inputs(CASE, dtype)
    tensors = inputs.tensors
    with torch.no_grad():
        tensors["value"][..., 0] = -0.0
    if way == "gate_zero":
        tensors["gate"] = torch.zeros(4, requires_grad=True)
    elif way == "no_row":
        inputs.options["prompt_index"] = torch.tensor([-1, -1], dtype=torch.int32)
    else:
        tensors.update(prompt_key=None, prompt_value=None, gate=None)
    plain = [tensors[name] for name in ("query", "key", "value")]
    out, _ = inputs.call("hybrid", return_lse=False)
    expected = sdpa(*plain)
    assert torch.equal(bits(out), bits(expected))
    weights = torch.randn(out.shape).to(dtype)
    for ours, theirs in zip(*(torch.autograd.grad(o, plain, weights) for o in (out, expected)), strict=True):
        assert torch.equal(bits(ours), bits(theirs))


@pytest.mark.interpreted
@pytest.mark.parametrize("size", [0.3, 8.0])
def test_the_output_is_rounded_once_more_than_the_vendors(size):
    """out = round(vendor's out + term), and taking the term off again gives the vendor's out to half a unit of each."""
    from zinit_kernels.backends.triton import prompt_launch

    inputs = make_inputs(CASE, torch.float16)
    call = inputs.canonical()
    call = call._replace(gate=torch.full_like(call.gate, size), tanh_gate=False)
    call = type(call)(*(t.detach() if isinstance(t, torch.Tensor) else t for t in call))
    tokens = sdpa(call.query, call.key, call.value)
    group = call.query.shape[1] // call.key.shape[1]
    key, value = (t.double().repeat_interleave(group, 1) for t in (call.prompt_key, call.prompt_value))
    term = size * ((call.scale * call.query.double() @ key.mT).softmax(-1) @ value)
    out = hybrid.attention(call)[0]

    def unit(tensor):
        """Of a number's last place in float16."""
        return 2.0 ** (torch.frexp(tensor.double().abs().clamp(min=2.0**-14))[1].double() - 11)

    exact = tokens.double() + term
    rough = 2e-3 * size  # the weights are rounded to float16 before they meet the values
    assert ((out.double() - exact).abs() <= 0.5 * unit(out) + rough).all()
    found = prompt_launch.add_prompts(call, out, torch.empty_like(tokens), subtracts=True)
    assert ((found.double() - tokens.double()).abs() <= 0.51 * (unit(out) + unit(found))).all()


@pytest.mark.interpreted
def test_the_prompt_term_is_added_in_place():
    """No second output: the vendor's memory is what the caller gets, where it is stored as operators promise."""
    from zinit_kernels.backends.hybrid import run, vendor

    made = []
    inputs = make_inputs(Case("case", seqlens_q=(20,), head_dim=16, layout="token_major"), torch.float32)
    call = inputs.canonical()
    arguments = [t.detach() if isinstance(t, torch.Tensor) else t for t in fused.CALL.arguments(call)]

    def forward(*given):
        out, lse = vendor.CPU.forward(*given)
        made.append(vendor.token_major_like(out).copy_(out))
        return made[0], lse

    original = vendor.of_forward
    vendor.of_forward = lambda *given: vendor.CPU._replace(forward=forward)
    try:
        out, _ = run.forward(*arguments)
    finally:
        vendor.of_forward = original
    assert out.data_ptr() == made[0].data_ptr()


@pytest.mark.interpreted
def test_the_log_sum_exp():
    inputs = make_inputs(CASE, torch.float32)
    with torch.no_grad():
        _, lse = inputs.call("hybrid")
        _, expected = inputs.call("reference")
    torch.testing.assert_close(lse, expected)
    assert lse.is_contiguous()
    with pytest.raises(ValueError, match="takes no gradient of the log-sum-exp"):
        inputs.call("hybrid")


@pytest.mark.interpreted
def test_a_gradient_of_the_log_sum_exp_is_right_all_the_same():
    """A kept call does not ask `why_not` again: its backward is then Triton's."""
    found = []
    for attend in (hybrid.attention, lambda call: fused.attention(call, "triton")):
        inputs = make_inputs(CASE, torch.float32)
        out, lse = attend(inputs.canonical())
        wanted = [t for t in inputs.tensors.values() if t is not None]
        found.append(torch.autograd.grad(out.sum() + (lse * lse).sum(), wanted))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.interpreted
def test_backward_repeats_its_bits():
    found = []
    for _ in range(2):
        inputs = make_inputs(CASE, torch.float16)
        out, _ = inputs.call("hybrid", return_lse=False)
        wanted = [t for t in inputs.tensors.values() if t is not None]
        found.append(torch.autograd.grad(out.float().square().sum(), wanted))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.interpreted
def test_nan_in_rows_that_no_sequence_names():
    inputs = make_inputs(Case("case", table="indexed", batch=3, seqlens_q=(20,), head_dim=16), torch.float32)
    inputs.options["prompt_index"] = torch.tensor([1, -1, 1], dtype=torch.int32)
    with torch.no_grad():
        for name in ("prompt_key", "prompt_value"):
            inputs.tensors[name][0] = float("nan")
    out, _ = inputs.call("hybrid", return_lse=False)
    wanted = [t for t in inputs.tensors.values() if t is not None]
    grads = torch.autograd.grad(out.sum(), wanted)
    assert out.isfinite().all() and all(grad.isfinite().all() for grad in grads)


@pytest.mark.interpreted
def test_second_derivatives_are_those_of_the_formula():
    found = []
    for backend in ("hybrid", "reference"):
        inputs = make_inputs(Case("case", seqlens_q=(9,), head_dim=8), torch.float32)
        out, _ = inputs.call(backend, return_lse=False)
        wanted = [t for t in inputs.tensors.values() if t is not None]
        grads = torch.autograd.grad(out.square().sum(), wanted, create_graph=True)
        found.append(torch.autograd.grad(sum(grad.square().sum() for grad in grads), wanted))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.interpreted
def test_compiles_as_one_graph():
    inputs = make_inputs(Case("case", seqlens_q=(17,), head_dim=16), torch.float32)
    tensors = list(inputs.tensors.values())[:6]

    def attend(*given):
        return zero_init_attention(*given, **inputs.options, backend="hybrid") * 2

    eager = attend(*tensors)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")(*tensors)
    torch.testing.assert_close(compiled, eager)
    assert compiled.stride() == eager.stride()
    for ours, theirs in zip(
        *(torch.autograd.grad(out.sum(), tensors) for out in (compiled, eager)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
        assert ours.stride() == theirs.stride()


@pytest.mark.interpreted
@pytest.mark.parametrize("case", [
    Case("case", seqlens_q=(9,), head_dim=16, heads_kv=2), Case("token_major", seqlens_q=(9,), layout="token_major"),
    Case("no_prompt", table="none", seqlens_q=(9,), head_dim=16),
], ids=str)  # fmt: skip
def test_opcheck(case):
    """What the operators return is new memory, each for itself, with the strides that their fake kernels promise."""
    inputs = make_inputs(case, torch.float32)
    args = tuple(
        a.detach() if isinstance(a, torch.Tensor) else a for a in fused.CALL.arguments(inputs.canonical())
    )
    torch.library.opcheck(torch.ops.zinit.forward_hybrid.default, args)
    out, lse = torch.ops.zinit.forward_hybrid(*args)
    for needs in (0b111111, 0b111000, 0b000001):
        given = (torch.randn_like(out), None, out, lse, *args, needs)
        torch.library.opcheck(torch.ops.zinit.backward_hybrid.default, given)


REFUSED = {
    "packed": (Case("packed", packed=True, seqlens_q=(5, 7)), "these are packed"),
    "sinks": (Case("sinks", sinks=True), "has no sinks"),
    "softcap": (Case("softcap", softcap=2.0), "has no soft cap"),
    "padding": (Case("padding", mask="padding"), "there is a key-padding mask"),
    "dense": (Case("dense", mask="dense", causal=False), "attn_mask depends on the query"),
    "window": (Case("window", window=(5, -1)), r"has no window, got \(5, 0\)"),
    "scale": (Case("scale", scale=-0.5), "a scale above 0, got -0.5"),
    "scale_0": (Case("scale", scale=0.0), "a scale above 0, got 0.0"),
    "no_keys": (Case("no_keys", seqlens_q=(9,), seqlens_k=(0,), causal=False), "got 9 queries and 0 keys"),
}


@pytest.mark.interpreted
@pytest.mark.parametrize("name", REFUSED)
def test_what_the_vendor_cannot_is_refused_by_its_name(name):
    case, reason = REFUSED[name]
    with pytest.raises(ValueError, match=f"backend 'hybrid' cannot run this call: .*{reason}"):
        make_inputs(case, torch.float32).call("hybrid", return_lse=False)


@pytest.mark.interpreted
def test_a_causal_mask_that_is_aligned_at_the_last_key_is_refused():
    inputs = make_inputs(Case("cross", seqlens_q=(5,), seqlens_k=(9,), causal=False), torch.float32)
    tensors = list(inputs.tensors.values())[:6]
    found = explain(*tensors, attn_mask=causal_lower_right(5, 9))
    assert "as many queries as keys, got 5 and 9" in found["hybrid"] and found["triton"] == "usable"
    assert explain(*tensors)["hybrid"] == "usable"


@pytest.mark.interpreted
def test_it_is_listed_and_chosen_by_nobody_but_the_caller():
    inputs = make_inputs(CASE, torch.float32)
    tensors = list(inputs.tensors.values())[:6]
    found = explain(*tensors, **inputs.options)
    assert found["hybrid"] == "usable" and found.selected != "hybrid"
    assert explain(*tensors, **inputs.options, backend="hybrid").selected == "hybrid"


def test_it_needs_a_gpu():
    if INTERPRETED:
        pytest.skip("the interpreter takes CPU tensors")
    inputs = make_inputs(CASE, torch.float32)
    found = explain(*list(inputs.tensors.values())[:6], **inputs.options)["hybrid"]
    assert "the tensors are on cpu" in found or "triton is not installed" in found


ON_GPU = {
    "float32": ({"dtype": torch.float32}, 90, "takes bfloat16 and float16, the tensors are float32"),
    "head_dim": ({"head_dim": 20}, 90, "a multiple of 8, got 20"),
    "backward": ({"head_dim": 200}, 86, "no backward for head_dim 193 to 224 on sm_86, got 200"),
    "strides": ({"step": 4}, 90, "the rows of query must start at multiples of 16 bytes"),
    "heads": ({"heads": 70000, "tokens": 1, "head_dim": 8}, 90, "up to 65535 sequences and heads"),
    "hopper": ({"head_dim": 200}, 90, ""),
    "usual": ({}, 86, ""),
}


@pytest.mark.parametrize("name", ON_GPU)
def test_what_holds_on_a_gpu(name, monkeypatch):
    given, arch, reason = ON_GPU[name]
    options = {"dtype": torch.bfloat16, "head_dim": 64, "step": 8, "heads": 2, "tokens": 4} | given
    heads, head_dim = options["heads"], options["head_dim"]

    def tensor():
        memory = torch.zeros(
            1, options["tokens"], heads * (head_dim + options["step"]), dtype=options["dtype"]
        )
        return memory.unflatten(2, (heads, -1))[..., :head_dim].transpose(1, 2)

    call = make_inputs(CASE, torch.bfloat16).canonical()
    call = call._replace(**{part: tensor().requires_grad_() for part in ("query", "key", "value")})
    monkeypatch.setattr(fused, "arch_of", lambda device: arch)
    monkeypatch.setattr(hybrid, "_FLASH_IS_BUILT", True)
    found = hybrid._why_not_on_chip(call, "cuda")
    assert reason in found and bool(reason) == bool(found)


def test_without_flash_attention_it_says_so(monkeypatch):
    monkeypatch.setattr(hybrid, "_FLASH_IS_BUILT", False)
    call = make_inputs(CASE, torch.bfloat16).canonical()
    assert "was built without flash-attention" in hybrid._why_not_on_chip(call, "cuda")

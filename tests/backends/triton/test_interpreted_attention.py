"""The Triton kernels of forward and backward on the CPU, under Triton's interpreter.

The interpreter is slow, so the named cases run with fewer heads and shorter sequences. Its tiles are 32 x 32, so 70
tokens still take whole, masked and cut tiles. bfloat16 queries are left out: the interpreter computes them on bit
patterns (triton issue 11584).
"""

from dataclasses import replace

import pytest
import torch
from far_memory import far_apart

from zinit_kernels import prompt_attention_, zero_init_attention
from zinit_kernels.call import CALL
from zinit_kernels.testing import CASES, Case, check_case, gradients, make_inputs
from zinit_kernels.testing.check import projections

LONGEST = 70
HALF_PRECISION = (
    "plain", "odd", "multi_query", "window_both_sides", "left_padding", "prompt_length_128", "indexed",
    "float32_prompts", "packed_grouped", "packed_bottom_right",
)  # fmt: skip


def short(case: Case) -> Case:
    """The case with at most LONGEST tokens a sequence."""
    lengths_k = case.seqlens_k and tuple(min(n, LONGEST) for n in case.seqlens_k)
    return replace(case, seqlens_q=tuple(min(n, LONGEST) for n in case.seqlens_q), seqlens_k=lengths_k)


def small(case: Case) -> Case:
    """A short case with at most two query heads per key head, and two key heads."""
    heads_kv, group = min(case.heads_kv, 2), case.heads_q // case.heads_kv
    heads_kv = 1 if group == 1 and case.gate != "per_row" else heads_kv
    return replace(short(case), heads_q=heads_kv * min(group, 2), heads_kv=heads_kv)


SMALL = [
    *(small(case) for case in CASES),
    Case(
        "window_with_whole_tiles",
        batch=1,
        heads_q=1,
        heads_kv=1,
        seqlens_q=(150,),
        window=(75, -1),
        head_dim=16,
    ),
    Case(
        "many_tiles",
        batch=1,
        heads_q=2,
        heads_kv=1,
        seqlens_q=(150,),
        seqlens_k=(130,),
        causal=False,
        head_dim=16,
    ),
    Case("negative_scale", batch=1, heads_q=2, heads_kv=1, seqlens_q=(40,), head_dim=16, scale=-0.3),
    Case("zero_scale", batch=1, heads_q=1, heads_kv=1, seqlens_q=(40,), head_dim=16, scale=0.0),
    Case("large_scores", batch=1, heads_q=1, heads_kv=1, seqlens_q=(70,), head_dim=16, scale=4.0),
    Case(
        "all_at_once", batch=3, heads_q=4, heads_kv=2, seqlens_q=(50,), window=(20, -1), mask="left_padding",
        table="indexed", gate="per_row", prompt_length=33, head_dim=48, layout="sliced", scale=0.3,
    ),
    Case(
        "packed_at_once", packed=True, heads_q=4, heads_kv=2, seqlens_q=(0, 41, 9), seqlens_k=(3, 50, 1),
        window=(15, -1), table="indexed", prompt_length=65, head_dim=20,
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_float32(case):
    check_case(case, torch.float32, "triton")


@pytest.mark.parametrize("case", [short(case) for case in CASES if case.name in HALF_PRECISION], ids=str)
def test_float16(case):
    """With all heads: the rule compares with eager's largest error, and of one gate's gradient that is luck."""
    check_case(case, torch.float16, "triton")


def test_offsets_beyond_int32():
    case = Case("far", batch=2, heads_q=2, heads_kv=2, seqlens_q=(35,), head_dim=16)
    results = []
    for move in (False, True):
        inputs = make_inputs(case, torch.float16)
        if move:
            for name, dim in (("query", 0), ("key", 1), ("value", 0)):
                inputs.tensors[name] = far_apart(inputs.tensors[name].detach(), dim).requires_grad_()
        outputs = inputs.call("triton")
        results.append({"out": outputs[0].detach(), **gradients(outputs, inputs)})
    for name, near in results[0].items():
        assert torch.equal(near, results[1][name]), name


def test_every_kernel_has_a_range_for_profilers():
    inputs = make_inputs(
        Case("profiled", batch=1, heads_q=1, heads_kv=1, seqlens_q=(5,), head_dim=16), torch.float32
    )
    with torch.profiler.profile() as profile:
        inputs.call("triton")[0].sum().backward()
    assert {event.name for event in profile.events() if event.name.startswith("zinit.")} == {
        "zinit.forward", "zinit.backward.prompt_sums", "zinit.backward.prompt_finish", "zinit.backward.key_value",
        "zinit.backward.query",
    }  # fmt: skip


SUBSET = Case("subset", batch=1, heads_q=2, heads_kv=1, seqlens_q=(50,), head_dim=16)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3, 4, 5), (5,), (4,), (0, 5), (1, 2)], ids=str)
def test_gradients_of_some_inputs_are_those_of_all_bit_for_bit(wanted):
    inputs = make_inputs(SUBSET, torch.float32)
    everything = gradients(inputs.call("triton"), inputs)
    some = inputs.to(None)
    leaves = [tensor.requires_grad_(i in wanted) for i, tensor in enumerate(some.tensors.values())]
    outputs = some.call("triton")
    loss = sum((o.double() * w).sum() for o, w in zip(outputs, projections(outputs), strict=True))
    found = torch.autograd.grad(loss, [leaves[i] for i in wanted], allow_unused=True)
    for i, grad in zip(wanted, found, strict=True):
        name = list(everything)[i]
        assert torch.equal(everything[name], torch.zeros_like(leaves[i]) if grad is None else grad), name


def test_what_is_not_wanted_is_not_launched(monkeypatch):
    """The lowest adapted layer of a frozen model wants prompt and gate gradients alone."""
    from zinit_kernels.backends.triton import launch

    class Refuses:
        def __getitem__(self, grid):
            raise AssertionError("a token gradient kernel was launched")

    monkeypatch.setattr(launch, "zinit_grad_key_value_kernel", Refuses())
    monkeypatch.setattr(launch, "zinit_grad_query_kernel", Refuses())
    inputs = make_inputs(SUBSET, torch.float32)
    tensors = inputs.tensors
    for name in ("query", "key", "value"):
        tensors[name].requires_grad_(False)
    inputs.call("triton")[0].sum().backward()
    assert all(tensors[name].grad.abs().sum() > 0 for name in ("prompt_key", "prompt_value", "gate"))
    tensors["query"].requires_grad_(True)
    with pytest.raises(AssertionError, match="launched"):
        inputs.call("triton")[0].sum().backward()


@pytest.mark.parametrize("way", ["gate_zero", "no_row", "no_prompts"])
def test_without_prompt_effect_it_is_plain_attention_bit_for_bit(way):
    inputs = make_inputs(replace(SUBSET, name="exact"), torch.float16)
    plain = inputs.to(None)
    plain.tensors.update(prompt_key=None, prompt_value=None, gate=None)
    if way == "gate_zero":
        inputs.tensors["gate"] = torch.zeros(2, requires_grad=True)
    elif way == "no_row":
        inputs.options = {**inputs.options, "prompt_index": torch.full((1,), -1, dtype=torch.int32)}
    else:
        for name in ("prompt_key", "prompt_value"):
            inputs.tensors[name] = inputs.tensors[name][:, :, :0].detach().requires_grad_()
    outputs = [chosen.call("triton") for chosen in (inputs, plain)]
    for ours, expected in zip(*outputs, strict=True):
        assert torch.equal(ours, expected)
    found = [gradients(out, chosen) for out, chosen in zip(outputs, (inputs, plain), strict=True)]
    for name in ("query", "key", "value"):
        assert torch.equal(found[0][name], found[1][name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("largest", [2.0**20, 2.0**26, 2.0**29, 2.0**33])
def test_scores_of_any_size_give_the_right_weights(largest, dtype):
    """Whole numbers, whose scores every float32 holds: each row's largest key alone has weight, or several share it."""
    random = torch.Generator().manual_seed(0)
    query, key = (torch.randint(-4, 5, (1, 2, 70, 16), generator=random).to(dtype) for _ in range(2))
    value = torch.randn(1, 2, 70, 16, generator=random).to(dtype)
    options = {"is_causal": True, "scale": 0.3 * largest, "return_lse": True}
    out, lse = zero_init_attention(query, key, value, **options, backend="triton")
    exact = [t.double() for t in (query, key, value)]
    expected, expected_lse = zero_init_attention(*exact, **options, backend="reference")
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=0, check_dtype=False)


def test_huge_finite_mask_is_not_minus_infinity():
    inputs = make_inputs(Case("finfo_min", causal=False, seqlens_q=(19,), table="none"), torch.float32)
    inputs.options["attn_mask"] = torch.full((2, 1, 1, 19), torch.finfo(torch.float32).min)
    out, _ = inputs.call("triton")
    torch.testing.assert_close(out, inputs.tensors["value"].mean(2, keepdim=True).expand_as(out))
    assert all(
        torch.isfinite(grad).all()
        for grad in torch.autograd.grad(out.sum(), list(inputs.tensors.values())[:3])
    )


@pytest.mark.parametrize("gate", [-9.0, -1.0, -0.3, -1e-4, 1e-6, 0.5, 0.99, 1.01, 3.0])
def test_tanh_of_the_gate_keeps_its_digits(gate):
    """No keys: the output is tanh(gate) times the one prompt's value."""
    query, none = torch.randn(1, 1, 1, 16), torch.zeros(1, 1, 0, 16)
    prompt = torch.ones(1, 1, 1, 16)
    out = zero_init_attention(query, none, none, prompt, prompt, gate, backend="triton")
    expected = torch.tensor(gate).double().tanh().float().expand(1, 1, 1, 16)
    torch.testing.assert_close(out, expected, rtol=4e-7, atol=0)


@pytest.mark.parametrize("packed", [False, True])
def test_prompt_attention_adds_the_branch_in_place_with_gradients(packed):
    lengths = (7, 12) if packed else (19,)
    case = Case(
        "branch", packed=packed, seqlens_q=lengths, heads_q=2, heads_kv=1, table="per_sample", head_dim=16
    )
    results = []
    for backend in ("triton", "reference"):
        tensors = make_inputs(case, torch.float32).tensors
        query, prompts, gate = (
            tensors["query"],
            [tensors["prompt_key"], tensors["prompt_value"]],
            tensors["gate"],
        )
        options = {"cu_seqlens": torch.tensor([0, 7, 19], dtype=torch.int32)} if packed else {}
        laid_out, rows = query, prompts
        if not packed:
            laid_out, rows = query.transpose(1, 2), [p.transpose(1, 2) for p in prompts]
        out = prompt_attention_(torch.ones_like(laid_out), laid_out, *rows, gate, **options, backend=backend)
        weight = torch.arange(out.numel()).reshape(out.shape) % 7
        results.append((out, *torch.autograd.grad((out * weight).sum(), [query, *prompts, gate])))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_numbers_that_lead_outside_a_tensor_are_named_and_the_kernels_cut_them():
    inputs = make_inputs(
        small(Case("indexed", table="indexed", batch=3, seqlens_q=(5,), head_dim=16)), torch.float32
    )
    inputs.options["prompt_index"] = torch.tensor([0, 1, 3], dtype=torch.int32)
    with pytest.raises(ValueError, match="prompt_index.*3"):
        inputs.call("triton")
    args = [a.detach() if isinstance(a, torch.Tensor) else a for a in CALL.arguments(inputs.canonical())]
    args[3:6] = (torch.nan_to_num(a, nan=1.0) for a in args[3:6])  # unused rows are poison, and NaN != NaN
    out, _ = torch.ops.zinit.forward_triton(*args)
    args[6] = torch.tensor([0, 1, -1], dtype=torch.int32)
    assert torch.equal(out, torch.ops.zinit.forward_triton(*args)[0])


OPCHECKED = [
    Case("plain", batch=1, heads_q=2, heads_kv=1, seqlens_q=(5,), head_dim=16),
    Case("packed", packed=True, heads_q=1, heads_kv=1, seqlens_q=(3, 4), head_dim=16, layout="sliced"),
]


@pytest.mark.parametrize("case", OPCHECKED, ids=str)
def test_opcheck_forward_and_backward(case):
    inputs = make_inputs(case, torch.float32)
    args = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in CALL.arguments(inputs.canonical()))
    torch.library.opcheck(torch.ops.zinit.forward_triton.default, args)
    out, lse = torch.ops.zinit.forward_triton(*args)
    for needs in (0b111111, 0b111000):
        backward_args = (torch.randn_like(out), torch.randn_like(lse), out, lse, *args, needs)
        torch.library.opcheck(torch.ops.zinit.backward_triton.default, backward_args)


@pytest.mark.parametrize("case", OPCHECKED, ids=str)
def test_compiles_as_one_graph_with_backward(case):
    inputs = make_inputs(case, torch.float32)

    def step(tensors):
        inputs.tensors = dict(zip(inputs.tensors, tensors, strict=True))
        return inputs.call("triton")

    tensors = list(inputs.tensors.values())
    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        out, lse = run(tensors)
        results.append((out, lse, *torch.autograd.grad((out * out).sum() + lse.sum(), tensors)))
    for eager, traced in zip(*results, strict=True):
        assert torch.equal(eager, traced)

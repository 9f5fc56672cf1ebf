"""What only the Triton kernels of forward and backward have, under Triton's interpreter. tests/backends: all others."""

import pytest
import torch
from backend_cases import small
from far_memory import far_apart

from zinit_kernels import prompt_attention_, zero_init_attention
from zinit_kernels.call import CALL
from zinit_kernels.testing import Case, gradients, make_inputs

pytestmark = pytest.mark.interpreted


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


def test_what_is_not_wanted_is_not_launched(monkeypatch):
    """The lowest adapted layer of a frozen model wants prompt and gate gradients alone."""
    from zinit_kernels.backends.triton import launch

    class Refuses:
        arg_names = ()

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
    call = inputs.canonical()
    for tensor in (call.prompt_key, call.prompt_value, call.gate):
        tensor.detach().nan_to_num_(nan=1.0)  # unused rows are poison, and NaN != NaN
    none = call._replace(prompt_index=torch.tensor([0, 1, -1], dtype=torch.int32))
    with torch.no_grad():
        results = [torch.ops.zinit.forward_triton(*CALL.arguments(c))[0] for c in (call, none)]
    assert torch.equal(*results)


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

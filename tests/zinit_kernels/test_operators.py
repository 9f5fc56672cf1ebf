"""What torch.library, torch.compile and autograd expect of the registered operators."""

import pytest
import torch

from zinit_kernels import (
    prompt_attention_,
    zero_init_attention,
    zero_init_attention_varlen,
    zero_init_attention_with_kvcache,
)
from zinit_kernels.arguments import from_cache
from zinit_kernels.call import CALL
from zinit_kernels.testing import CacheCase, Case, gradients, make_cache_arguments, make_inputs

pytestmark = pytest.mark.native
OPCHECKED = [
    Case("plain", heads_kv=2, seqlens_q=(19,), head_dim=16),
    Case(
        "padded_indexed",
        mask="padding",
        table="indexed",
        batch=3,
        seqlens_q=(19,),
        head_dim=16,
        gate="per_row",
    ),
    Case("packed", packed=True, seqlens_q=(5, 12), head_dim=16, layout="sliced"),
    Case("no_prompt", table="none", seqlens_q=(9,), head_dim=16),
]


@pytest.mark.parametrize("case", OPCHECKED, ids=str)
def test_opcheck_forward_and_backward(case):
    inputs = make_inputs(case, torch.float32)
    # the raw operator is not differentiable (autograd sits outside it), so it is checked on plain tensors
    args = tuple(
        torch.nan_to_num(a.detach()) if torch.is_tensor(a) else a for a in CALL.arguments(inputs.canonical())
    )
    torch.library.opcheck(torch.ops.zinit.forward_cpu.default, args)
    out, lse = torch.ops.zinit.forward_cpu(*args)
    for needs in (0b111111, 0b111000, 0b000001):
        backward_args = (torch.randn_like(out), torch.randn_like(lse), out, lse, *args, needs)
        torch.library.opcheck(torch.ops.zinit.backward_cpu.default, backward_args)


@pytest.mark.parametrize(
    "case",
    [CacheCase("contiguous", head_dim=16), CacheCase("paged", page_size=16, head_dim=16, rotary_dim=16)],
    ids=str,
)
def test_opcheck_decode(case):
    given = make_cache_arguments(case, torch.float32)
    for name in ("k_cache", "v_cache"):
        given[name] = torch.nan_to_num(given[name])
    defaults = {**zero_init_attention_with_kvcache.__kwdefaults__, **given}
    defaults.pop("return_lse")
    defaults.pop("backend")
    torch.library.opcheck(torch.ops.zinit.decode_cpu.default, tuple(from_cache(**defaults)))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("case", OPCHECKED, ids=str)
def test_compiles_as_one_graph_with_backward(case, dynamic):
    torch._dynamo.reset()
    inputs = make_inputs(case, torch.float32)
    function = zero_init_attention_varlen if case.packed else zero_init_attention

    def step(tensors, options):
        out, lse = function(*tensors, **options, return_lse=True)
        return out * 2, lse

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    results = []
    for run in (step, compiled):
        chosen = inputs.to(None)
        out, lse = run(list(chosen.tensors.values()), chosen.options)
        outputs = (out.transpose(0, 1)[None], lse[None]) if case.packed else (out, lse)
        results.append((*outputs, *gradients(outputs, chosen).values()))
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", ["append", "rotary", "read"])
@pytest.mark.parametrize("marked", [False, True])
def test_the_cache_function_compiles_for_sizes_that_change(kind, marked):
    """One graph for all: batch, new tokens and slots may change, and be as many as there are heads or sequences."""
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    def step(q, key, value, k, v, lengths, cos, sin, prompt, gate):
        more = {} if kind == "read" else {"k": k, "v": v}
        more |= (
            {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": False} if kind == "rotary" else {}
        )
        return zero_init_attention_with_kvcache(
            q,
            key,
            value,
            prompt_k=prompt,
            prompt_v=prompt,
            gate=gate,
            cache_seqlens=lengths,
            causal=True,
            **more,
        )

    compiled = torch.compile(step, fullgraph=True, backend=count)
    x = torch.randn
    for batch, slots, tokens in ((3, 40, 5), (7, 20, 2), (2, 33, 4), (4, 16, 3)):
        given = [
            x(batch, tokens, 4, 16),
            x(batch, slots, 2, 16),
            x(batch, slots, 2, 16),
            x(batch, tokens, 2, 16),
        ]
        given += [
            x(batch, tokens, 2, 16),
            torch.full((batch,), 7, dtype=torch.int32),
            x(slots, 8),
            x(slots, 8),
        ]
        if marked:
            for tensor in given:
                for dim in range(min(tensor.dim(), 2) - (tensor is given[6] or tensor is given[7])):
                    torch._dynamo.mark_dynamic(tensor, dim)
        given += [x(1, 5, 2, 16), x(4)]
        copies = [tensor.clone() for tensor in given]
        assert torch.equal(compiled(*given), step(*copies))
        assert torch.equal(given[1], copies[1]) and torch.equal(given[2], copies[2])
    assert len(graphs) == 1 if marked else len(graphs) <= 3


def test_the_composed_path_compiles_for_sizes_that_change():
    torch._dynamo.reset()
    compiled = torch.compile(zero_init_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (5, 9):
        query, key = torch.randn(2, 4, tokens, 16), torch.randn(2, 2, tokens, 16)
        prompts, mask = torch.randn(1, 2, 3, 16), torch.randn(tokens, tokens)
        args = (query, key, key, prompts, prompts, 0.5)
        out = compiled(*args, attn_mask=mask, backend="composed")
        torch.testing.assert_close(out, zero_init_attention(*args, attn_mask=mask, backend="reference"))


def test_compiles_with_one_tensor_in_two_places():
    torch._dynamo.reset()
    x = torch.randn(9, 4, 16, requires_grad=True)
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32)

    def step(x):
        return zero_init_attention_varlen(
            x, x, x, None, None, None, cu_seqlens, cu_seqlens, 5, 5, causal=True
        )

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        out = run(x)
        results.append((out, *torch.autograd.grad(out.square().sum(), x)))
    for eager, traced in zip(*results, strict=True):
        assert torch.equal(eager, traced)


@pytest.mark.parametrize("page_size", [0, 16])
def test_cache_function_compiles_as_one_graph_and_writes_the_caches(page_size):
    torch._dynamo.reset()
    case = CacheCase("compiled", page_size=page_size, head_dim=16, rotary_dim=16)

    def step(given):
        return zero_init_attention_with_kvcache(**given) + 1

    eager, traced = make_cache_arguments(case, torch.float32), make_cache_arguments(case, torch.float32)
    expected = step(eager)
    out = torch.compile(step, fullgraph=True, backend="aot_eager")(traced)
    assert torch.equal(out, expected)
    for name in ("k_cache", "v_cache"):
        assert torch.equal(traced[name].nan_to_num(7.0), eager[name].nan_to_num(7.0))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_compiles_where_dynamo_cannot_ask_for_autocast(backend, monkeypatch):
    """As with torch 2.11, which the package accepts."""
    torch._dynamo.reset()
    asked = torch.compiler.disable(torch.amp.is_autocast_available)
    monkeypatch.setattr(torch.amp, "is_autocast_available", asked)
    inputs = make_inputs(OPCHECKED[0], torch.float32)
    compiled = torch.compile(lambda: inputs.call(backend)[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(), inputs.call(backend)[0])


def test_inductor_runs_the_same_kernel():
    torch._dynamo.reset()
    inputs = make_inputs(OPCHECKED[0], torch.float32)
    tensors = list(inputs.tensors.values())
    compiled = torch.compile(lambda *t: zero_init_attention(*t, is_causal=True), fullgraph=True)
    torch.testing.assert_close(compiled(*tensors), zero_init_attention(*tensors, is_causal=True))


def test_export_keeps_the_operator():
    class Attention(torch.nn.Module):
        def forward(self, *tensors):
            return zero_init_attention(*tensors, is_causal=True)

    inputs = make_inputs(OPCHECKED[0], torch.float32)
    program = torch.export.export(Attention(), tuple(t.detach() for t in inputs.tensors.values()))
    assert "zinit.forward_cpu" in str(program.graph)


@pytest.mark.parametrize("packed", [False, True])
def test_prompt_attention_adds_the_branch_in_place_with_gradients(packed):
    case = Case(
        "branch", packed=packed, seqlens_q=(7, 12) if packed else (19,), heads_kv=2, table="per_sample"
    )
    whole, halves = make_inputs(case, torch.float32), make_inputs(case, torch.float32)
    names = ("prompt_key", "prompt_value")
    expected, _ = whole.call("cpu")
    plain = halves.to(None)
    plain.tensors.update(prompt_key=None, prompt_value=None, gate=None)
    query, gate = halves.tensors["query"], halves.tensors["gate"]
    plain.tensors["query"] = query
    token_branch, _ = plain.call("cpu")
    if packed:
        target = token_branch[0].transpose(0, 1).clone()
        prompts = [halves.tensors[name] for name in names]
        lengths = {"cu_seqlens": halves.options["cu_seqlens_q"], "max_seqlen": 12}
        result = prompt_attention_(target, query, *prompts, gate, **lengths)
        out = result.transpose(0, 1)[None]
    else:
        target = token_branch.transpose(1, 2).clone()
        prompts = [halves.tensors[name].transpose(1, 2) for name in names]
        result = prompt_attention_(target, query.transpose(1, 2), *prompts, gate)
        out = result.transpose(1, 2)
    assert result is target
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    wanted = ("query", *names, "gate")
    weight = torch.randn(out.shape)
    ours = torch.autograd.grad((out * weight).sum(), [halves.tensors[name] for name in wanted])
    theirs = torch.autograd.grad((expected * weight).sum(), [whole.tensors[name] for name in wanted])
    for name, a, b in zip(wanted, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=name)

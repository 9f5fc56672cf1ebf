"""Kept calls: whatever was called before, a call does what it would do as the first one.

Nothing is computed here. `noted_launches` notes what the kernels are launched with, and CPU tensors take the ways of a
GPU's.
"""

# ruff: noqa: F811 - a fixture that a test asks for
import gc
import weakref

import pytest
import torch

pytest.importorskip("triton")

from kept_on_gpu import (  # noqa: F401
    FUNCTIONS,
    cached,
    forget,
    launches,
    misaligned,
    numbers,
    on_gpu,
    outcome,
    whole,
)
from threads import on_threads

from zinit_kernels import call_keys, dispatch, kept_calls, proof, zero_init_attention
from zinit_kernels import zero_init_attention_with_kvcache as with_kvcache
from zinit_kernels.backends.triton import prompt_launch


class Marked(torch.Tensor):
    """A subclass that only carries a name."""

    __torch_function__ = torch._C._disabled_torch_function_impl


class Meaning(torch.Tensor):
    """A subclass whose operators mean something else."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return super().__torch_function__(function, types, args, kwargs or {})


def other_strides(t):
    return torch.zeros(*t.shape[:-1], 2 * t.shape[-1], dtype=t.dtype)[..., : t.shape[-1]]


def without_memory(t):
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


TENSORS = {
    "float16": lambda t: t.half() if t.is_floating_point() else t.long(),
    "float64": lambda t: t.double(),
    "another length": lambda t: torch.cat([t, t[:, :1]], 1) if t.dim() > 1 else torch.cat([t, t]),
    "another batch": lambda t: torch.cat([t, t]),
    "one dimension more": lambda t: t[None],
    "one dimension less": lambda t: t[0],
    "misaligned": misaligned,
    "other strides": other_strides,
    "strided backwards": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "expanded": lambda t: t[:1].expand(t.shape),
    "requires grad": lambda t: t.clone().requires_grad_() if t.is_floating_point() else t,
    "a parameter": lambda t: torch.nn.Parameter(t.clone(), requires_grad=False),
    "negated by a bit": lambda t: torch._neg_view(t),
    "a named subclass": lambda t: t.as_subclass(Marked),
    "a subclass": lambda t: t.as_subclass(Meaning),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "without memory": without_memory,
    "absent": lambda t: None,
    "a number": lambda t: 0.5,
    "a list": lambda t: t.tolist(),
}
NUMBERS = {
    "whole": [
        ("is_causal", False), ("is_causal", 1), ("is_causal", None), ("window_size", (5, 0)), ("window_size", [5, 0]),
        ("window_size", (5.0, 0)), ("window_size", (True, False)), ("window_size", (5, 0, 1)), ("scale", 0.5),
        ("scale", 1), ("scale", 1.0), ("scale", True), ("scale", float("nan")), ("scale", -0.125), ("scale", "1"),
        ("scale", torch.tensor(0.125)), ("softcap", 3.0), ("softcap", None), ("softcap", 1), ("softcap", True),
        ("gate_activation", "identity"), ("gate_activation", "relu"), ("backend", "auto"), ("backend", "composed"),
        ("backend", "triton!"), ("attn_mask", torch.ones(2, 33, dtype=torch.bool)), ("sinks", numbers(4)),
        ("sinks", numbers(4, dtype=torch.float32)), ("prompt_index", torch.tensor([0, -1], dtype=torch.int32)),
        ("prompt_index", torch.tensor([0, 0])), ("dropout_p", 0.5),
    ],
    "cached": [
        ("causal", False), ("causal", None), ("window_size", (7, -1)), ("window_size", (7.0, -1)), ("num_splits", 2),
        ("num_splits", 2.0), ("num_splits", True), ("num_splits", -1), ("softmax_scale", 0.5), ("softcap", 3.0),
        ("gate_activation", "identity"), ("cache_seqlens", 7), ("cache_seqlens", 7.0), ("backend", "composed"),
        ("cache_leftpad", torch.zeros(2, dtype=torch.int32)), ("cache_batch_idx", torch.tensor([1, 0])),
        ("block_table", torch.zeros(2, 1, dtype=torch.int32)), ("sinks", numbers(4)), ("rotary_cos", numbers(64, 16)),
    ],
}  # fmt: skip
SHARED = numbers(2, 2, 33, 64)
CHANGES = [
    (form, f"{name}: {change}", {name: TENSORS[change]})
    for form, (_, make) in FUNCTIONS.items()
    for name, value in make().items()
    if torch.is_tensor(value)
    for change in TENSORS
] + [
    (form, f"{name} = {value if not torch.is_tensor(value) else value.dtype}", {name: lambda _, value=value: value})
    for form, changes in NUMBERS.items()
    for name, value in changes
] + [("whole", "value is key", {"key": lambda _, t=SHARED: t, "value": lambda _, t=SHARED: t})]  # fmt: skip


def changed(given, changes):
    """The arguments with some of them changed; None where the change makes no sense for the tensor."""
    try:
        return {**given, **{name: change(given.get(name)) for name, change in changes.items()}}
    except (RuntimeError, IndexError, TypeError):
        return None


@pytest.mark.parametrize("form", FUNCTIONS)
def test_no_call_is_taken_for_another(form, on_gpu):
    """Each change of one argument, after calls without it, after itself and after all the others."""
    function, make = FUNCTIONS[form]
    base = make()
    expected_base = outcome(on_gpu, function, base)
    differing, calls = 0, [("base", base, expected_base)]
    for where, what, changes in CHANGES:
        given = changed(make(), changes) if where == form else None
        if given is None:
            continue
        forget()
        expected = outcome(on_gpu, function, given)
        differing += expected != expected_base
        calls.append((what, given, expected))
        forget()
        for _ in range(3):
            assert outcome(on_gpu, function, base) == expected_base
        for _ in range(3):
            assert outcome(on_gpu, function, given) == expected, what
        assert outcome(on_gpu, function, base) == expected_base, what
    forget()
    for _ in range(3):
        for what, given, expected in calls:
            assert outcome(on_gpu, function, given) == expected, what
    assert differing > 100, "hardly a change made a difference"


@pytest.mark.parametrize("form", FUNCTIONS)
@pytest.mark.parametrize("grad", [False, True])
def test_the_third_call_is_not_checked_again(form, grad, on_gpu):
    function, make = FUNCTIONS[form]
    given = make()
    if grad:
        for name in {"whole": ("query", "prompt_key", "gate"), "cached": ("q",)}[form]:
            given[name].requires_grad_()
    expected = outcome(on_gpu, function, given)
    assert expected[0]
    outcome(on_gpu, function, given)
    assert on_gpu.checked == 2
    by_triton = on_gpu.by_triton
    assert (
        outcome(on_gpu, function, given)
        == outcome(on_gpu, function, make() if not grad else given)
        == expected
    )
    assert (on_gpu.checked, on_gpu.by_triton) == (2, by_triton)


def test_grad_mode_is_part_of_a_call(on_gpu):
    given = whole() | {"gate": numbers(4, dtype=torch.float32).requires_grad_()}
    for _ in range(3):
        with torch.no_grad():
            assert not zero_init_attention(**given).requires_grad
    for _ in range(3):
        assert zero_init_attention(**given).requires_grad
    with torch.inference_mode():
        for _ in range(3):
            assert zero_init_attention(**given).is_inference()
    assert zero_init_attention(**given).requires_grad


def test_equal_numbers_of_different_types_have_different_keys():
    key_of = call_keys.key_function((), (), ("number",), False)
    assert len({key_of(number)[0] for number in (1, 1.0, True)}) == 3


def test_gradients_have_the_shapes_of_the_inputs(on_gpu):
    """A table without the dimension of its rows, and gates without theirs."""
    given = {n: t.requires_grad_() if torch.is_tensor(t) else t for n, t in whole().items()}
    leaves = [t for t in given.values() if torch.is_tensor(t)]
    for _ in range(4):
        out = zero_init_attention(**given)
        grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
        assert [g.shape for g in grads] == [t.shape for t in leaves]
    assert on_gpu.checked == 2


def test_caches_that_overlap_at_another_distance_are_refused(on_gpu):
    """Whether two caches share memory depends on their addresses, which are in no key."""
    memory = numbers(8 * 2 * 48 * 2 * 64)
    size = 2 * 48 * 2 * 64

    def call(second):
        views = [memory[first : first + size].view(2, 48, 2, 64) for first in (0, second)]
        return with_kvcache(**{**cached(), "k_cache": views[0], "v_cache": views[1]})

    for _ in range(3):
        call(size)
    with pytest.raises(ValueError, match="share no memory"):
        call(size - 64)
    with pytest.raises(ValueError, match="share no memory"):
        call(0)
    checked = on_gpu.checked
    call(3 * size)
    assert on_gpu.checked == checked, "caches that are far from each other were checked again"


@pytest.mark.parametrize("name", ["q", "k", "v", "prompt_k", "prompt_v"])
def test_inputs_that_lie_in_the_caches_are_refused(name, on_gpu):
    """As above: a call with the same key, whose input was a tensor of its own, was kept before."""
    given = cached()
    for _ in range(3):
        with_kvcache(**given)
    shape = given[name].shape
    inside = given["v_cache"].view(-1)[64 : 64 + given[name].numel()].view(shape)
    with pytest.raises(ValueError, match="shares memory"):
        with_kvcache(**given | {name: inside})


def test_autograd_learns_which_caches_were_written(on_gpu):
    given = cached() | {
        "k_cache": numbers(2, 48, 2, 64),
        "v_cache": numbers(2, 48, 2, 64),
    }  # views share a counter
    for calls in range(1, 5):
        with_kvcache(**given)
        assert (given["k_cache"]._version, given["v_cache"]._version) == (calls, calls)
    reading = given | {"k": None, "v": None}
    for _ in range(4):
        with_kvcache(**reading)
    assert given["k_cache"]._version == 4 and on_gpu.checked == 4


def test_nothing_is_kept_alive(on_gpu):
    for function, make in FUNCTIONS.values():
        given = {
            n: t.requires_grad_() if n in ("query", "gate") and "key" in make() else t
            for n, t in make().items()
        }
        for _ in range(3):
            out = function(**given)
            if out.requires_grad:
                out.sum().backward()
        seen = [weakref.ref(t.untyped_storage()) for t in (*given.values(), out) if torch.is_tensor(t)]
        tensors = [weakref.ref(t) for t in (*given.values(), out) if torch.is_tensor(t)]
        del given, out
        gc.collect()
        assert seen and not any(reference() is not None for reference in tensors)


def test_a_new_verdict_is_heard(on_gpu, monkeypatch):
    """auto: what was kept under the old verdicts is not asked any more."""
    given = whole() | {"backend": "auto"}
    monkeypatch.setattr(dispatch, "PROVED", {"cpu"})
    monkeypatch.setattr(proof, "_times_of", lambda call: {})
    refused = ""
    monkeypatch.setattr(proof, "why_not", lambda backend, call: refused if backend == "triton" else "")
    for _ in range(4):
        on_gpu.clear()
        zero_init_attention(**given)
        assert on_gpu
    assert on_gpu.checked == 2
    refused = "wrong on this chip"
    proof._forget_taken()
    on_gpu.clear()
    zero_init_attention(**given)
    assert not on_gpu and on_gpu.checked == 3


def test_a_choice_that_may_change_is_not_kept(on_gpu, monkeypatch):
    """The first backend of the table proved nothing yet, and is tried again later: the second one is asked for now."""
    given = cached() | {"backend": "auto"}
    monkeypatch.setattr(dispatch, "PROVED", {"cpu"})
    monkeypatch.setattr(proof, "_times_of", lambda call: {})
    monkeypatch.setattr(dispatch.BACKENDS["cuda"], "why_not", lambda call, return_lse: "")
    monkeypatch.setattr(proof, "why_not", lambda backend, call: "proved nothing" if backend == "cuda" else "")
    for is_settled, checked in ((False, 5), (True, 7)):
        monkeypatch.setattr(proof, "is_settled", lambda *_, answer=is_settled: answer)
        for _ in range(5):
            with_kvcache(**given)
        assert on_gpu.checked == checked - is_settled


@pytest.mark.parametrize("trains", [False, True])
def test_hybrid_is_kept_too(on_gpu, monkeypatch, trains):
    """The vendor's attention around launches that are kept: the third call is not checked any more."""
    monkeypatch.setattr(prompt_launch, "arch_of", lambda tensor: 90)
    given = whole() | {"backend": "hybrid"}
    leaves = [t.requires_grad_(trains) for t in given.values() if torch.is_tensor(t)]
    launched = []
    for _ in range(4):
        on_gpu.clear()
        out = zero_init_attention(**given)
        if trains:
            torch.autograd.grad(out, leaves, torch.ones_like(out))
        launched.append([(name, programs) for name, _, programs, _ in on_gpu])
    backward = [("zinit_add_prompts_kernel", 8), ("zinit_add_prompt_grad_query_kernel", 8)]
    backward += [("zinit_partial_sums_kernel", 8), ("zinit_add_partials_kernel", 10)]
    assert launched == [[("zinit_add_prompts_kernel", 8), *backward * trains]] * 4
    assert on_gpu.checked == 2 and on_gpu.by_triton == 1 + 4 * trains


def test_threads_get_what_they_asked_for(on_gpu):
    given = whole()
    for _ in range(3):
        zero_init_attention(**given)
    on_gpu.clear()
    wrong = []

    def work():
        mine = whole()
        for _ in range(50):
            out = zero_init_attention(**mine)
            sent = [str(given) for _, _, _, given in list(on_gpu) if str(out.data_ptr()) in str(given)]
            if not sent or str(mine["query"].data_ptr()) not in sent[-1]:
                wrong.append(out)

    on_threads(work)
    assert not wrong and len(on_gpu) == 200


def test_the_number_of_kept_calls_is_limited(on_gpu, monkeypatch):
    monkeypatch.setattr(kept_calls, "MOST", 3)
    for length in range(8):
        given = whole() | {
            "prompt_key": numbers(2, 3 + length, 64),
            "prompt_value": numbers(2, 3 + length, 64),
        }
        zero_init_attention(**given)
        assert len(kept_calls._WHOLE._known) <= 3

"""Kept launches: a call like an earlier one sends its kernels what Triton itself would have sent.

`noted_launches` has the stand-ins for the chip and for Triton's compiler.
"""

from types import SimpleNamespace

import pytest
import torch

from zinit_kernels import call_keys
from zinit_kernels.arguments import from_cache
from zinit_kernels.call import CALL
from zinit_kernels.testing import CacheCase, Case, make_cache_arguments, make_inputs

triton = pytest.importorskip("triton")

from noted_launches import labelled  # noqa: E402
from threads import on_threads  # noqa: E402

from zinit_kernels.backends.triton import kept, launch, ranges, tuning  # noqa: E402


def attention(case, dtype=torch.bfloat16, change=None, needs=0b1111111):
    inputs = make_inputs(case, dtype)
    arguments = [a.detach() if torch.is_tensor(a) else a for a in CALL.arguments(inputs.canonical())]
    if change:
        arguments = change(arguments)

    def call():
        out, lse = launch.forward(*arguments)
        grad = torch.ones_like(out)
        grads = launch.backward(grad, None, out, lse, *arguments, needs)
        return [grad, out, lse, *arguments], [out, lse, *grads]

    return call


def decoding(case, dtype=torch.bfloat16):
    absent = dict.fromkeys(("softmax_scale", "prompt_index", "rotary_cos", "rotary_sin", "sinks"))
    arguments = from_cache(**absent | make_cache_arguments(case, dtype))

    def call():
        out, lse = launch.decode(*arguments)
        return [out, lse, *arguments], [out, lse]

    return call


def misaligned(arguments):
    key = arguments[1]
    storage = torch.zeros(key.numel() + 1, dtype=key.dtype)
    return [arguments[0], storage[1:].view(key.shape), *arguments[2:]]


def one_tensor_twice(arguments):
    return [*arguments[:2], arguments[1], *arguments[3:]]


def other_scale(arguments):
    return [0.0 if name == "scale" else a for name, a in zip(CALL.names, arguments, strict=True)]


def identity_gate(arguments):
    return [False if name == "tanh_gate" else a for name, a in zip(CALL.names, arguments, strict=True)]


def strides_of_one(arguments):
    """One token and one head: a stride of 1 has code of its own, and so has a size of 1."""
    return [a[:, :, :1] if torch.is_tensor(a) and a.dim() == 4 else a for a in arguments[:3]] + arguments[3:]


BASE = Case("base", heads_q=4, heads_kv=2, seqlens_q=(33,), head_dim=64)
CALLS = {
    "base": attention(BASE),
    "misaligned key": attention(BASE, change=misaligned),
    "key is value": attention(BASE, change=one_tensor_twice),
    "float16": attention(BASE, torch.float16),
    "scale 0": attention(BASE, change=other_scale),
    "identity gate": attention(BASE, change=identity_gate),
    "head-major slices": attention(Case("sliced", heads_q=4, heads_kv=2, seqlens_q=(33,), layout="sliced")),
    "other length": attention(Case("longer", heads_q=4, heads_kv=2, seqlens_q=(48,))),
    "padding, sinks": attention(Case("padding", heads_q=4, heads_kv=2, mask="padding", sinks=True)),
    "packed": attention(Case("packed", packed=True, seqlens_q=(5, 40, 9), table="indexed", prompt_length=33)),
    "prompts alone": attention(BASE, needs=0b0111000),
    "no prompts": attention(Case("none", prompt_length=0)),
    "decode": decoding(CacheCase("one", heads_q=8, heads_kv=2)),
    "decode, splits": decoding(CacheCase("split", heads_q=8, heads_kv=2, num_splits=3)),
    "decode, pages": decoding(CacheCase("paged", page_size=16, seqlen_q=3, rotary_dim=32)),
    "long chunk": decoding(CacheCase("chunk", seqlen_q=45, seqlens=(0, 3))),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_the_second_call_sends_what_triton_would_send(name, launches):
    given, first = CALLS[name]()
    expected, by_triton = labelled(launches, given), launches.by_triton
    assert expected and by_triton == len(expected)
    launches.clear()
    given, second = CALLS[name]()
    assert labelled(launches, given) == expected
    assert launches.by_triton == by_triton, "the second call went through Triton's binder"
    for ours, theirs in zip(second, first, strict=True):
        assert (ours.shape, ours.stride(), ours.dtype) == (theirs.shape, theirs.stride(), theirs.dtype)


def test_no_call_takes_the_launches_of_another(launches):
    """All of them one after the other, twice: what a launch was compiled for is what Triton would choose now."""
    expected = {}
    for name, call in CALLS.items():
        launches.clear()
        kept._plans.clear()
        expected[name] = labelled(launches, call()[0])
    kept._plans.clear()
    for _ in range(2):
        for name, call in CALLS.items():
            launches.clear()
            given, _ = call()
            assert labelled(launches, given) == expected[name], name


def test_another_device_has_launches_of_its_own():
    """A kernel is loaded onto one device; the tensors of two devices may have one address."""

    class Placed(torch.Tensor):
        device = torch.device("cuda", 0)

    kept_types, key_of = call_keys.PLAIN_TYPES, call_keys.key_function(("query",), (), (), False)
    key_of.__globals__["PLAIN_TYPES"] = kept_types | {Placed}
    query = torch.ones(3).as_subclass(Placed)
    first, _ = key_of(query)
    Placed.device = torch.device("cuda", 1)
    assert key_of(query)[0] != first


@pytest.mark.parametrize(
    "reason", ["launch hook", "pre-run hook", "profiler", "tuning", "debug", "version", "device"]
)
def test_what_triton_has_to_see_goes_to_triton(reason, launches, monkeypatch):
    call = CALLS["decode"]
    call()
    before = launches.by_triton
    runtime = triton.knobs.runtime
    if reason == "launch hook":
        hook = SimpleNamespace(calls=[print])
        monkeypatch.setattr(runtime, "launch_exit_hook", hook)
    elif reason == "pre-run hook":
        monkeypatch.setattr(launch.zinit_decode_kernel, "pre_run_hooks", [print])
    elif reason == "profiler":
        monkeypatch.setattr(ranges, "_NVTX", True)
        monkeypatch.setattr(torch.cuda, "nvtx", SimpleNamespace(range=lambda name: ranges.nullcontext()))
    elif reason == "tuning":
        monkeypatch.setattr(tuning, "ENABLED", True)
        monkeypatch.setattr(tuning, "run", lambda key, candidates, launch: launch(candidates[0]))
    elif reason == "debug":
        monkeypatch.setattr(runtime, "debug", True)
    elif reason == "version":
        monkeypatch.setattr(kept, "_KNOWN", False)
    else:
        monkeypatch.setattr(kept, "is_current", lambda index: False)
    call()
    assert launches.by_triton > before


def test_a_tensor_that_had_to_be_copied_is_copied_at_every_call(launches, monkeypatch):
    """Its copy lies at another address each time, and no address of an earlier call may be launched again."""
    monkeypatch.setattr("zinit_kernels.backends.triton.operands._LARGEST_TOKEN_STRIDE", 1)
    for _ in range(3):
        launches.clear()
        CALLS["head-major slices"]()
    assert launches.by_triton == 3 * len(launches)


def test_the_number_of_kept_calls_is_limited(launches, monkeypatch):
    monkeypatch.setattr(kept, "MOST", 3)
    for name in ("base", "float16", "decode", "packed"):
        CALLS[name]()
        assert len(kept._plans) <= 3


def test_threads_launch_what_they_were_given(launches):
    CALLS["decode"]()
    launches.clear()
    wrong = []

    def work():
        case = CacheCase("one", heads_q=8, heads_kv=2)
        absent = dict.fromkeys(("softmax_scale", "prompt_index", "rotary_cos", "rotary_sin", "sinks"))
        arguments = from_cache(**absent | make_cache_arguments(case, torch.bfloat16))
        for _ in range(50):
            out, _ = launch.decode(*arguments)
            mine = [
                given
                for _, _, _, given in list(launches)
                if any(out.data_ptr() in v for v in given if type(v) is tuple)
            ]
            if not any(
                arguments.query.data_ptr() in v for given in mine[-1:] for v in given if type(v) is tuple
            ):
                wrong.append(out)

    on_threads(work)
    assert not wrong and len(launches) == 200

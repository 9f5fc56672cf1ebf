"""The fast path: which calls take it, that it gives the bits of the other way, and that its errors are raised."""

import itertools

import pytest
import torch
from torch.nn import Parameter

from zinit_kernels import (
    arguments,
    dispatch,
    fast_path,
    zero_init_attention,
    zero_init_attention_with_kvcache,
)
from zinit_kernels.backends import cpu, fused
from zinit_kernels.call import CACHE_CALL, CALL, Role
from zinit_kernels.testing import CacheCase, Case, gradients, make_cache_arguments, make_inputs

pytestmark = pytest.mark.native


class Tagged(torch.Tensor):
    """A subclass that leaves operators as they are."""


@pytest.fixture
def fast_only(monkeypatch):
    """Any other way fails."""
    for name in ("from_sdpa", "from_cache"):
        monkeypatch.setattr(arguments, name, lambda *given: pytest.fail("took the long way"))


@pytest.fixture
def long_only(monkeypatch):
    """The fast path may not touch the operators: a call must reach the checks."""
    monkeypatch.setattr(fast_path, "_FORWARD", lambda *given: pytest.fail("took the fast path"))
    monkeypatch.setattr(fast_path, "_DECODE", lambda *given: pytest.fail("took the fast path"))


def whole(**changed):
    x = torch.randn
    given = {
        "query": x(2, 4, 6, 8), "key": x(2, 2, 6, 8), "value": x(2, 2, 6, 8), "prompt_key": x(1, 2, 3, 8),
        "prompt_value": x(1, 2, 3, 8), "gate": torch.randn(1, 4),
    }  # fmt: skip
    return given | changed


def cached(**changed):
    return make_cache_arguments(CacheCase("fast", heads_q=4, heads_kv=2), torch.float32) | changed


FAST = {
    "prompts": {},
    "no_prompts": dict.fromkeys(("prompt_key", "prompt_value", "gate")),
    "gate_of_heads": {"gate": torch.randn(4)},
    "prompts_of_three_dims": {n: torch.randn(2, 3, 8) for n in ("prompt_key", "prompt_value")},
    "parameters": {name: Parameter(t) for name, t in whole().items()},
    "causal": {"is_causal": True},
    "window": {"window_size": (2, 1)},
    "no_window": {"window_size": (-1, -1)},
    "causal_window": {"window_size": (2, -1), "is_causal": True},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 1.5},
    "identity": {"gate_activation": "identity"},
    "fewer_keys": {"key": torch.randn(2, 2, 5, 8), "value": torch.randn(2, 2, 5, 8)},
    "index": {"prompt_index": torch.tensor([0, -1], dtype=torch.int32)},
    "sinks": {"sinks": torch.randn(4)},
    "token_major": {"query": torch.randn(2, 6, 4, 8).transpose(1, 2)},
    "half": {n: t.half() for n, t in whole().items() if n != "gate"},
    "float32_prompts": {n: t.bfloat16() for n, t in whole().items() if n in ("query", "key", "value")},
    "inference": {},
}


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("name", FAST)
def test_takes_the_fast_path(fast_only, name, wanted):
    given = whole(**FAST[name])
    with torch.inference_mode() if name == "inference" else torch.set_grad_enabled(wanted):
        if wanted and name != "inference":
            given["value"] = given["value"].detach().requires_grad_()
        out = zero_init_attention(**given)
        assert out.requires_grad == (wanted and name != "inference")


@pytest.mark.parametrize("packed_gate", [False, True])
def test_gives_the_bits_of_the_long_way(monkeypatch, packed_gate):
    case = Case("bits", heads_q=4, heads_kv=2, seqlens_q=(33,), window=(9, -1))
    inputs = make_inputs(case, torch.bfloat16)
    if packed_gate:
        inputs.tensors["gate"] = inputs.tensors["gate"].detach()[None].requires_grad_()
    short, long = inputs, inputs.to(None)
    found = short.call("auto")
    monkeypatch.setattr(dispatch, "CPU_IS_FIRST", False)
    expected = long.call("auto")
    for ours, theirs in zip(
        (*found, *gradients(found, short).values()),
        (*expected, *gradients(expected, long).values()),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


CONVERTED = {
    "gate_number": {"gate": 0.5},
    "sinks_dtype": {"sinks": torch.randn(4).double()},
    "one_gate": {"gate": torch.randn(1)},
    "gate_row_of_one": {"gate": torch.randn(1, 1)},
    "gate_of_four_dims": {"gate": torch.randn(1, 4, 1, 1)},
    "gate_dtype": {"gate": torch.randn(4).double()},
    "gate_strides": {"gate": torch.randn(4, 2)[:, :1].t()},
    "prompts_of_three_and_four_dims": {"prompt_key": torch.randn(2, 3, 8)},
    "prompts_of_two_dtypes": {"prompt_key": torch.randn(1, 2, 3, 8).half()},
    "prompts_float64": {n: torch.randn(1, 2, 3, 8).double() for n in ("prompt_key", "prompt_value")},
    "query_strides": {"query": torch.randn(2, 4, 8, 6).mT},
    "prompt_strides": {"prompt_value": torch.randn(1, 2, 8, 3).mT},
    "float64": {n: t.double() for n, t in whole().items()},
    "wide_heads": {n: torch.randn(*t.shape[:-1], 300) for n, t in whole().items() if n != "gate"},
    "index_dtype": {"prompt_index": torch.tensor([0, -1])},
    "index_strides": {"prompt_index": torch.zeros(4, dtype=torch.int32)[::2]},
    "mask": {"attn_mask": torch.ones(2, 6, dtype=torch.bool)},
    "list_window": {"window_size": [2, 1]},
    "whole_scale": {"scale": 1},
    "whole_softcap": {"softcap": 2},
    "subclass": {"key": torch.randn(2, 2, 6, 8).as_subclass(Tagged)},
}


@pytest.mark.parametrize("name", CONVERTED)
def test_what_has_to_be_converted_or_needs_another_backend_is_not_taken(long_only, name):
    given = whole(**CONVERTED[name])
    with torch.no_grad():
        out = zero_init_attention(**given)
    expected = zero_init_attention(**given, backend="reference")
    torch.testing.assert_close(
        out.as_subclass(torch.Tensor), expected.as_subclass(torch.Tensor), rtol=1e-5, atol=1e-5
    )


def test_autocast_transforms_and_tracing_are_not_taken(long_only):
    given = whole()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert zero_init_attention(**given).dtype == torch.bfloat16
    attend = lambda query: zero_init_attention(**given | {"query": query})  # noqa: E731
    torch.func.vmap(attend)(torch.randn(3, 2, 4, 6, 8))
    torch.func.jvp(attend, (given["query"],), (given["query"],))
    with torch._subclasses.fake_tensor.FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(tensor) for name, tensor in given.items()}
        assert zero_init_attention(**fake).shape == (2, 4, 6, 8)


FAST_CACHES = {
    "append": {},
    "no_append": {"k": None, "v": None, "cache_seqlens": torch.tensor([1, 37, 100], dtype=torch.int32)},
    "window": {"window_size": (9, 0)},
    "gate_of_heads": {"gate": torch.randn(4)},
    "prompts_of_three_dims": {n: torch.randn(3, 2, 64) for n in ("prompt_k", "prompt_v")},
    "no_prompts": dict.fromkeys(("prompt_k", "prompt_v", "gate")),
    "bidirectional": {"causal": False},
    "softcap": {"softcap": 1.5},
    "leftpad": {"cache_leftpad": torch.tensor([0, 5, 100], dtype=torch.int32)},
    "rotary": {
        "rotary_cos": torch.rand(256, 8),
        "rotary_sin": torch.rand(256, 8),
        "rotary_interleaved": True,
    },
}


@pytest.mark.parametrize("name", FAST_CACHES)
def test_takes_the_fast_path_with_a_cache(fast_only, name):
    given = cached(**FAST_CACHES[name])
    version = given["k_cache"]._version
    out = zero_init_attention_with_kvcache(**given)
    assert out.shape == given["q"].shape and (given["k_cache"]._version > version) == (given["k"] is not None)


def test_a_cache_with_row_numbers_is_not_taken(long_only):
    with pytest.raises(pytest.fail.Exception, match="fast path"):  # it would be taken without them
        zero_init_attention_with_kvcache(**cached())
    rows = torch.arange(3, dtype=torch.int32)
    out = zero_init_attention_with_kvcache(**cached(cache_batch_idx=rows))
    assert out.isfinite().all()


@pytest.mark.parametrize("name", ["q", "prompt_k", "gate"])
def test_takes_the_fast_path_with_a_cache_and_records_nothing(fast_only, name):
    given = cached()
    given[name] = given[name].clone().requires_grad_()
    assert not zero_init_attention_with_kvcache(**given).requires_grad


def test_operands_are_those_of_the_checked_call(monkeypatch):
    """Whatever takes the fast path gives the operator what `arguments.py` would: the same tensors, equal numbers."""
    given = []
    monkeypatch.setattr(fast_path, "_FORWARD", lambda *operands: given.append(operands) or (None, None))
    monkeypatch.setattr(fast_path, "_DECODE", lambda *operands: given.append(operands) or (None, None))
    taken = 0
    with torch.no_grad():
        cases = [
            (zero_init_attention, arguments.from_sdpa, whole(**change), CALL) for change in FAST.values()
        ]
        cases += [
            (zero_init_attention_with_kvcache, arguments.from_cache, cached(**change), CACHE_CALL)
            for change in FAST_CACHES.values()
        ]
        for function, canonical, changed, form in cases:
            function(**changed)
            names = fast_path.attention.__annotations__
            if function is zero_init_attention_with_kvcache:
                names = fast_path.attention_with_cache.__annotations__
            defaults = {**function.__kwdefaults__, **changed}
            expected = canonical(*(defaults[name] for name in names if name != "return"))
            assert dispatch.select("auto", expected, False) == "cpu"
            for name, ours, theirs in zip(form.names, given.pop(), form.arguments(expected), strict=True):
                if ours is not None and name in form.specs and form.specs[name].is_table:  # rows may be added
                    if name == "gate" and form is CACHE_CALL and ours.dim() == 1:
                        ours = ours[None]  # that operator takes a single row as it is: a view costs 0.6 us
                    assert torch.equal(ours, theirs) and ours.shape == theirs.shape
                elif torch.is_tensor(theirs):
                    assert ours is theirs, name
                else:
                    assert type(ours) is type(theirs) and ours == theirs, name
            taken += 1
    assert taken == len(FAST) + len(FAST_CACHES) and not given


@pytest.mark.parametrize(
    "error", [AttributeError, IndexError, TypeError, ValueError, ZeroDivisionError, RuntimeError]
)
@pytest.mark.parametrize("where", ["forward", "autograd", "decode", "predicate"])
def test_an_error_on_the_way_is_raised_and_nothing_is_tried_again(monkeypatch, where, error):
    calls = []

    def fail(*given):
        calls.append(given)
        raise error("planted")

    name = {"forward": "_FORWARD", "decode": "_DECODE", "predicate": "_are_canonical"}.get(where)
    if where == "autograd":
        monkeypatch.setattr(fused, "attention_of", fail)
    else:
        monkeypatch.setattr(fast_path, name, fail)
    for room in ("attention", "attention_with_cache"):
        monkeypatch.setattr(cpu, room, lambda call: pytest.fail("tried again"))
    with pytest.raises(error, match="planted"), torch.set_grad_enabled(where == "autograd"):
        if where == "decode":
            zero_init_attention_with_kvcache(**cached())
        else:
            zero_init_attention(**whole())
    assert len(calls) == 1


def test_an_error_after_the_append_is_raised(monkeypatch):
    """The caches are written by then: a second attempt would be another call."""

    def fail(tensors):
        raise RuntimeError("planted")

    monkeypatch.setattr(fast_path, "increment_version", fail)
    given = cached()
    with pytest.raises(RuntimeError, match="planted"):
        zero_init_attention_with_kvcache(**given)
    assert torch.equal(given["k_cache"][0, 0], given["k"][0, 0])


def test_a_refusal_of_the_operator_comes_in_the_words_of_the_function():
    with pytest.raises(ValueError, match="value must have shape") as caught:
        zero_init_attention(**whole(value=torch.randn(2, 2, 5, 8)))
    assert isinstance(caught.value.__cause__, RuntimeError)
    given = cached(cache_seqlens=torch.tensor([0, 128, 3], dtype=torch.int32))
    with pytest.raises(RuntimeError, match="cache_seqlens"):  # a value, which only the operator has read
        zero_init_attention_with_kvcache(**given)


def test_every_tensor_is_asked():
    """A predicate without one of the fields would be blind to it."""
    for form, predicate, given in (
        (CALL, fast_path._are_canonical, {"key_bias": torch.zeros(2, 6)} | {
            name: torch.zeros(3, dtype=torch.int32) for name in ("cu_seqlens_q", "cu_seqlens_k")
        } | whole() | {"prompt_index": torch.zeros(2, dtype=torch.int32), "sinks": torch.zeros(4)}),
        (CACHE_CALL, fast_path._are_canonical_with_cache, {
            name: torch.zeros([4] * spec.dims, dtype=spec.dtypes[0] if spec.dtypes else torch.float32)
            for name, spec in CACHE_CALL.specs.items()
        }),
    ):  # fmt: skip
        tensors = [given[name] for name in form.specs]
        assert predicate(*tensors)
        for i, name in enumerate(form.specs):
            tagged, strided = tensors[i].as_subclass(Tagged), torch.stack([tensors[i]] * 2, -1)[..., 0]
            # the strides of a cache are never converted: the operator refuses them
            for broken in (tagged,) if form.specs[name].role is Role.WRITTEN else (tagged, strided):
                assert not predicate(*tensors[:i], broken, *tensors[i + 1 :]), name
            if name in form.optional:
                assert predicate(*tensors[:i], None, *tensors[i + 1 :]), name
    written = CACHE_CALL.names.index("key_cache")
    tensors[written] = tensors[written].requires_grad_()
    assert not fast_path._are_canonical_with_cache(*tensors)


@pytest.mark.parametrize("name, dim", itertools.product(("k_cache", "v_cache"), range(2)))
def test_caches_that_cannot_be_written_are_named_in_the_words_of_the_function(name, dim):
    given = cached()
    given[name] = given[name].narrow(dim, 0, 1).expand(given[name].shape)
    with pytest.raises(ValueError, match="to append, k_cache and v_cache must be two caches"):
        zero_init_attention_with_kvcache(**given)
    given = cached()
    given[name] = torch.stack([given[name]] * 2, -1)[..., 0]
    with pytest.raises(ValueError, match=f"{name} must be contiguous in its last dimension"):
        zero_init_attention_with_kvcache(**given)

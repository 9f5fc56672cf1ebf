"""Kept calls of a GPU on CPU tensors, for tests that ask what is launched: nothing is computed.

`noted_launches` notes what the kernels are launched with.
"""

import pytest
import torch
from noted_launches import labelled, launches  # noqa: F401

from zinit_kernels import arguments, kept_calls, zero_init_attention
from zinit_kernels import zero_init_attention_with_kvcache as with_kvcache
from zinit_kernels.backends import fused, triton
from zinit_kernels.backends.triton import kept, launch


@pytest.fixture
def on_gpu(launches, monkeypatch):  # noqa: F811
    """The launches; `checked` counts the calls whose arguments were checked, as those of the long way are."""
    monkeypatch.setattr(kept_calls, "is_on_gpu", lambda query: True)
    monkeypatch.setattr(triton, "INTERPRETED", True)
    for stage in ("forward", "backward", "decode"):
        monkeypatch.setitem(fused.OPERATORS, (stage, "triton"), getattr(launch, stage))
    launches.checked = 0
    originals = {name: getattr(arguments, name) for name in ("from_sdpa", "from_cache")}
    for name in originals:

        def counted(*given, check=originals[name]):
            launches.checked += 1
            return check(*given)

        monkeypatch.setattr(arguments, name, counted)
    forget()
    yield launches
    forget()


def forget():
    kept_calls._WHOLE._known.clear()
    kept_calls._CACHED._known.clear()
    kept._plans.clear()


def numbers(*shape, dtype=torch.bfloat16):
    return torch.zeros(shape, dtype=dtype)


def misaligned(t):
    memory = torch.zeros(t.numel() + 1, dtype=t.dtype)
    return memory[1:].view(t.shape)


def whole():
    """Arguments of `zero_init_attention`."""
    return {
        "query": numbers(2, 4, 33, 64),
        "key": numbers(2, 2, 33, 64),
        "value": numbers(2, 2, 33, 64),
        "prompt_key": numbers(2, 10, 64),
        "prompt_value": numbers(2, 10, 64),
        "gate": numbers(4, dtype=torch.float32),
        "is_causal": True,
        "backend": "triton",
    }


def cached():
    """Arguments of `zero_init_attention_with_kvcache`: caches in one piece of memory, with room behind each."""
    memory = numbers(5, 2, 48, 2, 64)
    return {
        "q": numbers(2, 1, 4, 64),
        "k_cache": memory[0],
        "v_cache": memory[2],
        "k": numbers(2, 1, 2, 64),
        "v": numbers(2, 1, 2, 64),
        "prompt_k": numbers(1, 10, 2, 64),
        "prompt_v": numbers(1, 10, 2, 64),
        "gate": numbers(1, 4, dtype=torch.float32),
        "cache_seqlens": torch.tensor([3, 40], dtype=torch.int32),
        "causal": True,
        "backend": "triton",
    }


def outcome(noted, function, given):
    """What a call launches and returns, and its backward if it has one; or its error."""
    noted.clear()
    try:
        with torch.enable_grad():
            out, lse = function(**given, return_lse=True)
            result = [(t.shape, t.stride(), t.dtype, t.requires_grad) for t in (out, lse)]
            leaves = [t for t in given.values() if torch.is_tensor(t) and t.requires_grad]
            made = [out, lse]
            if out.requires_grad:
                grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
                result += [(t.shape, t.dtype) for t in grads]
    except (TypeError, ValueError, RuntimeError) as error:
        return type(error), str(error)
    inputs = [t for t in given.values() if torch.is_tensor(t)]
    return labelled(noted, [*inputs, *made]), result


FUNCTIONS = {"whole": (zero_init_attention, whole), "cached": (with_kvcache, cached)}

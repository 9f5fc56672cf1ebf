"""Kept calls and the states of torch: modes, transforms, traces, streams and checkpoints see what they would see of
a first call.
"""

# ruff: noqa: F811 - a fixture that a test asks for
import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from kept_on_gpu import FUNCTIONS, cached, launches, misaligned, numbers, on_gpu, outcome, whole  # noqa: F401

from zinit_kernels import kept_calls, zero_init_attention
from zinit_kernels.backends.triton import kept


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def profiled():
    return torch.autograd.profiler.profile(use_kineto=False)


STATES = {
    "dispatch mode": Watching,
    "autocast": lambda: torch.autocast("cuda", torch.float16),
    "profiler": profiled,
    "forward-mode AD": torch.autograd.forward_ad.dual_level,
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.filterwarnings("ignore:User provided device_type")
def test_who_has_to_see_the_operators_sees_them(state, on_gpu, monkeypatch):
    given = whole()
    if state == "autocast":  # torch without CUDA turns it off
        monkeypatch.setattr(kept_calls, "autocast_dtype", lambda: torch.float16 if watched else None)
    watched = False
    for _ in range(3):
        zero_init_attention(**given)
    checked = on_gpu.checked
    watched = True
    try:
        with STATES[state]():
            zero_init_attention(**given)
    except ValueError as error:
        assert "forward-mode AD" in str(error)
    assert on_gpu.checked == checked + 1


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_transforms_and_traces_see_the_operators(on_gpu):
    given = whole()
    for _ in range(3):
        zero_init_attention(**given)
    checked = on_gpu.checked
    with pytest.raises(ValueError, match=r"torch\.func"):
        torch.vmap(lambda x: zero_init_attention(**given | {"gate": x}))(given["gate"][None])
    assert on_gpu.checked == checked + 1
    with contextlib.suppress(
        AttributeError
    ):  # a trace has tensors for sizes, which Triton's launch does not know
        torch.jit.trace(
            lambda x: zero_init_attention(**given | {"query": x}), (given["query"],), check_trace=False
        )
    assert on_gpu.checked == checked + 2


def test_gradients_after_an_input_was_given_other_memory(on_gpu):
    """As FSDP does between forward and backward: what the backward launches follows from what is there then."""
    given = whole() | {"prompt_key": numbers(1, 2, 10, 64), "prompt_value": numbers(1, 2, 10, 64)}
    given = {n: t.requires_grad_() if torch.is_tensor(t) else t for n, t in given.items()}
    outs = [zero_init_attention(**given) for _ in range(3)]
    for out in outs[:2]:
        torch.autograd.grad(out, given["query"], torch.ones_like(out), retain_graph=True)
    given["prompt_key"].data = other = misaligned(given["prompt_key"].data)
    on_gpu.clear()
    torch.autograd.grad(outs[2], given["query"], torch.ones_like(outs[2]))
    addresses = str(list(on_gpu))
    assert str(other.data_ptr()) in addresses


def test_launches_go_to_the_stream_of_their_call(on_gpu):
    given = whole()
    for _ in range(2):
        zero_init_attention(**given)
    on_gpu.streams.clear()
    for on_gpu.stream in (7, 9, 7):
        zero_init_attention(**given)
    assert on_gpu.streams == [7, 9, 7] and on_gpu.checked == 2


def test_another_current_device_takes_the_long_way(on_gpu, monkeypatch):
    given = whole()
    for _ in range(3):
        zero_init_attention(**given)
    monkeypatch.setattr(kept, "is_current", lambda index: False)
    before = on_gpu.checked, on_gpu.by_triton
    zero_init_attention(**given)
    assert (on_gpu.checked, on_gpu.by_triton) == (before[0] + 1, before[1] + 1)


def test_a_checkpoint_may_compute_a_kept_call_again(on_gpu):
    """A call that was checked and one that is kept save the same tensors. The first computation in a backward ends as
    soon as all tensors are saved, so it is not learnt from."""
    given = {n: t.requires_grad_() if torch.is_tensor(t) else t for n, t in whole().items()}
    for _ in range(4):
        out = torch.utils.checkpoint.checkpoint(lambda: zero_init_attention(**given), use_reentrant=False)
        out.sum().backward()
    assert on_gpu.checked == 3

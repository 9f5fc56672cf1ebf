"""A chip that launches nothing: Triton binds the arguments of its kernels, and each launch is noted instead of made.

A stand-in driver says that the chip is an H100. Triton's own binder runs, and in place of its compiler a stand-in
kernel that notes what it is launched with.
"""

from types import SimpleNamespace

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

from zinit_kernels.backends.triton import kept, launch

DRIVER = SimpleNamespace(
    get_current_target=lambda: GPUTarget("cuda", 90, 32),
    get_current_device=lambda: 0,
    get_current_stream=lambda device: 0,
)


def plain(argument):
    if isinstance(argument, torch.Tensor):
        return argument.data_ptr()
    return tuple(map(plain, argument)) if isinstance(argument, tuple) else argument


class Launches(list):
    """(kernel, what was compiled, programs, arguments) of every launch.

    by_triton: how many went through Triton. stream: the current one. streams: those that kept launches went to.
    """

    by_triton = 0
    stream = 0

    def __init__(self):
        super().__init__()
        self.streams = []


@pytest.fixture
def launches(monkeypatch):
    found = Launches()

    def run(kernel, *args, grid, warmup, **named):
        found.by_triton += 1
        _, _, _, _, bind = kernel.device_caches[0]
        named |= {"debug": False, "instrumentation_mode": ""}
        bound, specialisation, options = bind(*args, **named)
        compiled = str(specialisation), str(options)

        def note(programs, y, z, stream, function, metadata, launch_metadata, enter, leave, *given):
            found.streams.append(stream)
            found.append((kernel.fn.__name__, compiled, programs, plain(given)))

        note(*grid, 1, 1, 0, None, None, None, None, None, *bound.values())
        return SimpleNamespace(run=note, function=None, packed_metadata=None)

    triton.runtime.driver.set_active(DRIVER)
    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", run)
    monkeypatch.setattr(launch, "arch_of", lambda tensor: 90)
    monkeypatch.setattr(launch, "num_processors", lambda tensor: 132)
    may_be_kept = kept.may_be_kept
    on_gpu = SimpleNamespace(is_cuda=True, get_device=lambda: 0)
    monkeypatch.setattr(kept, "may_be_kept", lambda query: may_be_kept(on_gpu))
    monkeypatch.setattr(kept, "is_current", lambda index: True)
    monkeypatch.setattr(kept, "current_stream", lambda index: found.stream)
    monkeypatch.setattr(kept, "_plans", {})
    yield found
    triton.runtime.driver.set_active(None)


def labelled(launches, inputs):
    """The launches with a label in place of each address: outputs and partial sums lie elsewhere at every call."""
    labels = {tensor.data_ptr(): f"input {i}" for i, tensor in enumerate(inputs) if torch.is_tensor(tensor)}

    def label(argument):
        if isinstance(argument, tuple):
            return tuple(map(label, argument))
        is_address = isinstance(argument, int) and not isinstance(argument, bool) and argument > 1 << 33
        return labels.setdefault(argument, f"made {len(labels)}") if is_address else argument

    return [(name, compiled, programs, label(given)) for name, compiled, programs, given in launches]

"""Fixtures: the emulated CUDA kernels as the backend "cuda", on CPU tensors."""

import compile_host as simt
import pytest
import torch
from emulator import Emulator

from zinit_kernels.backends import cuda as cuda_room
from zinit_kernels.backends import fused


@pytest.fixture(scope="session")
def emulator():
    if reason := simt.why_not_here():
        pytest.skip(reason)
    return Emulator(simt.build("kernels.so", simt.ALL))


@pytest.fixture
def register(monkeypatch):
    """register(emulator): backend="cuda" runs it; the backend's other reasons stay."""
    library = torch.library.Library("zinit", "IMPL")
    monkeypatch.setattr(cuda_room, "UNAVAILABLE", "")
    monkeypatch.setattr(fused, "why_not_on_gpu", lambda call: "")

    def implement(emulator):
        library.impl("decode_cuda", emulator.decode, "CPU")
        library.impl("forward_cuda", emulator.forward, "CPU")
        library.impl("prompt_cuda", emulator.add_prompt_branch, "CPU")

    yield implement
    library._destroy()


@pytest.fixture
def cuda(emulator, register):
    register(emulator)

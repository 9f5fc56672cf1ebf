"""The emulated CUDA kernels as the backend "cuda", on CPU tensors."""

import emulator as simt
import pytest
import torch

from zinit_kernels import dispatch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """The reference's many small operations on several threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def emulator():
    if reason := simt.why_not_here():
        pytest.skip(reason)
    return simt.Emulator(simt.build("kernels.so", [*simt.KERNELS, *simt.ENTRY_POINTS]))


@pytest.fixture
def cuda(emulator, monkeypatch):
    """backend="cuda" runs the emulator; the backend's other reasons stay."""
    library = torch.library.Library("zinit", "IMPL")
    library.impl("decode_cuda", emulator.decode, "CPU")
    monkeypatch.setattr(dispatch, "_CUDA_UNAVAILABLE", "")
    monkeypatch.setattr(dispatch, "_why_not_on_gpu", lambda call: "")
    yield emulator
    library._destroy()

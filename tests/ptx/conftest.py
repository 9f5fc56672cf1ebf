"""chip(arch): the Triton kernels as compiled for it, interpreted on CPU tensors."""

import pytest
import torch


@pytest.fixture
def chip(monkeypatch):
    pytest.importorskip("triton")
    import triton_kernels

    from zinit_kernels.backends.triton import launch

    library = torch.library.Library("zinit", "IMPL")
    for stage in ("forward", "backward", "decode"):
        library.impl(f"{stage}_triton", getattr(launch, stage), "CPU")

    def install(arch, **options):
        found = triton_kernels.Chip(arch, **options)
        triton_kernels.install(monkeypatch, found)
        return found

    yield install
    library._destroy()

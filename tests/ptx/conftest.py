"""chip(arch): the Triton kernels as compiled for it, interpreted on CPU tensors."""

import pytest


@pytest.fixture
def chip(monkeypatch):
    pytest.importorskip("triton")
    import triton_kernels

    def install(arch, **options):
        found = triton_kernels.Chip(arch, **options)
        triton_kernels.install(monkeypatch, found)
        return found

    with triton_kernels.operators():
        yield install

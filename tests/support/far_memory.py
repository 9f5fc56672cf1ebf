"""Tensors that no 32-bit offset reaches, in memory that costs nothing."""

import mmap

import torch


def far_apart(tensor, dim):
    """The same values with 2**31 elements between two of a dimension, in memory that is never touched."""
    stride = (1 << 31) + 64
    strides = list(tensor.contiguous().stride())
    strides[dim] = stride
    size = (stride * (tensor.shape[dim] - 1) + tensor.numel()) * tensor.element_size()
    memory = torch.frombuffer(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=tensor.dtype)
    return memory.as_strided(tensor.shape, strides).copy_(tensor)

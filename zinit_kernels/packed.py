"""Quantised weights of linear layers and embeddings, packed for products of a few rows.

    weight = quantise(linear.weight, 4, group=32)
    output = weight.multiply(x)             # x weight^T, at the speed at which the CPU reads the weight
    layer = PackedLinear(weight, torch.bfloat16)

A weight [N, K] becomes codes of 8 or 4 bits, and a float16 scale for each `group` of neighbouring columns (32, 64 or
128) of a row:

    8 bits              w = scale * code            code -128 .. 127
    4 bits              w = scale * (code - 8)      code 0 .. 15
    4 bits with a min   w = scale * code + min      code 0 .. 15, min float16

These are the numbers of GGUF's Q8_0, Q4_0 and Q4_1 blocks (groups of 32), which `pack` takes as they are. The layout in
memory is described in `csrc/cpu/linear_work.h`. Without the compiled kernels, and on other devices, the same numbers
are computed in PyTorch.

The kernel rounds activations to 16-bit integers, group by group: one is off by at most 1 / 65278 of the largest of its
group. Weights take part with exactly the values above.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from . import operators
from .backends import extension

NATIVE = extension.available("cpu")  # asked once: torch.compile cannot trace the question
ROWS_OF_A_PANEL = 16
GROUPS = (32, 64, 128)
# Rows up to which the weight is read as it is. More are a product of unpacked weights: by torch, or with AVX-512 by a
# kernel that unpacks 48 rows of the weight at a time (`csrc/cpu/linear_many.h`).
MOST_ROWS = 32
# whether the CPU kernels multiply many rows
MANY_ROWS = NATIVE and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
_LARGEST_SCALE = torch.finfo(torch.float16).max
_ROWS_AT_ONCE = (
    1 << 12
)  # rows that are quantised together, so that a large weight needs little memory beside it


class Scheme(NamedTuple):
    """How a weight is quantised."""

    bits: int  # 8 or 4
    group: int  # columns with one scale: 32, 64 or 128
    has_min: bool = False  # only with 4 bits

    @property
    def number(self) -> int:
        """The number by which the operators know it."""
        return self.bits + 16 * self.has_min + 256 * self.group

    def check(self) -> Scheme:
        """Returns the scheme. Raises ValueError where there is none like it."""
        if self.bits not in (8, 4) or self.group not in GROUPS or (self.has_min and self.bits == 8):
            raise ValueError(
                f"a weight is quantised to 8 bits, or to 4 bits with or without a min, in groups of {GROUPS}; got "
                f"{self.bits} bits, groups of {self.group}{', a min' if self.has_min else ''}"
            )
        return self

    def groups(self, columns: int) -> int:
        return -(-columns // self.group)

    def scale_bytes(self, columns: int) -> int:
        """Bytes of a panel's scales and mins."""
        return -(-self.groups(columns) * (64 if self.has_min else 32) // 64) * 64

    def panel_bytes(self, columns: int) -> int:
        """Bytes of a panel, which holds 16 rows."""
        return (
            self.scale_bytes(columns) + self.groups(columns) * self.group * ROWS_OF_A_PANEL * self.bits // 8
        )


class PackedWeight(NamedTuple):
    """A quantised weight [rows, columns]."""

    data: Tensor  # uint8 [panels, bytes of a panel]
    rows: int
    columns: int
    scheme: Scheme

    def unpack(self, dtype: torch.dtype, indices: Tensor | None = None) -> Tensor:
        """The weight's numbers [rows, columns], or those of the rows that int64 indices [...] name."""
        if indices is not None and indices.dim() != 1:
            flat = self.unpack(dtype, indices.flatten())
            return flat.view(*indices.shape, self.columns)
        if _is_native(self.data) and dtype in (torch.float32, torch.bfloat16, torch.float16):
            chosen = None if indices is None else indices.contiguous()
            like = torch.empty(0, dtype=dtype)
            return _UNPACK(self.data, self.rows, self.columns, self.scheme.number, chosen, like)
        return self._unpack_plainly(dtype, indices)

    def _unpack_plainly(self, dtype: torch.dtype, indices: Tensor | None) -> Tensor:
        """`unpack` in PyTorch."""
        codes, scales, mins = self.parts()
        if indices is not None:
            codes, scales = codes[indices], scales[indices]
            mins = None if mins is None else mins[indices]
        numbers = codes.to(torch.float32).unflatten(-1, (-1, self.scheme.group))
        if self.scheme.bits == 4 and mins is None:
            numbers = numbers - 8
        numbers = numbers * scales.float()[..., None]
        if mins is not None:
            numbers = numbers + mins.float()[..., None]
        return numbers.flatten(-2)[:, : self.columns].to(dtype)

    def parts(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The codes (int8, or uint8 of 4 bits) [rows, groups * group], scales float16 [rows, groups], and mins."""
        groups, has_min = self.scheme.groups(self.columns), self.scheme.has_min
        head = self.data[:, : groups * (64 if has_min else 32)].contiguous().view(torch.float16)
        head = head.view(len(self.data), groups, 1 + has_min, ROWS_OF_A_PANEL).permute(2, 0, 3, 1)
        scales = head.flatten(1, 2)[:, : self.rows]
        body = self.data[:, self.scheme.scale_bytes(self.columns) :]
        of_rows = body.reshape(len(body), -1, ROWS_OF_A_PANEL, 4).transpose(1, 2).flatten(0, 1)
        if self.scheme.bits == 8:
            codes = (of_rows ^ 128).flatten(1).view(torch.int8)
        else:
            codes = torch.cat([of_rows & 15, of_rows >> 4], -1).flatten(1)
        return codes[: self.rows], scales[0], scales[1] if has_min else None

    def multiply(self, x: Tensor) -> Tensor:
        """x [..., columns] times the transposed weight, [..., rows], in x's dtype. Differentiable in x."""
        if x.requires_grad and torch.is_grad_enabled():
            return _Product.apply(x, self)
        return self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        num_rows = x.numel() // self.columns
        if (num_rows <= MOST_ROWS or MANY_ROWS) and _is_native(self.data, x) and x.dtype in _FLOATS:
            rows = x.reshape(-1, self.columns).contiguous()
            out = _LINEAR(rows, self.data, self.rows, self.scheme.number)
            return out.view(*x.shape[:-1], self.rows)
        return F.linear(x, self.unpack(x.dtype))


class _Product(torch.autograd.Function):
    """Saves the packed weight alone: the backward pass unpacks it once more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: PackedWeight) -> Tensor:
        ctx.weight = weight
        return weight._product(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.weight.unpack(grad.dtype), None


_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_LINEAR, _UNPACK = operators.operator("linear", "cpu"), operators.operator("unpack", "cpu")


def _is_native(*tensors: Tensor) -> bool:
    """Whether the CPU kernels take these tensors."""
    return NATIVE and all(tensor.device.type == "cpu" for tensor in tensors)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., K] times a plain weight [N, K], as `torch.nn.functional.linear`. Up to 32 rows on a CPU, without
    gradients, take a kernel that reads the weight once."""
    if (
        x.numel() <= MOST_ROWS * x.shape[-1]
        and x.dtype == weight.dtype
        and x.dtype in _FLOATS
        and weight.is_contiguous()
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and x.shape[-1] == weight.shape[1] > 0
        and _is_native(x, weight)
    ):
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        return _LINEAR(rows, weight, weight.shape[0], 0).view(*x.shape[:-1], weight.shape[0])
    return F.linear(x, weight)


def pack(
    codes: Tensor, scales: Tensor, mins: Tensor | None, bits: int, columns: int | None = None
) -> PackedWeight:
    """A packed weight of codes [N, K] (int8 for 8 bits, uint8 below 16 for 4), scales and mins float16 [N, K / group].

    columns: K, where `codes` has been padded to whole groups.
    """
    rows, padded = codes.shape
    scheme = Scheme(bits, padded // scales.shape[1], mins is not None).check()
    columns = padded if columns is None else columns
    panels = -(-rows // ROWS_OF_A_PANEL)
    missing = panels * ROWS_OF_A_PANEL - rows
    codes = F.pad(codes.view(torch.uint8), (0, 0, 0, missing))
    tables = torch.stack([scales] if mins is None else [scales, mins], 0)
    tables = F.pad(tables, (0, 0, 0, missing)).view(len(tables), panels, ROWS_OF_A_PANEL, -1)
    head = tables.permute(1, 3, 0, 2).contiguous().view(torch.uint8).view(panels, -1)
    data = torch.zeros(panels, scheme.panel_bytes(columns), dtype=torch.uint8, device=codes.device)
    data[:, : head.shape[1]] = head
    by_panel = codes.view(panels, ROWS_OF_A_PANEL, -1, 4 if bits == 8 else 8).transpose(1, 2)
    by_panel = by_panel ^ 128 if bits == 8 else by_panel[..., :4] | by_panel[..., 4:] << 4
    data[:, scheme.scale_bytes(columns) :] = by_panel.flatten(1)
    return PackedWeight(data, rows, columns, scheme)


def quantise(weight: Tensor, bits: int, group: int | None = None) -> PackedWeight:
    """Quantises a weight [N, K] to 8 or 4 bits without a min.

    group None: for 8 bits the largest of 128, 64 and 32 that divides K, for 4 bits 32. 8 bits: scale = max |w| / 127.
    4 bits: of some scales around max |w| / 8, the one with the least squared error. Raises ValueError for weights that
    are not finite, or too large for float16 scales.
    """
    columns = weight.shape[1]
    if group is None:
        group = 32 if bits == 4 else next((g for g in (128, 64) if columns % g == 0), 32)
    scheme = Scheme(bits, group).check()
    parts = [
        _quantised_rows(part, scheme) for part in weight.detach().split(_ROWS_AT_ONCE)
    ]  # a multiple of 16 rows: the panels of the parts follow one another
    return PackedWeight(torch.cat([part.data for part in parts]), len(weight), columns, scheme)


def _quantised_rows(weight: Tensor, scheme: Scheme) -> PackedWeight:
    columns, group = weight.shape[1], scheme.group
    numbers = F.pad(weight.float(), (0, -columns % group)).unflatten(1, (-1, group))
    largest = numbers.abs().amax(-1)
    most = 127 if scheme.bits == 8 else 8
    if not (largest < _LARGEST_SCALE * most).all():
        raise ValueError("a weight to quantise must be finite and below 65504 * 7")
    if scheme.bits == 8:
        scales = (largest / most).half()
        codes = _codes(numbers, scales).clamp(-127, 127)
        return pack(codes.to(torch.int8).flatten(1), scales, None, 8, columns)
    # the number of the largest size becomes code 0, which is 8 steps below the middle; 15 is only 7 above
    extreme = numbers.gather(-1, numbers.abs().argmax(-1, keepdim=True))[..., 0]
    best = torch.full_like(extreme, torch.inf)
    scales = torch.zeros_like(extreme, dtype=torch.float16)
    for share in _SHARES:
        tried = (extreme * (-share / 8)).half()
        error = (
            _codes(numbers, tried).clamp(-8, 7).mul_(tried.float()[..., None]).sub_(numbers).square_().sum(-1)
        )
        better = error < best
        best, scales = torch.where(better, error, best), torch.where(better, tried, scales)
    codes = _codes(numbers, scales).clamp(-8, 7) + 8
    return pack(codes.to(torch.uint8).flatten(1), scales, None, 4, columns)


_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 1.05, 1.1, 1.15)


def _codes(numbers: Tensor, scales: Tensor) -> Tensor:
    wide = scales.float()
    inverse = torch.where(wide == 0, 0.0, 1 / wide)
    return (numbers * inverse[..., None]).round_()


class Packed(nn.Module):
    """A packed weight as a buffer, and the dtype of what is computed with it."""

    weight: Tensor

    def __init__(self, weight: PackedWeight, dtype: torch.dtype):
        super().__init__()
        self.register_buffer("weight", weight.data)
        self.rows, self.columns, self.scheme, self.dtype = weight.rows, weight.columns, weight.scheme, dtype
        self.out_features, self.in_features = weight.rows, weight.columns  # a linear layer's names

    @property
    def packed(self) -> PackedWeight:
        return PackedWeight(self.weight, self.rows, self.columns, self.scheme)

    def extra_repr(self) -> str:
        minimum = ", min" if self.scheme.has_min else ""
        return (
            f"{self.rows} x {self.columns}, {self.scheme.bits} bits, groups of {self.scheme.group}{minimum}"
        )


class PackedLinear(Packed):
    """A linear layer without a bias whose weight is packed. Differentiable in its input; the weight is not trained."""

    def forward(self, x: Tensor) -> Tensor:
        return self.packed.multiply(x)


class PackedEmbedding(Packed):
    """An embedding whose table is packed; its rows come in `dtype`."""

    def forward(self, tokens: Tensor) -> Tensor:
        return self.packed.unpack(self.dtype, tokens)

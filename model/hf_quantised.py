"""Linear layers of Hugging Face folders whose config.json has a quantization_config.

    weights, kept = read_matrices(config["quantization_config"], tensors, file, dtype, keep)

| quant_method | bits | tensors of a layer |
| --- | --- | --- |
| gptq | 4, 8 | qweight, qzeros, scales, g_idx |
| awq ("gemm") | 4 | qweight, qzeros, scales |
| compressed-tensors | 4, 8, 8 (floats) | weight_packed or weight, weight_scale, weight_zero_point, weight_g_idx |
| bitsandbytes | 8 (LLM.int8), 4 (nf4, fp4) | weight, SCB; or weight, weight.absmax, weight.quant_map, ... |
| torchao (safetensors) | 8, 4 in bytes | _weight_qdata, _weight_scale, _weight_zero_point |
| fp8, fbgemm_fp8 | 8 (floats) | weight, weight_scale_inv or weight_scale |

Whole numbers become a `Matrix`, which `zinit_kernels.packed` can keep as it is; the others become their numbers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from zinit_kernels.console import shortened, shown
from zinit_kernels.packed import GROUPS, PackedWeight, pack

from .errors import UserError
from .fields import number

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column that each 4 bits of a word hold, from the lowest on
_GROUPS = (128, 64, 32, 256, 512, 1024)  # where the last group of a row is smaller
_MOST_LOST = 2**-10  # of a scale, where it becomes float16


class Matrix(NamedTuple):
    """A weight [N, K] of whole numbers: scale * (code - zero), with a scale for each group of columns of a row."""

    codes: Tensor  # int8 [N, K], -8 .. 7 of 4 bits
    scales: Tensor  # float32 [N, groups]
    zeros: Tensor | None  # float32 [N, groups]; None: all 0
    bits: int
    group: int

    def packed(self) -> PackedWeight | None:
        """The same codes and float16 scales, packed; None where there is no such form."""
        rows, columns = self.codes.shape
        zeros = None if self.zeros is None or not self.zeros.any() else self.zeros
        whole = self.group >= columns  # one scale a row: any group does
        group = next((g for g in reversed(GROUPS) if self.group % g == 0 or (whole and columns % g == 0)), 0)
        if not group and whole:
            group = GROUPS[0]
        if not group or (self.bits == 8 and zeros is not None):
            return None
        groups = -(-columns // group)
        repeats = -(-groups // self.scales.shape[1])
        tables = [self.scales] if zeros is None else [self.scales, -self.scales * (zeros + 8)]
        tables = [table.repeat_interleave(repeats, 1)[:, :groups] for table in tables]
        halves = [table.half() for table in tables]
        for table, half in zip(tables, halves, strict=True):
            if not (
                (half.float() - table).abs() <= _MOST_LOST * table.abs()
            ).all():  # too small, large or NaN
                return None
        codes = F.pad(self.codes, (0, groups * group - columns))
        if self.bits == 4:
            codes = (codes + 8).view(torch.uint8)
        return pack(codes, halves[0], halves[1] if zeros is not None else None, self.bits, columns)

    def numbers(self) -> Tensor:
        """float32 [N, K]"""
        columns = self.codes.shape[1]
        of_column = torch.arange(columns) // self.group
        return _spread(self.codes, self.scales, self.zeros, of_column)


def read_matrices(
    settings: Any, tensors: dict[str, Tensor], file: str, dtype: torch.dtype, keep: bool
) -> tuple[dict[str, Tensor], dict[str, PackedWeight]]:
    """The weights of a folder by name: as numbers of `dtype`, and those that stay packed.

    settings: the quantization_config. tensors: all of the folder; a quantised layer's are taken out once it is read, so
    that one layer at a time is in memory twice. keep: matrices of 8 and 4 bits stay packed where they can. Packed or
    not, scales are rounded to float16, so that both ways give the same numbers.

    Raises UserError: a method or a layout that is not supported, or tensors that do not fit together.
    """
    method = _method_of(settings, file)
    weights, kept = {}, {}
    for name, parts in _layers(tensors, method.parts, file):
        if set(parts.tensors) == {"weight"}:
            weights[f"{name}.weight"] = parts.tensors["weight"]
            continue
        found = method.read(parts, settings)
        packed = found.packed() if isinstance(found, Matrix) else None
        if packed is not None and keep:
            kept[f"{name}.weight"] = packed
        elif packed is not None:
            weights[f"{name}.weight"] = packed.unpack(dtype)
        else:
            weights[f"{name}.weight"] = (found.numbers() if isinstance(found, Matrix) else found).to(dtype)
    return {**weights, **tensors}, kept


class _Parts(NamedTuple):
    """The tensors of one layer by their last names."""

    file: str
    layer: str
    tensors: dict[str, Tensor]

    def take(self, part: str, dtypes: tuple[torch.dtype, ...], *shape: int | None) -> Tensor:
        """The tensor of one of these dtypes and this shape (None: any size)."""
        found = self.tensors.get(part)
        if found is None:
            raise UserError(
                f"{self.file}: {shortened(self.layer)} lacks {part}, it has {', '.join(self.tensors)}."
            )
        fits = len(shape) == found.dim() and all(
            s is None or s == f for s, f in zip(shape, found.shape, strict=True)
        )
        if found.dtype not in dtypes or not fits or 0 in found.shape:
            wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
            sizes = ", ".join("any" if s is None else str(s) for s in shape)
            raise UserError(
                f"{self.file}: {shortened(self.layer)}.{part} must be {wanted} of shape ({sizes}), it is "
                f"{str(found.dtype).removeprefix('torch.')} of shape {tuple(found.shape)}."
            )
        return found

    def refuse(self, why: str) -> UserError:
        return UserError(f"{self.file}: {shortened(self.layer)} {why}.")


class _Method(NamedTuple):
    parts: tuple[str, ...]
    read: Callable[[_Parts, Mapping[str, Any]], Matrix | Tensor]


def _layers(tensors: dict[str, Tensor], parts: tuple[str, ...], file: str) -> Iterator[tuple[str, _Parts]]:
    """(name, its tensors) of each layer. What is no part of one stays in `tensors`."""
    layers: dict[str, dict[str, str]] = {}
    for name in tensors:
        part = next((p for p in parts if name.endswith(f".{p}")), None)
        if part is not None:
            layers.setdefault(name.removesuffix(f".{part}"), {})[part] = name
    for layer, names in layers.items():
        yield layer, _Parts(file, layer, {part: tensors.pop(name) for part, name in names.items()})


def _unpacked(words: Tensor, bits: int) -> Tensor:
    """The fields of int32 words [...], lowest first, as int32 [..., 32 / bits]."""
    return (words[..., None] >> torch.arange(0, 32, bits, dtype=torch.int32)) & ((1 << bits) - 1)


def _spread(codes: Tensor, scales: Tensor, zeros: Tensor | None, of_column: Tensor) -> Tensor:
    """float32 [N, K] of codes whose column k belongs to group of_column[k]."""
    numbers = codes.float()
    if zeros is not None:
        numbers -= zeros[:, of_column]
    return numbers.mul_(scales[:, of_column])


def _matrix(
    parts: _Parts, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, g_idx: Tensor | None
) -> Matrix | Tensor:
    """codes, scales and zeros [N, ...] as a matrix, or as numbers where columns of a group lie apart (g_idx)."""
    columns, groups = codes.shape[1], scales.shape[1]
    scales, zeros = scales.float(), None if zeros is None else zeros.float()
    sizes = (columns // groups,) if columns % groups == 0 else _GROUPS
    group = next((size for size in sizes if size and -(-columns // size) == groups), 0)
    if not group:
        raise parts.refuse(
            f"has {groups} scales in a row of {columns} columns, which are no groups of one size"
        )
    if g_idx is not None:
        of_column = g_idx.long()
        if of_column.shape != (columns,) or not 0 <= int(of_column.min()) <= int(of_column.max()) < groups:
            raise parts.refuse(f"must name a group below {groups} for each of its {columns} columns (g_idx)")
        if not torch.equal(of_column, torch.arange(columns) // group):
            return _spread(codes, scales, zeros, of_column)
    return Matrix(codes, scales, zeros, bits, group)


def _gptq(parts: _Parts, settings: Mapping[str, Any]) -> Matrix | Tensor:
    """qweight holds K in its words, qzeros N: zero - 1 in the first version of the format."""
    bits = _bits(settings, (4, 8))
    qweight = parts.take("qweight", (torch.int32,), None, None)
    rows, columns = qweight.shape[1], qweight.shape[0] * 32 // bits
    scales = parts.take("scales", _FLOATS, None, rows)
    qzeros = parts.take("qzeros", (torch.int32,), len(scales), -(-rows * bits // 32))
    g_idx = parts.take("g_idx", (torch.int32, torch.int64), columns) if "g_idx" in parts.tensors else None
    if "bias" in parts.tensors and parts.tensors["bias"].any():  # old versions write a bias of zeros
        raise parts.refuse("has a bias, which a LLaMA does not have")
    middle, first = 1 << (bits - 1), settings.get("checkpoint_format") != "gptq_v2"
    codes = _unpacked(qweight.T.contiguous(), bits).flatten(1)
    zeros = (_unpacked(qzeros, bits).flatten(1)[:, :rows] + first) & ((1 << bits) - 1)
    return _matrix(parts, (codes - middle).to(torch.int8), scales.T, zeros.T - middle, bits, g_idx)


def _awq(parts: _Parts, settings: Mapping[str, Any]) -> Matrix | Tensor:
    """qweight and qzeros hold N in their words, in `_AWQ_ORDER`."""
    _bits(settings, (4,))
    scales = parts.take("scales", _FLOATS, None, None)
    groups, rows = scales.shape
    qweight = parts.take("qweight", (torch.int32,), None, -(-rows // 8))
    qzeros = parts.take("qzeros", (torch.int32,), groups, -(-rows // 8))
    places = torch.tensor(_AWQ_ORDER).argsort()  # of each column, its 4 bits
    codes, zeros = (
        _unpacked(words, 4)[..., places].flatten(1)[:, :rows].T - 8 for words in (qweight, qzeros)
    )
    return _matrix(parts, codes.to(torch.int8).contiguous(), scales.T, zeros, 4, None)


def _compressed_tensors(parts: _Parts, settings: Mapping[str, Any]) -> Matrix | Tensor:
    """Packed words hold code + 2^(bits - 1), K in words of a row, and of zeros N in words of a column."""
    tensors = parts.tensors
    g_idx = tensors.get("weight_g_idx")
    if "weight_packed" not in tensors:
        dtypes = (torch.int8, *_FLOAT8)
        weight = parts.take("weight", dtypes, None, None)
        if weight.dtype in _FLOAT8:
            return _float8(parts, settings)
        scales = parts.take("weight_scale", _FLOATS, *_scale_shape(tensors.get("weight_scale"), len(weight)))
        zeros = tensors.get("weight_zero_point")
        if zeros is not None and (zeros.dtype.is_floating_point or zeros.numel() != scales.numel()):
            raise parts.refuse("has other zero points than scales")
        scales = scales.reshape(-1, scales.shape[-1] if scales.dim() == 2 else 1).expand(len(weight), -1)
        zeros = None if zeros is None else zeros.reshape(-1, scales.shape[1]).expand(len(weight), -1)
        return _matrix(parts, weight, scales, zeros, 8, g_idx)
    shape = parts.take("weight_shape", (torch.int64, torch.int32), 2)
    rows, columns = shape.tolist()
    words = parts.take("weight_packed", (torch.int32,), rows, None)
    bits = next((b for b in (4, 8) if columns > 0 and words.shape[1] == -(-columns * b // 32)), 0)
    if not bits:
        raise parts.refuse(
            f"holds {words.shape[1]} words in a row of {columns} columns: 4 and 8 bits are supported"
        )
    middle = 1 << (bits - 1)
    codes = _unpacked(words, bits).flatten(1)[:, :columns] - middle
    scales = parts.take("weight_scale", _FLOATS, rows, None)
    zeros = None
    if "weight_zero_point" in tensors:
        packed = parts.take("weight_zero_point", (torch.int32,), -(-rows * bits // 32), scales.shape[1])
        zeros = _unpacked(packed.T.contiguous(), bits).flatten(1)[:, :rows].T - middle
    return _matrix(parts, codes.to(torch.int8), scales, zeros, bits, g_idx)


def _scale_shape(scales: Tensor | None, rows: int) -> tuple[int | None, ...]:
    """The shape that a scale of one value, or of a row in `rows`, must have."""
    if scales is None or scales.dim() < 2:
        return (1,)
    return (rows, None) if len(scales) != 1 else (1, 1)


def _bitsandbytes(parts: _Parts, settings: Mapping[str, Any]) -> Matrix | Tensor:
    """LLM.int8: weight * SCB / 127. Four bits: places in a table of 16 numbers, high half of a byte first."""
    tensors = parts.tensors
    if "SCB" in tensors:
        weight = parts.take("weight", (torch.int8,), None, None)
        if tensors.get("weight_format", torch.tensor(0)).any():
            raise parts.refuse(
                "is stored in an order for one kind of GPU (weight_format): only row order is read"
            )
        scales = parts.take("SCB", (torch.float32,), len(weight)) / 127
        return _matrix(parts, weight, scales[:, None], None, 8, None)
    state = _four_bit_state(parts)
    rows, columns, block = state["rows"], state["columns"], state["blocksize"]
    blocks = -(-rows * columns // block)
    weight = parts.take("weight", (torch.uint8,), -(-rows * columns // 2), 1).flatten()
    table = parts.take("weight.quant_map", (torch.float32,), 16)
    if "weight.nested_absmax" in tensors:
        nested = state["nested_blocksize"]
        largest = parts.take("weight.nested_absmax", (torch.float32,), -(-blocks // nested))
        values = parts.take("weight.nested_quant_map", (torch.float32,), 256)
        absmax = values[parts.take("weight.absmax", (torch.uint8,), blocks).long()]
        absmax = absmax * largest.repeat_interleave(nested)[:blocks] + state["nested_offset"]
    else:
        absmax = parts.take("weight.absmax", (torch.float32,), blocks)
    codes = torch.stack([weight >> 4, weight & 15], 1).flatten()[: rows * columns].long()
    return table[codes].mul_(absmax.repeat_interleave(block)[: rows * columns]).view(rows, columns)


def _four_bit_state(parts: _Parts) -> dict[str, Any]:
    """What bitsandbytes writes as JSON in a tensor of bytes, checked."""
    name = next((p for p in parts.tensors if p.startswith("weight.quant_state.")), "weight.quant_state")
    content = parts.take(name, (torch.uint8,), None)
    try:
        state = json.loads(bytes(content.tolist()))
        rows, columns = state["shape"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise parts.refuse(f"has a {name} that is no description of a matrix") from None
    fields = {"rows": rows, "columns": columns} | {
        key: state[key] for key in ("blocksize", "nested_blocksize") if key in state
    }
    where = f"{parts.file}: {shortened(parts.layer)}.{name}"
    checked = {key: number(fields, where, key, int) for key in fields}
    offset = state.get("nested_offset", 0.0)
    if type(offset) not in (int, float) or "blocksize" not in checked:
        raise parts.refuse(f"has a {name} without a block size, or with an offset that is no number")
    return {"nested_blocksize": 256, **checked, "nested_offset": float(offset)}


def _torchao(parts: _Parts, settings: Mapping[str, Any]) -> Matrix | Tensor:
    """Codes in bytes, of 4 bits too: those are told by their size."""
    codes = parts.take("_weight_qdata", (torch.int8,), None, None)
    scales = parts.take("_weight_scale", _FLOATS, len(codes), None)
    zeros = parts.tensors.get("_weight_zero_point")
    if zeros is not None and zeros.shape != scales.shape:
        raise parts.refuse("has other zero points than scales")
    four = scales.shape[1] > 1 and -8 <= int(codes.min()) <= int(codes.max()) <= 7
    return _matrix(parts, codes, scales, zeros, 4 if four else 8, None)


def _float8(parts: _Parts, settings: Mapping[str, Any]) -> Tensor:
    """weight times a scale for all of it, each row, or each block."""
    weight = parts.take("weight", _FLOAT8, None, None)
    name = "weight_scale_inv" if "weight_scale_inv" in parts.tensors else "weight_scale"
    scales = parts.tensors.get(name)
    if scales is not None and scales.numel() == 1:
        return weight.float() * scales.float()
    scales = parts.take(name, _FLOATS, None, None)
    block = [-(-size // count) for size, count in zip(weight.shape, scales.shape, strict=True)]
    if isinstance(given := settings.get("weight_block_size"), list) and len(given) == 2:
        block = given
    if not all(isinstance(b, int) and b > 0 for b in block) or any(
        -(-size // b) != count for size, b, count in zip(weight.shape, block, scales.shape, strict=True)
    ):
        raise parts.refuse(f"has scales of shape {tuple(scales.shape)} for blocks of {shown(block)}")
    for axis in (0, 1):
        scales = scales.float().repeat_interleave(block[axis], axis).narrow(axis, 0, weight.shape[axis])
    return weight.float() * scales


_NF4, _FP4 = (f"weight.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4"))
_METHODS = {
    "gptq": _Method(("qweight", "qzeros", "scales", "g_idx", "bias"), _gptq),
    "awq": _Method(("qweight", "qzeros", "scales"), _awq),
    "compressed-tensors": _Method(
        ("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape", "input_scale",
         "input_zero_point", "weight"),
        _compressed_tensors,
    ),
    "bitsandbytes": _Method(
        ("weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map", _NF4, _FP4, "SCB",
         "weight_format", "weight"),
        _bitsandbytes,
    ),
    "torchao": _Method(("_weight_qdata", "_weight_scale", "_weight_zero_point", "weight"), _torchao),
    "fp8": _Method(("weight_scale_inv", "activation_scale", "weight"), _float8),
    "fbgemm_fp8": _Method(("weight_scale", "input_scale_ub", "weight"), _float8),
}  # fmt: skip
# Settings that change what the layers compute, and the values that change nothing
_MEANINGS: dict[str, dict[str, tuple[Any, ...]]] = {
    "gptq": {
        "checkpoint_format": ("gptq", "gptq_v2"), "is_marlin_format": (False,), "dynamic": ({},),
        "pack_dtype": ("int32",),
    },
    "awq": {"version": ("gemm", "GEMM")},
    "compressed-tensors": {"kv_cache_scheme": (), "transform_config": ({},)},
}  # fmt: skip


def _method_of(settings: Any, file: str) -> _Method:
    given = settings.get("quant_method") if isinstance(settings, Mapping) else None
    if not isinstance(given, str) or given not in _METHODS:
        raise UserError(
            f"{file} describes quantised weights (quantization_config) of quant_method {shown(given)}, supported are "
            f"{', '.join(_METHODS)}; or load a float32, bfloat16 or float16 checkpoint."
        )
    for name, accepted in _MEANINGS.get(given, {}).items():
        value = settings.get(name)
        if value is not None and value not in accepted:
            supported = " or ".join(map(repr, accepted)) or "none"
            raise UserError(
                f"{file} says {name} = {shown(value)} in quantization_config, supported is {supported} with {given}."
            )
    return _METHODS[given]


def _bits(settings: Mapping[str, Any], supported: tuple[int, ...]) -> int:
    bits = settings.get("bits", settings.get("w_bit"))
    if type(bits) is not int or bits not in supported:
        raise UserError(
            f"config.json says {shown(bits)} bits in quantization_config, supported are "
            f"{' and '.join(map(str, supported))}."
        )
    return bits

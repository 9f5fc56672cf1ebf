"""What PTX instructions compute for each lane by itself: arithmetic, comparisons, moves, conversions."""

from __future__ import annotations

import numpy as np
from ptx_module import TYPES, names

SMALLEST = np.float32(2.0**-126)  # what .ftz flushes is smaller


def to_half(x: np.ndarray, kind: str) -> np.ndarray:
    """float32 -> the bits of bf16 or f16, rounded to nearest, ties to even."""
    if kind == "f16":
        return x.astype(np.float16).view(np.uint16)
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def from_half(bits: np.ndarray, kind: str) -> np.ndarray:
    bits = np.ascontiguousarray(bits)
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _shift(a: np.ndarray, count: np.ndarray, shift) -> np.ndarray:
    bits = 8 * a.itemsize
    count = count.view(np.uint32) if count.itemsize == 4 else count.astype(np.uint32)
    shifted = shift(a, np.minimum(count, bits - 1).astype(a.dtype))
    return shifted if a.dtype.kind == "i" else np.where(count >= bits, 0, shifted).astype(a.dtype)


def _funnel(suffixes: list[str], low: np.ndarray, high: np.ndarray, count: np.ndarray) -> np.ndarray:
    """shf.l.wrap and shf.r.wrap: 32 bits out of the 64 of both."""
    both = high.astype(np.uint64) << np.uint64(32) | low.astype(np.uint64)
    count = (count & np.uint32(31)).astype(np.uint64)
    shift = np.uint64(32) - count if suffixes[0] == "l" else count
    return (both >> shift).astype(np.uint32)


def _extract(suffixes: list[str], a: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
    """bfe: `length` bits from `position` on, with their sign if the type has one."""
    position, length = (x.astype(np.int64) & 0xFF for x in (position, length))
    field = (a.astype(np.int64) >> np.minimum(position, 63)) & ((1 << np.minimum(length, 32)) - 1)
    if suffixes[0][0] == "s":
        sign = np.where(length > 0, field >> np.maximum(length - 1, 0) & 1, 0)
        field = field - (sign << length)
    return field.astype(TYPES[suffixes[0]])


def _multiply(suffixes: list[str], a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if suffixes[0] not in ("wide", "hi"):
        return a * b
    wide = f"{a.dtype.kind}{2 * a.itemsize}"
    product = a.astype(wide) * b.astype(wide)
    return product if suffixes[0] == "wide" else (product >> 8 * a.itemsize).astype(a.dtype)


def _divide(suffixes: list[str], a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.dtype.kind == "f":
        return a / b
    safe = np.where(b == 0, 1, b).astype(np.int64)
    return (np.sign(a) * np.sign(safe) * (np.abs(a.astype(np.int64)) // np.abs(safe))).astype(a.dtype)


def _permute(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    source = b.astype(np.uint64) << np.uint64(32) | a.astype(np.uint64)
    result = np.zeros(len(a), np.uint64)
    for i in range(4):
        byte = (selector.astype(np.uint64) >> np.uint64(4 * i)) & np.uint64(7)
        result |= (source >> (byte * np.uint64(8)) & np.uint64(0xFF)) << np.uint64(8 * i)
    return result.astype(np.uint32)


def _extreme(choose):
    """min and max: of a NaN and a number the number (`NaN`: the NaN); `relu`: not below 0."""

    def run(suffixes: list[str], a: np.ndarray, b: np.ndarray) -> np.ndarray:
        found = choose(a, b)
        if "NaN" in suffixes:
            found = np.where(np.isnan(a) | np.isnan(b), np.float32(np.nan), found)
        return np.maximum(found, found.dtype.type(0)) if "relu" in suffixes else found

    return run


COMPARE = {
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal,
}  # fmt: skip


def _compare(suffixes: list[str], a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """setp: a NaN on either side makes lt, le, gt, ge, eq and ne false, and their twins in u (ltu, ...) true."""
    name = suffixes[0]
    unordered = np.isnan(a) | np.isnan(b) if a.dtype.kind == "f" else np.zeros(a.shape, bool)
    if name in ("num", "nan"):
        return unordered ^ (name == "num")
    ordered = COMPARE[name.removesuffix("u")](a, b) & ~unordered
    return ordered | unordered if name.endswith("u") else ordered


ELEMENTWISE = {
    "add": lambda s, a, b: a + b,
    "sub": lambda s, a, b: a - b,
    "mul": _multiply,
    "div": _divide,
    "rem": lambda s, a, b: a - _divide(s, a, b) * b,
    "min": _extreme(np.fmin),
    "max": _extreme(np.fmax),
    "and": lambda s, a, b: a & b,
    "or": lambda s, a, b: a | b,
    "xor": lambda s, a, b: a ^ b,
    "not": lambda s, a: ~a,
    "neg": lambda s, a: -a,
    "abs": lambda s, a: np.abs(a),
    "fma": lambda s, a, b, c: (a.astype(np.float64) * b + c).astype(np.float32),
    "ex2": lambda s, a: np.exp2(a),
    "lg2": lambda s, a: np.log2(a),
    "rcp": lambda s, a: (1 / a).astype(np.float32),
    "sqrt": lambda s, a: np.sqrt(a),
    "rsqrt": lambda s, a: (1 / np.sqrt(a)).astype(np.float32),
    "tanh": lambda s, a: np.tanh(a),
    "copysign": lambda s, a, b: np.copysign(b, a),
    "shl": lambda s, a, b: _shift(a, b, np.left_shift),
    "shr": lambda s, a, b: _shift(a, b, np.right_shift),
    "shf": _funnel,
    "bfe": _extract,
    "setp": _compare,
    "prmt": lambda s, a, b, selector: _permute(a, b, selector),
}
COUNTS = {"shl": 1, "shr": 1, "bfe": 1, "shf": 2}  # from this source on they are counts of bits, as u32


def elementwise(blocks, kind: str, suffixes: list[str], operands, mask: np.ndarray) -> None:
    function, typed = ELEMENTWISE[kind], suffixes[-1]
    if typed in ("bf16", "f16", "bf16x2", "f16x2") and kind not in ("and", "or", "xor", "not"):
        return _of_halves(blocks, kind, suffixes, operands, mask)
    first_count = COUNTS.get(kind, len(operands))
    sources = [
        blocks.value(operand, "u32" if i >= first_count else typed) for i, operand in enumerate(operands[1:])
    ]
    if "ftz" not in suffixes:
        return blocks.assign(operands[0], function(suffixes, *sources), mask)
    result = function(suffixes, *(_flush(source) for source in sources))
    blocks.assign(operands[0], _flush(result) if result.dtype == np.float32 else result, mask)


def _flush(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < SMALLEST, np.copysign(np.float32(0), x), x)


def _of_halves(blocks, kind: str, suffixes: list[str], operands, mask: np.ndarray) -> None:
    """Arithmetic on bf16 and f16, one in a register or two; setp has a predicate for each."""
    typed = suffixes[-1]
    half, packed = typed.removesuffix("x2"), typed.endswith("x2")
    sources = [
        from_half(blocks.value(operand, typed).view(np.uint16).reshape(blocks.lanes, -1), half)
        for operand in operands[1:]
    ]
    result = ELEMENTWISE[kind](suffixes, *sources)
    if kind == "setp":
        for column, name in enumerate(operands[0].split("|")):
            blocks.assign(name, result[:, column], mask)
        return
    bits = np.ascontiguousarray(to_half(result.astype(np.float32), half))
    blocks.assign(operands[0], bits.view(np.uint32)[:, 0] if packed else bits[:, 0], mask)


def mov(blocks, suffixes, operands, mask):
    to, source = operands
    half = {"b32": "b16", "b64": "b32"}.get(suffixes[-1], "")
    if source[0] == "{":
        halves = np.stack([blocks.value(name, half) for name in names(source)], 1)
        blocks.assign(to, np.ascontiguousarray(halves).view(TYPES[suffixes[-1]])[:, 0], mask)
    elif to[0] == "{":
        halves = blocks.value(source, suffixes[-1]).view(TYPES[half]).reshape(blocks.lanes, 2)
        for name, column in zip(names(to), halves.T, strict=True):
            if name != "_":
                blocks.assign(name, np.ascontiguousarray(column), mask)
    else:
        blocks.assign(to, blocks.value(source, suffixes[-1]), mask)


def cvta(blocks, suffixes, operands, mask):
    blocks.assign(operands[0], blocks.value(operands[1], "u64"), mask)


def cvt(blocks, suffixes, operands, mask):
    to, source = suffixes[-2:]
    if to in ("bf16x2", "f16x2"):
        high, low = (to_half(blocks.value(name, "f32"), to[:-2]).astype(np.uint32) for name in operands[1:])
        return blocks.assign(operands[0], high << np.uint32(16) | low, mask)
    if source in ("bf16", "f16"):
        value = from_half(blocks.value(operands[1], "b16"), source)
    else:
        value = blocks.value(operands[1], source)
    if to in ("bf16", "f16"):
        value = to_half(value.astype(np.float32), to)
    elif value.dtype.kind == "f" and np.dtype(TYPES[to]).kind in "iu":
        value = _to_integer(value, suffixes, np.dtype(TYPES[to]))
    else:
        value = value.astype(TYPES[to])
    blocks.assign(operands[0], value, mask)


def _to_integer(value: np.ndarray, suffixes: list[str], dtype: np.dtype) -> np.ndarray:
    """Rounded, and cut to the type's range; NaN becomes 0."""
    rounds = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
    (rounded,) = (rounds[suffix](value.astype(np.float64)) for suffix in suffixes if suffix in rounds)
    limits = np.iinfo(dtype)
    cut = np.clip(np.nan_to_num(rounded, nan=0.0), limits.min, limits.max)
    return cut.astype(dtype)


def selp(blocks, suffixes, operands, mask):
    a, b = (blocks.value(name, suffixes[-1]) for name in operands[1:3])
    blocks.assign(operands[0], np.where(blocks.value(operands[3], "pred"), a, b), mask)


def mad(blocks, suffixes, operands, mask):
    kind = suffixes[-1]
    wide = f"{kind[0]}64" if suffixes[0] == "wide" else kind
    a, b = (blocks.value(name, kind).astype(TYPES[wide]) for name in operands[1:3])
    blocks.assign(operands[0], a * b + blocks.value(operands[3], wide), mask)


def shfl(blocks, suffixes, operands, mask):
    blocks.require_whole_warps(mask)
    value, other = blocks.value(operands[1], "b32"), blocks.value(operands[2], "s32")
    lane = blocks.lane_numbers % 32
    source = {"bfly": lane ^ other, "idx": other & 31, "up": lane - other, "down": lane + other}[suffixes[1]]
    source = np.where((source < 0) | (source > 31), lane, source)
    blocks.assign(operands[0].partition("|")[0], value[blocks.lane_numbers - lane + source], mask)


OPERATIONS = {"mov": mov, "cvta": cvta, "cvt": cvt, "selp": selp, "mad": mad, "shfl": shfl}

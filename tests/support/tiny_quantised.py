"""Small quantised Hugging Face folders. Each writer packs word by word as the format's description says, and returns
what the layer's numbers must be."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

RANDOM = np.random.default_rng(0)
Written = tuple[dict[str, Tensor], np.ndarray]
Writer = Callable[[int, int], Written]


def write_folder(
    folder: Path, settings: dict[str, Any], writer: Writer, ends: str | tuple[str, ...] = "_proj.weight"
) -> dict[str, Tensor]:
    """Replaces the weights with these ends (all linear layers) in a plain folder. Returns their numbers by name."""
    weights = load_file(folder / "model.safetensors")
    numbers = {}
    for name in [name for name in weights if name.endswith(ends)]:
        parts, expected = writer(*weights.pop(name).shape)
        layer = name.removesuffix(".weight")
        weights |= {f"{layer}.{part}": tensor.contiguous() for part, tensor in parts.items()}
        numbers[name.removeprefix("model.")] = torch.from_numpy(expected.astype(np.float32))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return numbers


def _words(values: Iterable[Iterable[int]], bits: int) -> np.ndarray:
    """Rows of unsigned fields in int32 words, the first field lowest. A last word may not be full."""
    per_word = 32 // bits
    rows = []
    for row in values:
        fields = [int(field) for field in row]
        words = [fields[at : at + per_word] for at in range(0, len(fields), per_word)]
        rows.append([sum(field << (bits * place) for place, field in enumerate(word)) for word in words])
    return np.array(rows, np.uint32).view(np.int32)


def _random_parts(rows: int, columns: int, bits: int, group: int, symmetric: bool) -> tuple[np.ndarray, ...]:
    """Unsigned codes [rows, columns], scales [rows, groups] that float16 holds, zeros [rows, groups]."""
    groups = -(-columns // group)
    codes = RANDOM.integers(0, 1 << bits, (rows, columns))
    scales = (RANDOM.uniform(0.16, 0.32, (rows, groups)) / (1 << bits)).astype(np.float16).astype(np.float64)
    zeros = RANDOM.integers(0, 1 << bits, (rows, groups))
    return codes, scales, np.full_like(zeros, 1 << (bits - 1)) if symmetric else zeros


def _numbers(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray, of_column: np.ndarray) -> np.ndarray:
    return scales[:, of_column] * (codes - zeros[:, of_column])


def gptq(bits: int, group: int, symmetric: bool = True, version: int = 1, act_order: bool = False) -> Writer:
    def write(rows: int, columns: int) -> Written:
        size = columns if group == -1 else group
        codes, scales, zeros = _random_parts(rows, columns, bits, size, symmetric)
        of_column = np.arange(columns) // size
        if act_order:
            of_column = RANDOM.permutation(of_column)
        stored = zeros if version == 2 else (zeros - 1) % (1 << bits)
        return {
            "qweight": torch.from_numpy(_words(codes, bits).T.copy()),
            "qzeros": torch.from_numpy(_words(stored.T, bits)),
            "scales": torch.from_numpy(scales.T.copy()).half(),
            "g_idx": torch.from_numpy(of_column.astype(np.int32)),
            "bias": torch.zeros(rows, dtype=torch.float16),
        }, _numbers(codes, scales, zeros, of_column)

    return write


def awq(group: int) -> Writer:
    def packed(values: np.ndarray) -> Tensor:  # [.., N]: of 8 columns, the word holds 0 2 4 6 1 3 5 7
        by_word = values.reshape(len(values), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]]
        return torch.from_numpy(_words(by_word.reshape(len(values), -1), 4))

    def write(rows: int, columns: int) -> Written:
        codes, scales, zeros = _random_parts(rows, columns, 4, group, symmetric=False)
        parts = {
            "qweight": packed(codes.T),
            "qzeros": packed(zeros.T),
            "scales": torch.from_numpy(scales.T.copy()).half(),
        }
        return parts, _numbers(codes, scales, zeros, np.arange(columns) // group)

    return write


def compressed(bits: int, group: int, symmetric: bool = True, act_order: bool = False) -> Writer:
    """compressed-tensors' "pack-quantized"."""

    def write(rows: int, columns: int) -> Written:
        size = columns if group == -1 else group
        codes, scales, zeros = _random_parts(rows, columns, bits, size, symmetric)
        of_column = np.arange(columns) // size
        parts = {
            "weight_packed": torch.from_numpy(_words(codes, bits)),
            "weight_scale": torch.from_numpy(scales).bfloat16(),
            "weight_shape": torch.tensor([rows, columns]),
        }
        scales = parts["weight_scale"].double().numpy()
        if not symmetric:
            parts["weight_zero_point"] = torch.from_numpy(_words(zeros.T, bits).T.copy())
        if act_order:
            of_column = RANDOM.permutation(of_column)
            parts["weight_g_idx"] = torch.from_numpy(of_column.astype(np.int32))
        return parts, _numbers(codes, scales, zeros, of_column)

    return write


def whole_bytes(
    scale: str, zero: str | None = None, code: str = "weight", bits: int = 8, group: int = 0
) -> Writer:
    """Signed codes in bytes with scales [rows, groups], as compressed-tensors, torchao and LLM.int8 keep them."""

    def write(rows: int, columns: int) -> Written:
        size = group or columns
        codes, scales, _ = _random_parts(rows, columns, bits, size, symmetric=True)
        codes -= 1 << (bits - 1)
        kept = scales[:, 0] * 127 if scale == "SCB" else scales
        parts = {code: torch.from_numpy(codes.astype(np.int8)), scale: torch.from_numpy(kept).float()}
        if zero is not None:
            parts[zero] = torch.zeros(scales.shape, dtype=torch.int8)
        if scale == "SCB":
            parts["weight_format"] = torch.tensor(0, dtype=torch.uint8)
        return parts, codes * scales[:, np.arange(columns) // size]

    return write


def float8(scale: str, blocks: tuple[int, int]) -> Writer:
    """Eight-bit floats with a scale for each block of this size; 0: for all rows, all columns."""

    def write(rows: int, columns: int) -> Written:
        height, width = blocks[0] or rows, blocks[1] or columns
        weight = torch.from_numpy(RANDOM.standard_normal((rows, columns))).to(torch.float8_e4m3fn)
        scales = RANDOM.uniform(0.01, 0.02, (-(-rows // height), -(-columns // width))).astype(np.float32)
        of_number = scales[np.arange(rows)[:, None] // height, np.arange(columns)[None] // width]
        return {"weight": weight, scale: torch.from_numpy(scales)}, weight.float().numpy() * of_number

    return write


NF4 = np.array(
    [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626,
     0.723, 1.0], np.float32,
)  # fmt: skip


def nf4(double: bool) -> Writer:
    """bitsandbytes' four bits: blocks of 64, the largest of each as a float, or (double) as a byte of its own."""

    def write(rows: int, columns: int) -> Written:
        codes = RANDOM.integers(0, 16, rows * columns)
        blocks = -(-codes.size // 64)
        state: dict[str, Any] = {
            "quant_type": "nf4",
            "blocksize": 64,
            "dtype": "bfloat16",
            "shape": [rows, columns],
        }
        parts = {
            "weight": torch.from_numpy((codes[::2] << 4 | codes[1::2]).astype(np.uint8))[:, None],
            "weight.quant_map": torch.from_numpy(NF4.copy()),
        }
        if double:
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.05}
            table = np.sort(RANDOM.uniform(-1, 1, 256)).astype(np.float32)
            bytes_ = RANDOM.integers(0, 256, blocks)
            largest = RANDOM.uniform(0.01, 0.02, -(-blocks // 256)).astype(np.float32)
            absmax = table[bytes_] * largest[np.arange(blocks) // 256] + np.float32(0.05)
            parts |= {
                "weight.absmax": torch.from_numpy(bytes_.astype(np.uint8)),
                "weight.nested_absmax": torch.from_numpy(largest),
                "weight.nested_quant_map": torch.from_numpy(table),
            }
        else:
            absmax = RANDOM.uniform(0.05, 0.1, blocks).astype(np.float32)
            parts["weight.absmax"] = torch.from_numpy(absmax)
        content = json.dumps(state).encode()
        parts["weight.quant_state.bitsandbytes__nf4"] = torch.frombuffer(
            bytearray(content), dtype=torch.uint8
        )
        numbers = NF4[codes] * absmax[np.arange(codes.size) // 64]
        return parts, numbers.reshape(rows, columns)

    return write

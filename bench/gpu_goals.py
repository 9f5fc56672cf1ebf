"""The goals that were set for the Triton and CUDA kernels, and for whole models, on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

from .contenders import ACCELERATED, PEFT
from .goals import Figure, Goal, faster_than, ratio, rows_of
from .ledger import Row
from .providers import EACH, TWICE
from .suites.attention import NO_PROMPTS, PROMPTS_ONLY
from .suites.decode import PROBE
from .suites.memory import NEEDED, PEAK
from .suites.train import PEAK as PEAK_GB


def rate(row: Row, rows: Sequence[Row]) -> float | None:
    return row.tflops


def of_full_backward(row: Row, rows: Sequence[Row]) -> float | None:
    full = [r.p50_ms for r in rows if (r.shape, r.dtype, r.provider, r.cache, r.launch, r.mode) == (
        row.shape, row.dtype, row.provider, row.cache, row.launch, "backward")]  # fmt: skip
    return row.p50_ms / full[-1] if full and full[-1] and row.p50_ms else None


def share_of_copy(row: Row, rows: Sequence[Row]) -> float | None:
    slower = row.ratios.get(PROBE["cuda"])
    return 1 / slower if slower else None


def microseconds(row: Row, rows: Sequence[Row]) -> float | None:
    return None if row.p50_ms is None else 1e3 * row.p50_ms


def speed_over(other: str) -> Figure:
    """Tokens per second over another contender's on the same base."""

    def figure(row: Row, rows: Sequence[Row]) -> float | None:
        theirs = [r.figures["tokens/s"] for r in rows if (r.setting, r.provider) == (row.setting, other)]
        return row.figures["tokens/s"] / theirs[-1] if theirs else None

    return figure


def peak_over(*others: str) -> Figure:
    """Peak memory over the least of the others'."""

    def figure(row: Row, rows: Sequence[Row]) -> float | None:
        theirs = [r.figures.get(PEAK_GB) for r in rows if r.setting == row.setting and r.provider in others]
        known = [peak for peak in theirs if peak]
        return row.figures[PEAK_GB] / min(known) if known and PEAK_GB in row.figures else None

    return figure


def peak_share(row: Row, rows: Sequence[Row]) -> float | None:
    return row.figures[PEAK] / row.figures[NEEDED]


LLAMA = {T: f"LLaMA-7B, B {16384 // T}, T {T}" for T in (512, 1024, 2048, 4096, 8192)}
LONG = [LLAMA[T] for T in (1024, 2048, 4096, 8192)]
BIG_CACHES = ("LLaMA-7B, B 32, S 4096", "Llama-3-8B, B 64, S 8192")
# 32 query heads on 8 of keys: with 32 of keys, 4096 of them take 14 us to read at 4.8 TB/s
ONE_STREAM = {S: f"Llama-3-8B, B 1, S {S}" for S in (1024, 4096, 16384)}

TRITON = "zinit triton"
CUDA = "zinit cuda"
PEFT_ON_3B = rows_of(ACCELERATED, "train", "training step", "Llama-3.2-3B")
LORA = "LoRA r = 32"
GPU_GOALS = (
    *(
        Goal(f"Triton forward, T = {T}: TFLOP/s", rows_of(TRITON, "attention", "forward", LLAMA[T]), rate, bound, True)
        for T, bound in ((512, 300), (1024, 380), (2048, 430), (4096, 460), (8192, 480))
    ),
    Goal("Triton forward / best plain SDPA", rows_of(TRITON, "attention", "forward", *LLAMA.values()),
         ratio("plain SDPA"), 1.10),
    Goal("Triton forward / SDPA twice + add, T = 512", rows_of(TRITON, "attention", "forward", LLAMA[512]),
         ratio(TWICE, f"{TWICE}, compiled"), 0.60),
    Goal("Triton forward / SDPA twice + add, T = 2048", rows_of(TRITON, "attention", "forward", LLAMA[2048]),
         ratio(TWICE, f"{TWICE}, compiled"), 0.85),
    Goal("Triton backward / best plain SDPA, T = 1024 to 8192", rows_of(TRITON, "attention", "backward", *LONG),
         ratio("plain SDPA"), 1.20),
    Goal("Triton lowest adapted layer / full backward",
         rows_of(TRITON, "attention", PROMPTS_ONLY, *LLAMA.values()), of_full_backward, 0.15),
    Goal("Triton peak memory / outputs and gradients", rows_of(TRITON, "memory", "forward+backward", *LLAMA.values()),
         peak_share, 1.02),
    Goal("Triton decode, B = 32, S = 4096: share of copy bandwidth",
         rows_of(TRITON, "decode", "decode", "LLaMA-7B, B 32, S 4096", "Llama-3-8B, B 32, S 4096"), share_of_copy,
         0.80, True),
    Goal("CUDA decode, big caches: share of copy bandwidth", rows_of(CUDA, "decode", "decode", *BIG_CACHES),
         share_of_copy, 0.88, True),
    *(
        Goal(f"CUDA decode, one stream, S = {S}, in a graph: us",
             rows_of(CUDA, "decode", "decode", ONE_STREAM[S], launch="graph"), microseconds, bound)
        for S, bound in ((1024, 7), (4096, 9), (16384, 24))
    ),
    Goal("CUDA decode, one stream / SDPA twice + add", rows_of(CUDA, "decode", "decode", *ONE_STREAM.values()),
         ratio(TWICE), 0.5),
    Goal("CUDA decode / itself without prompts",
         rows_of(CUDA, "decode", "decode", *ONE_STREAM.values(), *BIG_CACHES), ratio(NO_PROMPTS), 1.03),
    Goal("CUDA decode, an adapter for each sequence / one for all",
         rows_of(f"{CUDA}{EACH}", "decode", "decode", "Llama-3-8B, B 64, S 8192"), ratio(CUDA), 1.05),
    Goal("CUDA forward, T = 2048: share of Triton's speed", rows_of(CUDA, "attention", "forward", LLAMA[2048]),
         faster_than(TRITON), 0.60, True),
    Goal("PEFT accelerated / PEFT, Llama-3.2-3B: tokens/s", PEFT_ON_3B, faster_than(PEFT), 1.35, True),
    Goal(f"PEFT accelerated / {LORA}, Llama-3.2-3B: tokens/s", PEFT_ON_3B, speed_over(LORA), 1.15, True),
    Goal("PEFT accelerated / either, Llama-3.2-3B: peak memory", PEFT_ON_3B, peak_over(PEFT, LORA), 1.0),
)  # fmt: skip

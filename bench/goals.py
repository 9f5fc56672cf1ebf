"""The goals that were set for the kernels on a GPU, and what a run's rows say to each: met, or by how much missed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from rich.table import Table

from .ledger import Row
from .suites.attention import PROMPTS_ONLY
from .suites.decode import PROBE
from .suites.memory import NEEDED, PEAK


class Goal(NamedTuple):
    """A bound on one figure of the rows that `select` picks; the worst of them counts."""

    what: str
    select: Callable[[Row], bool]
    figure: Callable[[Row, Sequence[Row]], float | None]
    bound: float
    at_least: bool = False


def ratio(*names: str) -> Callable[[Row, Sequence[Row]], float | None]:
    """The greatest of a row's ratios to these providers, of those it has."""
    return lambda row, rows: max((row.ratios[name] for name in names if name in row.ratios), default=None)


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


def peak_share(row: Row, rows: Sequence[Row]) -> float | None:
    return row.figures[PEAK] / row.figures[NEEDED]


def rows_of(
    provider: str, suite: str, mode: str, *shapes: str, launch: str = "eager"
) -> Callable[[Row], bool]:
    return lambda row: (
        (row.provider, row.suite, row.mode, row.launch, row.cache, row.dtype)
        == (provider, suite, mode, launch, "warm", "bfloat16")
        and any(row.shape.endswith(shape) for shape in shapes)
    )


TWICE = "SDPA twice + add"
LLAMA = {T: f"LLaMA-7B, B {16384 // T}, T {T}" for T in (512, 1024, 2048, 4096, 8192)}
LONG = [LLAMA[T] for T in (1024, 2048, 4096, 8192)]
BIG_CACHES = ("LLaMA-7B, B 32, S 4096", "Llama-3-8B, B 64, S 8192")
ONE_STREAM = {S: f"LLaMA-7B, B 1, S {S}" for S in (1024, 4096, 16384)}

TRITON = "zinit triton"
CUDA = "zinit cuda"
GOALS = (
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
         rows_of(CUDA, "decode", "decode", *ONE_STREAM.values(), *BIG_CACHES), ratio("no prompts"), 1.03),
)  # fmt: skip


def judged(goal: Goal, rows: Sequence[Row]) -> tuple[float | None, str]:
    """(the worst figure, "met" | "missed by N %" | "not measured")"""
    figures = [goal.figure(row, rows) for row in rows if goal.select(row)]
    known = [figure for figure in figures if figure is not None]
    if not known:
        return None, "not measured"
    worst = min(known) if goal.at_least else max(known)
    excess = goal.bound / worst if goal.at_least else worst / goal.bound
    return worst, "met" if excess <= 1 else f"missed by {100 * (excess - 1):.0f} %"


def goals_table(rows: Sequence[Row]) -> Table:
    table = Table("goal", "bound", "measured (worst)", "", title="goals", box=None, title_justify="left")
    for goal in GOALS:
        worst, verdict = judged(goal, rows)
        sign = ">=" if goal.at_least else "<="
        table.add_row(goal.what, f"{sign} {goal.bound:g}", "" if worst is None else f"{worst:.3g}", verdict)
    return table

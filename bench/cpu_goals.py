"""The goals that were set for the CPU kernels and the drop-ins on a CPU, by float32 and bfloat16."""

from __future__ import annotations

from .goals import Goal, Select, faster_than, ratio, rows_of
from .providers import TWICE
from .suites.attention import NO_PROMPTS, PRODUCT_SHARE
from .suites.bars import FLOOR, FUSED, MODES
from .suites.decode import PROBE
from .suites.dropins import ACCELERATED, BASE, PEFT
from .suites.verify import THEIRS

FORWARD, BOTH = MODES
READ = PROBE["cpu"]
MHA, GROUPED = "LLaMA-7B", "Llama-3-8B"  # 32/32 and 32/8 heads
DTYPES = ("float32", "bfloat16")


def of_length(mode: str, dtype: str, *lengths: int) -> Select:
    """All heads at these lengths."""
    return rows_of(FUSED, "bars", mode, *(f"T {length}" for length in lengths), dtype=dtype)


def of_cache(model: str, dtype: str, *lengths: int) -> Select:
    shapes = (f"{model}, B 1, S {length}" for length in lengths)
    return rows_of(FUSED, "bars", "decode", *shapes, dtype=dtype)


def dropin(mode: str) -> Select:
    return lambda row: (row.provider, row.suite, row.mode) == (ACCELERATED, "dropins", mode)


CPU_GOALS = (
    *(
        Goal(f"{dtype} forward / plain SDPA, T = {name}", of_length(FORWARD, dtype, *lengths), ratio(FLOOR), bound)
        for name, lengths, bounds in (("128, 512", (128, 512), (0.55, 0.50)), ("2048", (2048,), (0.80, 0.80)))
        for dtype, bound in zip(DTYPES, bounds, strict=True)
    ),
    *(
        Goal(f"{dtype} forward + backward / plain SDPA's, T = {length}", of_length(BOTH, dtype, length),
             ratio(FLOOR), bound)
        for length, bounds in ((128, (0.85, 0.18)), (512, (0.58, 0.10)), (2048, (0.75, 0.13)))
        for dtype, bound in zip(DTYPES, bounds, strict=True)
    ),
    *(
        Goal(f"{dtype} forward, T >= 512: {PRODUCT_SHARE} in float32", of_length(FORWARD, dtype, 512, 2048),
             lambda row, rows: row.figures[PRODUCT_SHARE], bound, True)
        for dtype, bound in zip(DTYPES, (0.75, 0.80), strict=True)
    ),
    *(
        Goal(f"{dtype} decode, {name}: times faster than {TWICE}", of_cache(model, dtype, 512, 2048, 8192),
             faster_than(TWICE), bound, True)
        for name, model, bounds in (("MHA", MHA, (1.7, 8.0)), ("32/8", GROUPED, (3.5, 28.0)))
        for dtype, bound in zip(DTYPES, bounds, strict=True)
    ),
    *(
        Goal(f"{dtype} decode, {name}, 8192 keys / {READ}", of_cache(model, dtype, 8192), ratio(READ), bound)
        for name, model, bounds in (("MHA", MHA, (1.3, 1.4)), ("32/8", GROUPED, (1.8, 2.0)))
        for dtype, bound in zip(DTYPES, bounds, strict=True)
    ),
    *(
        Goal(f"{dtype} forward, {name}: prompts on / off", of_length(FORWARD, dtype, *lengths),
             ratio(NO_PROMPTS), bound)
        for name, lengths, bound in (("T = 128", (128,), 1.12), ("T >= 512", (512, 2048), 1.05))
        for dtype in DTYPES
    ),
    *(
        Goal(f"{dtype} decode, 2048 keys and more: prompts on / off",
             rows_of(FUSED, "bars", "decode", "S 2048", "S 8192", dtype=dtype), ratio(NO_PROMPTS), 1.06)
        for dtype in DTYPES
    ),
    Goal("PEFT accelerated / PEFT: CPU time of a training step", dropin("training step"), ratio(PEFT), 0.92),
    Goal("PEFT accelerated / frozen base: CPU time of a training step", dropin("training step"), ratio(BASE), 1.05),
    Goal("PEFT accelerated / PEFT: CPU time of a decoded token", dropin("decode"), ratio(PEFT), 0.70),
    Goal("PEFT accelerated / frozen base: CPU time of a decoded token", dropin("decode"), ratio(BASE), 1.05),
    Goal(f"this clock against {THEIRS}, plain SDPA: difference",
         lambda row: row.suite == "verify" and THEIRS in row.ratios,
         lambda row, rows: abs(row.ratios[THEIRS] - 1), 0.05),
)  # fmt: skip

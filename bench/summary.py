"""The README's table: a handful of figures, wins and losses, and where they come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from .chapters import Measured, chapters, conditions_of, markdown, span
from .contenders import ACCELERATED, PEFT
from .contenders import OURS as ADAPTER
from .goals import Goal, judged, summary
from .ledger import Row
from .providers import TWICE
from .suites.attention import NO_PROMPTS
from .suites.decode import PROBE

FLOOR = "plain SDPA"


class Line(NamedTuple):
    """The range of one ratio over the rows of a suite: this package's time over the peer's."""

    what: str
    suite: str
    provider: Sequence[str]
    mode: str  # "" = any
    peer: Sequence[str]
    lengths: Sequence[int] = ()  # keys; () = all
    inverse: bool = False  # the rows are the peer's

    def figure(self, row: Row) -> float | None:
        if (
            row.suite != self.suite
            or row.provider not in self.provider
            or (row.launch, row.cache) != ("eager", "warm")
        ):
            return None
        if (self.mode and row.mode != self.mode) or (
            self.lengths and row.sizes["seqlen_k"] not in self.lengths
        ):
            return None
        found = next((row.ratios[peer] for peer in self.peer if peer in row.ratios), None)
        return None if found is None else 1 / found if self.inverse else found


def kernels(backend: str, whole: str, one: str, short: Sequence[int], long: Sequence[int]) -> list[Line]:
    """Of one backend: whole sequences from one suite, decoding from another."""
    few, many = f"{span(short)} tokens", f"{span(long)} tokens"
    forward, both, title = "forward", "forward+backward", "" if backend == "cpu" else f"{backend}, "
    mine = [f"zinit {backend}"]
    return [
        Line(f"{title}forward, {few} / {FLOOR}, which has no prompts", whole, mine, forward, [FLOOR], short),
        Line(f"{title}forward, {many} / {FLOOR}", whole, mine, forward, [FLOOR], long),
        Line(f"{title}forward + backward, {few} / {FLOOR}", whole, mine, both, [FLOOR], short),
        Line(f"{title}forward + backward, {many} / {FLOOR}", whole, mine, both, [FLOOR], long),
        Line(f"{title}decoding / {TWICE}", one, mine, "decode", [TWICE]),
        Line(f"{title}decoding / one read of the cache's bytes", one, mine, "decode", list(PROBE.values())),
        Line(f"{title}forward / itself without prompts", whole, mine, forward, [NO_PROMPTS]),
        Line(f"{title}decoding / itself without prompts", one, mine, "decode", [NO_PROMPTS]),
    ]


STEP, ADAPTED, ALONE = "training step", "zinit, adapted", "transformers, base alone"
MODELS = [
    Line("training step / PEFT's adaption prompt", "train", [ADAPTER], STEP, [PEFT]),
    Line("training step / litgpt's adapter", "train", ["litgpt adapter"], STEP, [ADAPTER], inverse=True),
    Line("training step / LoRA r = 8", "train", ["LoRA r = 8"], STEP, [ADAPTER], inverse=True),
    Line("training step / full fine-tuning", "train", ["full fine-tuning"], STEP, [ADAPTER], inverse=True),
    Line("generating / PEFT's adaption prompt", "generate", [ADAPTED], "", [PEFT]),
    Line("generating / litgpt's adapter", "generate", ["litgpt adapter"], "", [ADAPTED], inverse=True),
    Line("generating / transformers, no adapter", "generate", [ALONE], "", [ADAPTED], inverse=True),
    Line("PEFT accelerated / PEFT: training step", "train", [ACCELERATED], STEP, [PEFT]),
    Line("PEFT accelerated / PEFT: generating", "generate", [ACCELERATED], "", [PEFT]),
]
LONG = ((512, 1024, 2048), (4096, 8192))
LINES = {
    "cpu": [*kernels("cpu", "bars", "bars", (128, 512), (2048,)), *MODELS],
    "cuda": [
        *kernels("triton", "attention", "decode", *LONG), *kernels("cuda", "attention", "decode", *LONG), *MODELS
    ],
}  # fmt: skip
HEAD = """This package's time over another's, medians of interleaved rounds, the range over all shapes measured: **below
1 this package is faster**, above 1 slower. `docs/benchmarks.md` has every figure, with pictures.
"""


def readme_table(results: Path, goals_of: Callable[[Sequence[Measured]], Sequence[Goal]]) -> str:
    """What stands between the README's marks."""
    lines = [HEAD]
    for folder, measured in chapters(results).items():
        device = str(measured[0].run.conditions["device"])
        dtypes = sorted({m.row.dtype for m in measured}, reverse=True)  # float32 first
        used: dict[int, Measured] = {}
        table = []
        for line in LINES[device]:
            found: dict[str, list[float]] = {dtype: [] for dtype in dtypes}
            for m in measured:
                if (figure := line.figure(m.row)) is not None:
                    found[m.row.dtype].append(figure)
                    used[id(m)] = m
            if any(found.values()):
                table.append([line.what, *(span(found[dtype], ".2f") for dtype in dtypes)])
        if not table:
            continue
        lines += markdown([str(measured[0].run.conditions["chip"]), *dtypes], table)
        ledgers = dict.fromkeys(m.row.suite for m in used.values())
        names = ", ".join(f"`{suite}.jsonl`" for suite in ledgers)
        verdicts = [judged(goal, [m.row for m in measured]) for goal in goals_of(measured)]
        lines += [
            f"From {names} in `bench/results/{folder}/`. {summary(verdicts)}; the page says which are missed, and by "
            "how much. Measured on:",
            *(f"- {sentence}" for sentence in conditions_of(list(used.values()))),
            "",
        ]
    return "\n".join(lines).rstrip()

"""The README's table: a handful of figures, wins and losses, and where they come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from .chapters import OURS, Measured, chapters, conditions_of, grouped, markdown, span
from .contenders import ACCELERATED, PEFT
from .contenders import OURS as ADAPTER
from .goals import Goal, judged, summary
from .ledger import Row
from .providers import TWICE, decode_providers, prefill_providers
from .suites.attention import NO_PROMPTS
from .suites.decode import PROBE

FLOOR = "plain SDPA"
PROMPTED = {
    provider.name
    for provider in (*prefill_providers(), *decode_providers())
    if provider.prompted and not provider.name.startswith("zinit")
}
WHOLE = ("forward", "forward+backward", "decode")  # modes that are a call of the user's


class Line(NamedTuple):
    """The range of one ratio over the rows of a suite: this package's time over the peer's."""

    what: str
    suite: str
    provider: Sequence[str]
    mode: str  # "" = any
    peer: Sequence[str]
    lengths: Sequence[int] = ()  # keys; () = all
    inverse: bool = False  # the rows are the peer's

    def figures(self, rows: Sequence[Measured]) -> list[tuple[Measured, float]]:
        found = [(m, self.figure(m.row)) for m in rows]
        return [(m, figure) for m, figure in found if figure is not None]

    def figure(self, row: Row) -> float | None:
        if row.suite != self.suite or row.provider not in self.provider or not plainly(row):
            return None
        if (self.mode and row.mode != self.mode) or (
            self.lengths and row.sizes["seqlen_k"] not in self.lengths
        ):
            return None
        found = next((row.ratios[peer] for peer in self.peer if peer in row.ratios), None)
        return None if found is None else 1 / found if self.inverse else found


class Fastest(NamedTuple):
    """The range, over all settings of a suite, of this package's time over that of the fastest other which computes the
    prompts too: another one from shape to shape."""

    what: str
    suite: str
    provider: str
    mode: str

    def figures(self, rows: Sequence[Measured]) -> list[tuple[Measured, float]]:
        others = [
            m
            for m in rows
            if (m.row.suite, m.row.mode) == (self.suite, self.mode)
            and plainly(m.row)
            and m.row.provider in PROMPTED
            and self.provider in m.row.ratios
        ]
        fastest = [
            min(group, key=lambda m: m.row.ratios[self.provider])
            for group in grouped(others, "shape", "dtype", "layout").values()
        ]
        return [(m, 1 / m.row.ratios[self.provider]) for m in fastest]


def plainly(row: Row) -> bool:
    return (row.launch, row.cache) == ("eager", "warm")


def kernels(
    backend: str, whole: str, one: str, short: Sequence[int], long: Sequence[int]
) -> list[Line | Fastest]:
    """Of one backend: whole sequences from one suite, decoding from another; the fastest other from all shapes."""
    few, many = f"{span(short)} tokens", f"{span(long)} tokens"
    forward, both, title = "forward", "forward+backward", "" if backend == "cpu" else f"{backend}, "
    mine = [f"zinit {backend}"]
    other = "every shape / the fastest other that has prompts"
    return [
        Line(f"{title}forward, {few} / {FLOOR}, which has no prompts", whole, mine, forward, [FLOOR], short),
        Line(f"{title}forward, {many} / {FLOOR}", whole, mine, forward, [FLOOR], long),
        Line(f"{title}forward + backward, {few} / {FLOOR}", whole, mine, both, [FLOOR], short),
        Line(f"{title}forward + backward, {many} / {FLOOR}", whole, mine, both, [FLOOR], long),
        Fastest(f"{title}forward, {other}", "attention", mine[0], forward),
        Fastest(f"{title}forward + backward, {other}", "attention", mine[0], both),
        Fastest(f"{title}decoding, {other}", "decode", mine[0], "decode"),
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
HEAD = """This package's time over another's, medians of interleaved rounds, the range over the shapes of a row:
**below 1 this package is faster**, above 1 slower. [docs/benchmarks.md](docs/benchmarks.md) has every figure, with
pictures. Of plain SDPA's kernels, where several were timed, the fastest of each round counts.
"""


def readme_table(results: Path, goals_of: Callable[[Sequence[Measured]], Sequence[Goal]]) -> str:
    """What stands between the README's marks: of each kind of device one chip's table, a sentence of the others."""
    lines = [HEAD]
    found = chapters(results)
    for device in dict.fromkeys(map(device_of, found.values())):
        folders = [folder for folder in found if device_of(found[folder]) == device]
        first, *others = sorted(folders, key=lambda folder: completeness(found[folder]), reverse=True)
        lines += chip_table(first, found[first], goals_of(found[first]))
        if others:
            lines += [
                "Other chips, whose tables the page has:",
                *(short_of(folder, found[folder], goals_of(found[folder])) for folder in others),
                "",
            ]
    return "\n".join(lines).rstrip()


def device_of(rows: Sequence[Measured]) -> str:
    return str(rows[0].run.conditions["device"])


def completeness(rows: Sequence[Measured]) -> tuple[int, str]:
    """How many suites were measured, and when the last of them: a few new rows of a chip hide no whole page of
    another's, and a whole page hides an older one, be it better or worse."""
    return len({m.row.suite for m in rows}), max(str(m.run.conditions["time"]) for m in rows)


def chip_table(folder: str, measured: Sequence[Measured], goals: Sequence[Goal]) -> list[str]:
    dtypes = sorted({m.row.dtype for m in measured}, reverse=True)  # float32 first
    used: dict[int, Measured] = {}
    table = []
    for line in LINES[device_of(measured)]:
        found: dict[str, list[float]] = {dtype: [] for dtype in dtypes}
        for m, figure in line.figures(measured):
            found[m.row.dtype].append(figure)
            used[id(m)] = m
        if any(found.values()):
            table.append([line.what, *(span(found[dtype], ".2f") for dtype in dtypes)])
    if not table:
        return []
    ledgers = dict.fromkeys(m.row.suite for m in used.values())
    names = ", ".join(f"`{suite}.jsonl`" for suite in ledgers)
    return [
        *markdown([str(measured[0].run.conditions["chip"]), *dtypes], table),
        *coverage(measured),
        "",
        f"From {names} in `bench/results/{folder}/`. {goals_met(measured, goals)}; the page says which are missed, "
        "and by how much. Measured on:",
        *(f"- {sentence}" for sentence in conditions_of(list(used.values()))),
        "",
    ]


def goals_met(measured: Sequence[Measured], goals: Sequence[Goal]) -> str:
    return summary([judged(goal, [m.row for m in measured]) for goal in goals])


def short_of(folder: str, measured: Sequence[Measured], goals: Sequence[Goal]) -> str:
    """A chip without a table of its own: its goals, and its losses as plainly."""
    days = span(str(m.run.conditions["time"])[:10] for m in measured)
    lost = "".join(f", {row.ratios[peer]:.2f} / {name}" for row, peer, name in worst_of(measured))
    return (
        f"- {measured[0].run.conditions['chip']} (`bench/results/{folder}/`, {days}): {goals_met(measured, goals)}"
        f"{f'; at worst{lost[1:]}' if lost else ''}."
    )


def coverage(rows: Sequence[Measured]) -> list[str]:
    """What the kernels' rows leave out, and how much worse it is there."""
    goals_only = any(m.row.suite == "bars" for m in rows)
    found = [
        'The kernels\' rows that do not say "every shape" are of those that the goals are stated for.'
    ] * goals_only
    worst = [
        f"- {row.ratios[peer]:.2f} / {name} ({', '.join(filter(None, (row.shape, row.layout, row.mode, row.dtype)))})"
        for row, peer, name in worst_of(rows)
    ]
    return [*found, "The worst over every shape measured:", *worst] if worst else found


def worst_of(rows: Sequence[Measured]) -> list[tuple[Row, str, str]]:
    """The row with the greatest ratio to each of three peers, the peer, and how it is called."""
    ours = [
        m.row
        for m in rows
        if m.row.suite in ("attention", "decode", "bars")
        and m.row.mode in WHOLE
        and m.row.provider in OURS
        and plainly(m.row)
    ]
    peers = ((FLOOR, FLOOR), (TWICE, TWICE), (NO_PROMPTS, "itself without prompts"))
    known = {peer: [row for row in ours if peer in row.ratios] for peer, _ in peers}
    return [
        (max(known[peer], key=lambda row: row.ratios[peer]), peer, name)
        for peer, name in peers
        if known[peer]
    ]

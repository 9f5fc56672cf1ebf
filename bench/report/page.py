"""docs/benchmarks.md and the README's table, written from the ledgers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..ledger import BenchError, Measured, Row, grouped
from ..runner import (
    TARGET_HEADER,
    Suite,
    comparisons_of,
    judged,
    target_cells,
    targets_met,
    targets_of,
)
from .tables import dtypes_of, markdown, provider_table, shape_table, span

BEGIN, END = "<!-- begin: python -m bench report -->", "<!-- end -->"
PAGE_HEAD = """# Benchmarks

`python -m bench report` writes this page from the ledgers under `bench/results/`; do not edit it.

- Every speed is stated as **how many times as fast: above 1 this package is faster**, below 1 (in bold) the other is.
  "over X" means "times as fast as X".
- A time is the median of interleaved rounds. A speed-up is the median of the ratios within each round, since the speed
  of a shared machine drifts by the minute. Each timed call follows an untimed one of the same function.
- A provider whose result differs from the float64 reference has no figure. Neither has one that cannot run there, nor
  one that was not asked to (what uses torch.compile is measured at one length).
- "plain SDPA" and "no prompts" compute no prompt branch, so they do less than is asked for.
- "torch.mm" and "plain read" show what torch reaches; kernels may be faster. "peak arithmetic" and "peak read" are the
  chip's limits, measured by loops of multiply-adds and of loads.
"""
README_HEAD = """How many times as fast this package is: **above 1 it is faster**. Lowest to highest over all shapes.
"""


def device_of(rows: Sequence[Measured]) -> str:
    return str(rows[0].run.conditions["device"])


def chip_of(rows: Sequence[Measured]) -> str:
    return str(rows[0].run.conditions["chip"])


def days_of(rows: Sequence[Measured]) -> str:
    return span(str(m.run.conditions["time"])[:10] for m in rows)


def target_verdicts(rows: Sequence[Measured]) -> str:
    plain = [m.row for m in rows]
    return targets_met([judged(target, plain) for target in targets_of(device_of(rows))])


def conditions_of(rows: Sequence[Measured]) -> list[str]:
    """A sentence for each commit, machine and set of versions that the rows were measured with."""
    alike: dict[str, list[Measured]] = {}
    for measured in rows:
        facts = measured.run.conditions
        libraries = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        malloc = "" if facts["malloc"] == "default" else f", malloc {facts['malloc']}"
        settings = "".join(f", {name}={value}" for name, value in facts.get("settings", {}).items())
        same = f"{facts['chip']} ({facts['instructions']}), commit {facts['commit']}, {libraries}{malloc}{settings}"
        alike.setdefault(same, []).append(measured)
    return [
        f"{same}, {days_of(found)}, load in the minute before {span((m.run.conditions['load'] for m in found), '.1f')}"
        f"{rounds_of(found)}."
        for same, found in alike.items()
    ]


def rounds_of(rows: Sequence[Measured]) -> str:
    """ ", 3 to 41 rounds"; "" for figures that are not times."""
    known = span(m.row.rounds for m in rows if m.row.rounds)
    return f", {known} rounds" if known else ""


def speed_table(rows: Sequence[Measured], title: str, in_readme: bool) -> list[str]:
    """A line per comparison that has figures: what, compared with whom, and the range of each dtype."""
    dtypes = dtypes_of(m.row for m in rows)
    lines = []
    for comparison in comparisons_of(device_of(rows), in_readme):
        found: dict[str, list[float]] = {dtype: [] for dtype in dtypes}
        for measured, speed in comparison.speeds(rows):
            found[measured.row.dtype].append(speed)
        if any(found.values()):
            ranges = (span(found[dtype], ".2f", "x") for dtype in dtypes)
            lines.append([comparison.what, comparison.other, *ranges])
    return markdown([title, "compared with", *dtypes], lines) if lines else []


def target_section(rows: Sequence[Measured]) -> list[str]:
    plain, targets = [m.row for m in rows], targets_of(device_of(rows))
    verdicts = [judged(target, plain) for target in targets]
    measured = [pair for pair in zip(targets, verdicts, strict=True) if pair[1].figures]
    lines = [target_cells(target, verdict) for target, verdict in measured]
    for line in lines:
        line[-1] = f"**{line[-1]}**" if line[-1].startswith("missed") else line[-1]
    left_out = len(targets) - len(measured)
    others = f" The other {left_out} targets were not measured on this chip." if left_out else ""
    return [
        "### Targets",
        "",
        f"{targets_met(verdicts)}. What was measured is the range over all shapes of a target.{others}",
        "",
        *markdown(TARGET_HEADER, lines),
    ]


def title_of(row: Row) -> str:
    launch = "" if row.launch == "eager" else "in a CUDA graph"
    cache = "" if row.cache == "warm" else "cold caches"
    return ", ".join(filter(None, (row.mode, row.dtype, launch, cache)))


def suite_section(suite: Suite, rows: Sequence[Measured]) -> list[str]:
    found = [f"### {suite.name.replace('_', ' ').capitalize()}", "", suite.about, ""]
    if suite.by_shape:
        for group in grouped(rows, "mode", "dtype", "launch", "cache").values():
            found += [f"#### {title_of(group[0].row)}", "", *shape_table(group), *footnotes(group)]
        return found
    for (dtype,), group in grouped(rows, "dtype").items():
        found += [f"#### {dtype}", "", *provider_table(group), *footnotes(group)]
    return found


def footnotes(rows: Sequence[Measured]) -> list[str]:
    return [*(f"<sub>{sentence}</sub>" for sentence in conditions_of(rows)), ""]


def page(
    chips: Mapping[str, Sequence[Measured]],
    suites: Mapping[str, Suite],
    pictures: Mapping[str, Mapping[str, str]],
) -> str:
    """docs/benchmarks.md; `pictures` are, by chip's folder, the file names in docs/figures and their titles."""
    lines = [PAGE_HEAD]
    for folder, rows in chips.items():
        by_suite = grouped(rows, "suite")
        names = ", ".join(f"{suite}.jsonl" for (suite,) in sorted(by_suite))
        lines += [f"## {chip_of(rows)}", "", f"From `bench/results/{folder}/`: {names}.", ""]
        lines += [f"![{title}](figures/{name})\n" for name, title in pictures.get(folder, {}).items()]
        if summary := speed_table(rows, "", in_readme=False):
            lines += ["### Summary", "", "The lowest to the highest over all shapes measured.", "", *summary]
        lines += target_section(rows)
        for suite in suites.values():
            if (suite.name,) in by_suite:
                lines += suite_section(suite, by_suite[(suite.name,)])
    return "\n".join(lines).rstrip() + "\n"


def completeness(rows: Sequence[Measured]) -> tuple[int, str]:
    """How many suites were measured, and when the last of them.

    The README shows one chip of each kind: a complete measurement before a partial one, then the newest.
    """
    return len({m.row.suite for m in rows}), max(str(m.run.conditions["time"]) for m in rows)


def readme_block(chips: Mapping[str, Sequence[Measured]], pictures: Mapping[str, Mapping[str, str]]) -> str:
    """The text between the README's two marks: a table for one chip of each kind of device, a line for the others."""
    lines = [README_HEAD]
    for device in dict.fromkeys(map(device_of, chips.values())):
        folders = [folder for folder in chips if device_of(chips[folder]) == device]
        first, *others = sorted(folders, key=lambda folder: completeness(chips[folder]), reverse=True)
        rows = chips[first]
        if name := next((name for name in pictures.get(first, ()) if name.endswith("-speed.png")), None):
            lines += [f"![{pictures[first][name]}](docs/figures/{name})", ""]
        lines += speed_table(rows, chip_of(rows), in_readme=True)
        lines += [
            f"Measured {days_of(rows)}; {target_verdicts(rows)}.",
            *filter(None, (other_chip(chips[folder]) for folder in others)),
            "",
        ]
    lines.append(
        "[docs/benchmarks.md](docs/benchmarks.md) has every figure, the missed targets, and the conditions."
    )
    return "\n".join(lines)


def other_chip(rows: Sequence[Measured]) -> str:
    """A chip without a table in the README: its targets, and its lowest speed-up of the table's rows. Nothing of a chip
    on which none of these rows was measured: the page has it.
    """
    speeds = [
        (speed, comparison)
        for comparison in comparisons_of(device_of(rows), in_readme=True)
        for _, speed in comparison.speeds(rows)
    ]
    if not speeds:
        return ""
    speed, comparison = min(speeds, key=lambda pair: pair[0])
    lowest = f"at the lowest {speed:.2f}x ({comparison.what}, compared with {comparison.other})"
    return f"On {chip_of(rows)}, {days_of(rows)}: {target_verdicts(rows)}; {lowest}."


def with_block(readme: str, block: str) -> str:
    """The README with the text between its two marks replaced."""
    before, _, rest = readme.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise BenchError(
            f"README.md has no place for the table: it must hold {BEGIN!r} and, after it, {END!r}."
        )
    return f"{before}{BEGIN}\n{block}\n{END}{after}"

"""The pictures of one chip. Each says what was found, where and when it was measured, and which way is better."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..ledger import Measured, Row, grouped
from ..problem import PROMPTS
from ..runner import Chart, Comparison, Suite, comparisons_of
from .tables import PROBES, dtypes_of, number, span

FAMILY = "LLaMA-7B"  # its heads are measured at several lengths
# Okabe and Ito's colours, which colour-blind readers can tell apart; markers repeat the distinction
ACCENT, ACCENT_LIGHT, GREY, BLACK = "#d55e00", "#f0b183", "#777777", "#000000"
STYLES: dict[str, dict[str, Any]] = {
    "plain SDPA": {"color": BLACK, "linestyle": "--", "marker": "o"},
    "SDPA twice + add": {"color": "#0072b2", "marker": "s"},
    "SDPA twice + add, compiled": {"color": "#56b4e9", "marker": "D"},
    "official formula": {"color": "#009e73", "marker": "v"},
    "official formula, compiled": {"color": "#cc79a7", "marker": "P"},
    "FlexAttention + SDPA + add": {"color": "#e69f00", "marker": "^"},
    "flash-attn twice + add": {"color": "#009e73", "marker": "X", "linestyle": ":"},
    "xformers twice + add": {"color": "#cc79a7", "marker": "*", "linestyle": ":"},
    "flashinfer twice + add": {"color": "#e69f00", "marker": "h", "linestyle": ":"},
}
OUR_STYLES: dict[str, dict[str, Any]] = {  # this package's
    "zinit cpu": {"color": ACCENT, "marker": "o"},
    "zinit triton": {"color": ACCENT, "marker": "o"},
    "zinit cuda": {"color": ACCENT, "marker": "d", "linestyle": "--"},
}
PROBE_STYLES: dict[str, dict[str, Any]] = {
    "plain read of the cache": {"color": GREY, "linestyle": ":", "marker": "."},
    "copy of as many bytes": {"color": GREY, "linestyle": "-", "marker": "."},
    "peak read": {"color": GREY, "linestyle": "-", "marker": "."},
    "peak arithmetic": {"color": GREY, "linestyle": "-", "marker": "."},
}
MODE_STYLES = {
    "decode": ("#0072b2", "s"), "forward": (ACCENT, "o"), "backward": ("#009e73", "v"), "forward+backward": (BLACK, "^")
}  # fmt: skip
FONT = {
    "font.size": 13, "axes.titlesize": 13, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "axes.axisbelow": True,
    "lines.markersize": 6, "lines.linewidth": 1.8, "legend.frameon": False, "legend.fontsize": 12,
}  # fmt: skip


def draw(rows: Sequence[Measured], suites: Mapping[str, Suite], folder: Path, chip: str) -> dict[str, str]:
    """Writes the pictures that the rows allow, named "<chip>-<kind>.png"; the names and the titles."""
    import matplotlib

    matplotlib.use("Agg")
    plain = [m for m in rows if m.row.is_plain]
    comparisons = comparisons_of(str(rows[0].run.conditions["device"]), in_readme=True)
    pictures: dict[str, Callable[[], tuple[Any, str] | None]] = {
        "speed": lambda: speed(plain, comparisons),
        "attention": lambda: attention(plain),
        "decode": lambda: decode(plain),
        "roofline": lambda: roofline(plain),
    }
    for suite in suites.values():
        if suite.charts:
            pictures[suite.name] = lambda suite=suite: charts(plain, suite)
    names = {}
    for kind, picture in pictures.items():
        with matplotlib.rc_context(FONT):
            if (found := picture()) is not None:
                figure, title = found
                names[f"{chip}-{kind}.png"] = title
                path = folder / f"{chip}-{kind}.png"
                figure.savefig(
                    path, dpi=100, bbox_inches="tight", pad_inches=0.15, metadata={"Software": None}
                )
    return names


def panels(rows: int, columns: int, height: float, width: float = 10.5) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height * rows + 1.4), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.08, w_pad=0.08)
    return figure, figure.subplots(rows, columns, squeeze=False)


def headed(figure: Any, title: str, rows: Sequence[Measured], *facts: str) -> tuple[Any, str]:
    """Puts the finding above the panels; under it the chip, the other facts and the date."""
    chip, days = str(rows[0].run.conditions["chip"]), span(str(m.run.conditions["time"])[:10] for m in rows)
    small = textwrap.fill("; ".join((chip, *facts, f"measured {days}")), 114)
    inch = 1 / figure.get_figheight()  # text above the figure enlarges the picture
    figure.text(0.01, 1.0, small, va="bottom", fontsize=12, color="#444444")
    above = 1.0 + (0.2 * len(small.splitlines()) + 0.08) * inch
    figure.text(0.01, above, textwrap.fill(title, 75), va="bottom", fontsize=17, fontweight="bold")
    return figure, title


def legend(figure: Any, axes: Any, columns: int = 3) -> None:
    """One for all panels, below them."""
    known: dict[str, Any] = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            known.setdefault(label, handle)
    figure.legend(known.values(), known.keys(), loc="outside lower left", ncols=columns)


def range_of(values: Sequence[float]) -> str:
    """ "2.4 to 3.9": the least and the greatest; one of them where they read the same."""
    return " to ".join(dict.fromkeys(map(short, (min(values), max(values)))))


def short(value: float) -> str:
    """A ratio in a picture: "0.98", "2.0", "30"."""
    return f"{value:.2f}" if value < 1 else f"{value:.1f}" if value < 10 else f"{value:.0f}"


def speed(rows: Sequence[Measured], comparisons: Sequence[Comparison]) -> tuple[Any, str] | None:
    """The README's rows: from the lowest to the highest speed-up of each, by dtype."""
    found = {c: speeds for c in comparisons if (speeds := c.speeds(rows))}
    if not found:
        return None
    figure, axes = panels(1, 1, 0.75 * len(found) + 0.6)
    axis = axes[0, 0]
    dtypes = dtypes_of(m.row for of in found.values() for m, _ in of)
    won = sum(min(value for _, value in of) >= 1 for of in found.values())
    for i, speeds in enumerate(found.values()):
        for j, (dtype, shade, marker) in enumerate(
            zip(dtypes, (ACCENT, "#0072b2", "#009e73"), "osv", strict=False)
        ):
            values = [value for m, value in speeds if m.row.dtype == dtype]
            if not values:
                continue
            y = i + 0.26 * (j - (len(dtypes) - 1) / 2)
            ends = (min(values), max(values))
            axis.plot(
                ends, (y, y), color=shade, marker=marker, linewidth=4, label=dtype, solid_capstyle="round"
            )
            beside = {"xytext": (8, 0), "textcoords": "offset points", "va": "center", "fontsize": 12}
            axis.annotate(f"{range_of(ends)}x", (ends[1], y), **beside)
    axis.axvline(1, color=BLACK, linewidth=1.2)
    axis.set_yticks(range(len(found)), [f"{c.what}, compared with\n{c.other}" for c in found])
    axis.set_ylim(len(found) - 0.5, -0.5)
    in_powers(axis, "x")
    axis.set_xlim(right=2.2 * max(value for of in found.values() for _, value in of))
    axis.set_xlabel("times as fast (right of 1: this package is faster)")
    legend(figure, axes)
    counted = [m for of in found.values() for m, _ in of]
    title = f"Faster on every shape in {won} of {len(found)} comparisons"
    facts = (batches(counted), prompts(counted), "lowest to highest over the shapes")
    return headed(figure, title, counted, *facts)


def swept(rows: Sequence[Measured], suite: str) -> list[Measured]:
    """The rows over several lengths, of the providers that are drawn."""
    return [
        m
        for m in rows
        if m.row.suite == suite and m.row.shape.startswith(f"{FAMILY},") and m.row.sizes["prompt_length"] == PROMPTS
        and (suite != "decode" or m.row.sizes["batch"] == 1) and style(m.row.provider)
    ]  # fmt: skip


def style(provider: str) -> dict[str, Any]:
    """How a provider's line looks; empty for what is not drawn (variants, and torch.mm, which is no limit)."""
    if provider in OUR_STYLES:
        return {**OUR_STYLES[provider], "linewidth": 3.2, "markersize": 8, "zorder": 4}
    return STYLES.get(provider, {}) or PROBE_STYLES.get(provider, {})


def label(provider: str) -> str:
    if provider in OUR_STYLES:
        return f"this package ({provider.removeprefix('zinit ')})"
    if provider in PROBES:
        return f"{provider} (limit)" if PROBES[provider] else f"{provider} (by torch)"
    return provider


def lines(axis: Any, rows: Sequence[Row], x: str, y: str) -> None:
    """A line per provider over the length; a provider that was measured at one length is a marker."""
    for provider in dict.fromkeys(row.provider for row in rows):
        points = sorted((row.sizes[x], getattr(row, y)) for row in rows if row.provider == provider)
        axis.plot(*zip(*points, strict=True), label=label(provider), **style(provider))
    ticks = sorted({row.sizes[x] for row in rows})
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_ylim(bottom=0)


def in_powers(axis: Any, which: str, subs: Sequence[float] = (1, 2, 5)) -> None:
    """A logarithmic axis with plain numbers at these multiples of each power of ten."""
    from matplotlib.ticker import LogLocator

    axis.set(**{f"{which}scale": "log"})
    scale = getattr(axis, f"{which}axis")
    scale.set_major_locator(LogLocator(subs=subs))
    scale.set_major_formatter(lambda value, _: f"{value:g}")
    scale.set_minor_formatter(lambda value, _: "")


def batches(rows: Sequence[Measured]) -> str:
    return f"B {span({m.row.sizes['batch'] for m in rows})}"


def prompts(rows: Sequence[Measured]) -> str:
    return f"{span({m.row.sizes.get('prompt_length', PROMPTS) for m in rows})} prompts"


def family_facts(rows: Sequence[Measured]) -> tuple[str, ...]:
    sizes = rows[0].row.sizes
    return (
        f"heads of {FAMILY} ({sizes['heads_q']} x {sizes['head_dim']})",
        batches(rows),
        prompts(rows),
    )


def speeds_of_ours(rows: Sequence[Measured], other: str) -> list[float]:
    return [v for m in rows if m.row.provider in OUR_STYLES and (v := m.row.speed_over(other)) is not None]


def grid_of_lines(
    chosen: Sequence[Measured],
    by: str,
    titles: Mapping[str, str],
    x: tuple[str, str],
    y: tuple[str, str],
) -> Any:
    """A figure with a row of panels for each value of the column `by` and a column of panels for each dtype.

    titles: of the rows, by their values. x, y: (a column, what its axis says).
    """
    dtypes = dtypes_of(m.row for m in chosen)
    figure, axes = panels(len(titles), len(dtypes), 3.4)
    for i, (value, title) in enumerate(titles.items()):
        for j, dtype in enumerate(dtypes):
            rows = [m.row for m in chosen if (getattr(m.row, by), m.row.dtype) == (value, dtype)]
            lines(axes[i, j], rows, x[0], y[0])
            axes[i, j].set_title(f"{title}, {dtype}")
        axes[i, 0].set_ylabel(y[1])
    for axis in axes[-1]:
        axis.set_xlabel(x[1])
    legend(figure, axes)
    return figure


def attention(rows: Sequence[Measured]) -> tuple[Any, str] | None:
    """Useful TFLOP/s against T: a row of panels for each mode, a column for each dtype."""
    chosen = [m for m in swept(rows, "attention") if m.row.tflops is not None]
    modes = [mode for mode in ("forward", "forward+backward") if any(m.row.mode == mode for m in chosen)]
    if not modes:
        return None
    titles = {mode: mode.replace("+", " + ") for mode in modes}
    figure = grid_of_lines(chosen, "mode", titles, ("seqlen_q", "tokens T"), ("tflops", "useful TFLOP/s"))
    speeds = speeds_of_ours(chosen, "plain SDPA")
    title = "Attention over whole sequences"
    if speeds:
        title = f"With prompts, {range_of(speeds)} times as fast as plain SDPA without"
    return headed(figure, title, chosen, *family_facts(chosen), "higher is better")


def decode(rows: Sequence[Measured]) -> tuple[Any, str] | None:
    """Bytes of the cache per second against S, beside the rate at which the machine reads as many bytes."""
    chosen = swept(rows, "decode")
    if not chosen:
        return None
    titles = {m.row.layout: f"{m.row.layout} cache" for m in chosen}
    figure = grid_of_lines(
        chosen, "layout", titles, ("seqlen_k", "keys S in the cache"), ("gbps", "GB/s of the cache")
    )
    speeds = speeds_of_ours(chosen, "SDPA twice + add")
    title = "Decode of one token"
    if speeds:
        title = f"Decode: {range_of(speeds)} times as fast as SDPA twice + add"
    return headed(figure, title, chosen, *family_facts(chosen), "one new token", "higher is better")


def roofline(rows: Sequence[Measured]) -> tuple[Any, str] | None:
    """Useful arithmetic against arithmetic per byte of inputs and outputs, under what the chip can do at most.

    A roof is drawn only where it was measured. torch.mm is a reference beside it: kernels may be faster.
    """
    ours = [
        m
        for m in rows
        if m.row.provider in OUR_STYLES and m.row.tflops and m.row.suite in ("attention", "decode")
    ]
    dtypes = dtypes_of(m.row for m in ours)
    if not dtypes:
        return None
    figure, axes = panels(1, len(dtypes), 4.6)
    best = []
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        here = [m.row for m in ours if m.row.dtype == dtype]
        points = [
            (1e9 * (row.tflops or 0) * (row.p50_ms or 0) / moved(row), row.tflops or 0, row.mode)
            for row in here
        ]
        best.append(f"{number(max(y for _, y, _ in points), 2)} TFLOP/s in {dtype}")
        draw_roof(
            axis, [m.row for m in rows], dtype, min(x for x, *_ in points) / 2, max(x for x, *_ in points) * 2
        )
        for mode, (shade, marker) in MODE_STYLES.items():
            if of := [(x, y) for x, y, its in points if its == mode]:
                axis.scatter(
                    *zip(*of, strict=True),
                    s=46,
                    label=mode.replace("+", " + "),
                    color=shade,
                    marker=marker,
                    zorder=3,
                )
        in_powers(axis, "x", (1,))
        in_powers(axis, "y")
        axis.set_xlabel("operations per byte of inputs and outputs")
        axis.set_ylabel("useful TFLOP/s" if axis is axes[0, 0] else "")
        axis.set_title(dtype)
    legend(figure, axes)
    facts = (batches(ours), prompts(ours), "all measured shapes", "higher is better")
    return headed(figure, f"This package reaches {' and '.join(best)}", ours, *facts)


def draw_roof(axis: Any, rows: Sequence[Row], dtype: str, first: float, last: float) -> None:
    """The chip's limits where they were measured, the lower one of reads from memory, and torch.mm."""
    product, peak = (fastest(rows, name, dtype) for name in ("torch.mm, square", "peak arithmetic"))
    reads = sorted(  # by bytes; the last one was read from memory, the fastest perhaps from a cache
        (
            row.sizes["batch"] * row.sizes["heads_kv"] * row.sizes["seqlen_k"] * row.sizes["head_dim"],
            row.gbps / 1e3,
        )
        for row in rows
        if row.provider in PROBES and row.gbps and row.dtype == dtype
    )
    if any(row.provider == "copy of as many bytes" for row in rows):
        peak = product  # a GPU: large products reach its limit
    elif product:
        axis.plot(
            (first, last), (product, product), color=GREY, linestyle=":", label="torch.mm, square (no limit)"
        )
    if not (peak and reads):
        return
    peak = max(peak, product)
    for rate, shade, line, name in (
        (max(rate for _, rate in reads), BLACK, "-", "the chip's limit"),
        (reads[-1][1], GREY, "--", "the limit for reads from memory"),
    ):
        roof = [first, peak / rate, last], [first * rate, peak, peak]
        axis.plot(*roof, color=shade, linewidth=1.6, linestyle=line, label=name)


def fastest(rows: Sequence[Row], provider: str, dtype: str) -> float:
    return max(
        (row.tflops or 0.0 for row in rows if (row.provider, row.dtype) == (provider, dtype)), default=0.0
    )


def moved(row: Row) -> float:
    """Bytes of query, key, value and out, once each; those of their gradients too where they are computed."""
    size, item = row.sizes, 4 if row.dtype == "float32" else 2
    query = size["batch"] * size["heads_q"] * size["seqlen_q"] * size["head_dim"]
    key = size["batch"] * size["heads_kv"] * size["seqlen_k"] * size["head_dim"]
    passes = {"forward": 1, "decode": 1, "backward": 2, "forward+backward": 3}[row.mode]
    return float(passes * 2 * (query + key) * item)


def charts(rows: Sequence[Measured], suite: Suite) -> tuple[Any, str] | None:
    """Bars of a suite's figures: a row of panels per setting with a column per figure; of one figure, two columns."""
    chosen = [m for m in rows if m.row.suite == suite.name]
    cells = [
        (chart, group)
        for group in grouped(chosen, "shape", "mode", "dtype").values()
        for chart in suite.charts
        if any(chart.figure in m.row.figures for m in group)
    ]
    if not cells:
        return None
    tallest = max(len(group) for _, group in cells)
    figure, axes = panels(-(-len(cells) // 2), min(2, len(cells)), 0.36 * tallest + 0.9)
    for axis, (chart, group) in zip(axes.flat, cells, strict=False):
        bars(axis, chart, [m.row for m in group if chart.figure in m.row.figures])
    for axis in axes.flat[len(cells) :]:
        axis.remove()
    first = suite.charts[0]
    ratios = [
        ratio for chart, group in cells if chart is first and (ratio := first.ratio(m.row for m in group))
    ]
    title = first.title.format(range_of(ratios)) if ratios else suite.name.replace("_", " ").capitalize()
    sizes = chosen[0].row.sizes
    batch = (batches(chosen),) if "batch" in sizes else ()
    length = (f"T {span({m.row.sizes['seqlen'] for m in chosen})}",) if "seqlen" in sizes else ()
    return headed(figure, title, chosen, *batch, *length, prompts(chosen))


def bars(axis: Any, chart: Chart, rows: Sequence[Row]) -> None:
    """Horizontal bars with their values; the reference as a dotted line."""
    values = [row.figures[chart.figure] for row in rows]
    colours = [
        ACCENT if row.provider == chart.ours else ACCENT_LIGHT if row.is_ours else "#9aa5b1" for row in rows
    ]
    axis.barh([row.provider for row in rows], values, color=colours, height=0.72)
    for i, value in enumerate(values):
        axis.annotate(
            number(value), (value, i), xytext=(4, 0), textcoords="offset points", va="center", fontsize=12
        )
    heading = [rows[0].shape, f"{rows[0].mode.replace('+', ' + ')}, {rows[0].dtype}"]
    if chart.reference:
        least = max(row.figures[chart.reference] for row in rows)
        axis.axvline(least, color=BLACK, linewidth=1.6, linestyle=":")
        heading.append(f"dotted at {number(least)}: {chart.reference}")
    axis.invert_yaxis()
    axis.grid(visible=False, axis="y")
    axis.tick_params(axis="y", length=0, labelsize=12)
    axis.set_xlim(right=1.18 * (max(values) or 1.0))
    direction = "higher" if chart.higher_is_better else "lower"
    axis.set_xlabel(f"{chart.figure} ({direction} is better)")
    axis.set_title("\n".join(heading), fontsize=12)

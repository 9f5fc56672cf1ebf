"""Pictures of a chip's rows: speed against length, bandwidth against the cache, roofline, memory, whole models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .ledger import Row
from .tables import number

FAMILY = "LLaMA-7B"  # the model whose lengths are swept
OURS, FAINT, FLOOR = "#c8324b", "#e8a0ab", "#222222"
KNOWN = {
    "SDPA twice + add": "#30638e", "official formula": "#4f9d69", "FlexAttention + SDPA + add": "#d98e04",
    "flash-attn twice + add": "#7d5ba6", "xformers twice + add": "#8c6d46", "flashinfer twice + add": "#2a9d8f",
    "plain SDPA, flash": "#6b6b6b", "plain SDPA, cuDNN": "#8a8a8a", "plain SDPA, efficient": "#a5a5a5",
    "plain SDPA, math": "#bdbdbd",
}  # fmt: skip
OTHERS = "#9aa5b1"
PROBES = ("torch.mm, square", "plain read of the cache", "copy of as many bytes")


def draw(rows: Sequence[Row], folder: Path, chip: str) -> list[str]:
    """Writes what the rows allow; the names of the PNG files, each begun with the chip's folder name."""
    import matplotlib

    matplotlib.use("Agg")
    chosen = [row for row in rows if row.launch == "eager" and row.cache == "warm"]
    names = []
    pictures: dict[str, Callable[[Sequence[Row]], Any | None]] = {
        "time": lambda rows: attention(rows, "p50_ms", "ms"),
        "rate": lambda rows: attention(rows, "tflops", "useful TFLOP/s"),
        "decode": decode,
        "roofline": roofline,
        "memory": memory,
        "train": train,
        "generate": generate,
    }
    for kind, picture in pictures.items():
        with matplotlib.rc_context({"font.size": 9, "axes.titlesize": 9, "axes.titleweight": "bold"}):
            figure = picture(chosen)
            if figure is not None:
                name = f"{chip}-{kind}.png"
                figure.savefig(folder / name, dpi=100, bbox_inches="tight", metadata={"Software": None})
                names.append(name)
    return names


def subplots(rows: int, columns: int, width: float = 4.6, height: float = 3.1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.2)
        axis.set_axisbelow(True)
    return figure, axes


def colour(provider: str) -> str:
    if provider.startswith("zinit") or provider.endswith(", accelerated"):
        return FAINT if provider.endswith(("no prompts", "paged", "an adapter each", "base alone")) else OURS
    if provider == "plain SDPA" or provider in PROBES:
        return FLOOR
    return next((c for name, c in KNOWN.items() if provider in (name, f"{name}, compiled")), OTHERS)


def style(provider: str) -> dict[str, Any]:
    """Ours thick, the floor dashed, what the machine can do dotted."""
    ours = colour(provider) == OURS
    line = "--" if colour(provider) == FLOOR else "-"
    if provider in PROBES or provider.endswith(("compiled", "paged")):
        line = ":"
    return {
        "color": colour(provider),
        "linestyle": line,
        "linewidth": 2.6 if ours else 1.3,
        "zorder": 4 if ours else 3,
    }


def dtypes_of(rows: Sequence[Row]) -> list[str]:
    return sorted({row.dtype for row in rows}, reverse=True)  # float32 first


def lines(axis: Any, rows: Sequence[Row], x: str, y: str) -> None:
    """One line per provider over the swept length."""
    for provider in dict.fromkeys(row.provider for row in rows):
        points = sorted((row.sizes[x], getattr(row, y)) for row in rows if row.provider == provider)
        axis.plot(*zip(*points, strict=True), marker="o", markersize=3.5, label=provider, **style(provider))
    ticks = sorted({row.sizes[x] for row in rows})
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()


def in_powers(axis: Any, which: str) -> None:
    """Logarithmic, the powers of ten written out."""
    axis.set(**{f"{which}scale": "log"})
    scale = getattr(axis, f"{which}axis")
    scale.set_major_formatter(lambda value, _: f"{value:g}")
    scale.set_minor_formatter(lambda value, _: "")


def legend(figure: Any, axes: Any) -> None:
    """One for all axes, to their right, without repetition."""
    known: dict[str, Any] = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            known.setdefault(label, handle)
    figure.legend(known.values(), known.keys(), loc="outside right center", frameon=False, fontsize=8)


def swept(rows: Sequence[Row], suite: str) -> list[Row]:
    return [
        row
        for row in rows
        if row.suite == suite and row.shape.startswith(f"{FAMILY},") and row.sizes["prompt_length"] == 10
        and (suite != "decode" or row.sizes["batch"] == 1)
    ]  # fmt: skip


def attention(rows: Sequence[Row], y: str, unit: str) -> Any | None:
    """Time, or useful TFLOP/s, against T: a row for each mode, a column for each dtype."""
    chosen = [row for row in swept(rows, "attention") if getattr(row, y) is not None]
    if y == "p50_ms":
        chosen = [row for row in chosen if row.provider not in PROBES]
    modes = [m for m in ("forward", "forward+backward") if any(row.mode == m for row in chosen)]
    if not modes:
        return None
    dtypes = dtypes_of(chosen)
    figure, axes = subplots(len(modes), len(dtypes))
    for i, mode in enumerate(modes):
        for j, dtype in enumerate(dtypes):
            axis = axes[i, j]
            lines(axis, [row for row in chosen if (row.mode, row.dtype) == (mode, dtype)], "seqlen_q", y)
            axis.set_title(f"{mode}, {dtype}", loc="left")
            in_powers(axis, "y") if y == "p50_ms" else axis.set_ylim(bottom=0)
            axis.set_ylabel(unit if j == 0 else "")
            axis.set_xlabel(f"tokens T, heads of {FAMILY}" if i == len(modes) - 1 else "")
    legend(figure, axes)
    return figure


def decode(rows: Sequence[Row]) -> Any | None:
    """Bytes of the cache per second against S; the probe is what the machine can do."""
    chosen = swept(rows, "decode")
    if not chosen:
        return None
    dtypes, layouts = dtypes_of(chosen), list(dict.fromkeys(row.layout for row in chosen))
    figure, axes = subplots(len(layouts), len(dtypes))
    for i, layout in enumerate(layouts):
        for j, dtype in enumerate(dtypes):
            axis = axes[i, j]
            lines(
                axis,
                [row for row in chosen if (row.layout, row.dtype) == (layout, dtype)],
                "seqlen_k",
                "gbps",
            )
            axis.set_title(f"one token, {layout} cache, {dtype}", loc="left")
            axis.set_ylim(bottom=0)
            axis.set_ylabel("GB/s of cache" if j == 0 else "")
            axis.set_xlabel(f"keys S in the cache, heads of {FAMILY}" if i == len(layouts) - 1 else "")
    legend(figure, axes)
    return figure


def bars(axis: Any, names: Sequence[str], values: Sequence[float]) -> None:
    """Horizontal, the value written at the end of each."""
    axis.barh(names, values, color=[colour(name) for name in names], height=0.7)
    for i, value in enumerate(values):
        axis.annotate(
            number(value), (value, i), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8
        )
    axis.invert_yaxis()
    axis.grid(visible=False, axis="y")
    axis.tick_params(axis="y", length=0)
    axis.set_xlim(right=(max(values) or 1.0) * 1.15)


def memory(rows: Sequence[Row]) -> Any | None:
    """Peak memory of the longest shape beyond the inputs, beside what outputs and gradients need."""
    chosen = [row for row in rows if row.suite == "memory"]
    if not chosen:
        return None
    shape = max((row.sizes["seqlen_k"], row.shape) for row in chosen)[1]
    modes = list(dict.fromkeys(row.mode for row in chosen))
    dtypes = dtypes_of(chosen)
    figure, axes = subplots(len(modes), len(dtypes), height=2.3)
    figure.supxlabel(f"{shape}, beyond the inputs; dotted: what outputs and gradients need", fontsize=9)
    for i, mode in enumerate(modes):
        for j, dtype in enumerate(dtypes):
            part = [row for row in chosen if (row.shape, row.mode, row.dtype) == (shape, mode, dtype)]
            if not part:
                continue
            axis, (peak, needed) = axes[i, j], part[0].figures  # in the order they were written
            most = max(row.figures[needed] for row in part)
            bars(axis, [row.provider for row in part], [row.figures[peak] for row in part])
            axis.axvline(most, color="black", linewidth=1, linestyle=":")
            axis.set_title(f"{mode}, {dtype}: peak MB", loc="left")
            if j:
                axis.set_yticklabels([])
    return figure


def train(rows: Sequence[Row]) -> Any | None:
    """Tokens per second and peak memory of every way to fine-tune."""
    chosen = [row for row in rows if row.suite == "train"]
    bases = list(dict.fromkeys((row.shape, row.dtype) for row in chosen))
    if not bases:
        return None
    figure, axes = subplots(len(bases), 2, width=5)
    for i, base in enumerate(bases):
        part = [row for row in chosen if (row.shape, row.dtype) == base]
        names = [row.provider for row in part]
        bars(axes[i, 0], names, [row.figures["tokens/s"] for row in part])
        axes[i, 0].set_title("training, tokens/s", loc="left")
        axes[i, 0].set_xlabel(", ".join(base))
        bars(axes[i, 1], names, [row.figures.get("peak GB", 0.0) for row in part])
        axes[i, 1].set_title("peak GB", loc="left")
        axes[i, 1].set_yticklabels([])
    return figure


def generate(rows: Sequence[Row]) -> Any | None:
    """Tokens per second by number of sequences."""
    chosen = [row for row in rows if row.suite == "generate"]
    modes, dtypes = list(dict.fromkeys(row.mode for row in chosen)), dtypes_of(chosen)
    if not chosen:
        return None
    figure, axes = subplots(len(modes), len(dtypes), height=2.3)
    for i, mode in enumerate(modes):
        for j, dtype in enumerate(dtypes):
            part = [row for row in chosen if (row.mode, row.dtype) == (mode, dtype)]
            if not part:
                continue
            bars(axes[i, j], [row.provider for row in part], [row.figures["tokens/s"] for row in part])
            axes[i, j].set_title(f"tokens/s, {mode}, {dtype}", loc="left")
            if j:
                axes[i, j].set_yticklabels([])
    return figure


def roofline(rows: Sequence[Row]) -> Any | None:
    """Useful arithmetic against arithmetic per byte of inputs and outputs, under the measured roof."""
    reads = sorted(  # by how much is read: the last is the memory's rate, the greatest may be a cache's
        (row.sizes["batch"] * row.sizes["heads_kv"] * row.sizes["seqlen_k"], row.gbps / 1e3)
        for row in rows
        if row.provider in PROBES[1:] and row.gbps and row.suite == "decode"
    )
    ours = [
        row
        for row in rows
        if colour(row.provider) == OURS and row.tflops and row.suite in ("attention", "decode")
    ]
    dtypes = [
        dtype for dtype in dtypes_of(ours) if any(r.provider == PROBES[0] and r.dtype == dtype for r in rows)
    ]
    if not (reads and dtypes):
        return None
    memory_rate, cache_rate = reads[-1][1], max(rate for _, rate in reads)
    figure, axes = subplots(1, len(dtypes))
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        peak = max(
            row.tflops or 0.0
            for row in rows
            if (row.provider, row.dtype, row.suite) == (PROBES[0], dtype, "attention")
        )
        here = [row for row in ours if row.dtype == dtype]
        intensities = [1e12 * (row.tflops or 0) * (row.p50_ms or 0) / 1e3 / moved(row) for row in here]
        last = 2 * max(*intensities, peak / memory_rate)
        for rate, line, name in ((memory_rate, "-", "of memory"), (cache_rate, ":", "of a cache")):
            first, label = (
                min(intensities) / 2,
                f"torch.mm {peak:.2g} TFLOP/s, read {name} {rate * 1e3:.0f} GB/s",
            )
            roof = [first, peak / rate, last], [first * rate, peak, peak]
            axis.plot(*roof, color=FLOOR, linewidth=1.2, linestyle=line, label=label)
        for mode, shade in (
            ("decode", "#30638e"),
            ("forward", OURS),
            ("backward", "#d98e04"),
            ("forward+backward", "#7d5ba6"),
        ):
            points = [(x, row.tflops) for x, row in zip(intensities, here, strict=True) if row.mode == mode]
            if points:
                axis.scatter(*zip(*points, strict=True), s=16, label=mode, color=shade, alpha=0.8, zorder=3)
        in_powers(axis, "x")
        in_powers(axis, "y")
        axis.set_xlabel("operations per byte of inputs and outputs")
        axis.set_ylabel("useful TFLOP/s")
        axis.set_title(f"this package under the roof, {dtype}", loc="left")
        axis.legend(fontsize=8, frameon=False)
    return figure


def moved(row: Row) -> float:
    """Bytes of query, key, value and out, once each; their gradients too where they are made."""
    size, item = row.sizes, 4 if row.dtype == "float32" else 2
    query = size["batch"] * size["heads_q"] * size["seqlen_q"] * size["head_dim"]
    key = size["batch"] * size["heads_kv"] * size["seqlen_k"] * size["head_dim"]
    passes = {"forward": 1, "decode": 1, "backward": 2, "forward+backward": 3}[row.mode]
    return float(passes * 2 * (query + key) * item)

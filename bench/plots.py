"""Pictures of a chip's rows: speed against length, bytes per second against the cache, roofline, memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .ledger import Row

FAMILY = "LLaMA-7B"  # the model whose lengths are swept
INK = {"zinit cpu": "#d1495b", "zinit triton": "#d1495b", "zinit cuda": "#8f2d56"}
MUTED = ("#30638e", "#66a182", "#edae49", "#7a7a7a", "#9c6ade", "#2e86ab", "#b08968", "#4d908e", "#adb5bd")


def draw(rows: Sequence[Row], folder: Path, chip: str) -> list[str]:
    """Writes what the rows allow; the names of the PNG files, each begun with the chip's folder name."""
    import matplotlib

    matplotlib.use("Agg")
    names = []
    for dtype in dict.fromkeys(row.dtype for row in rows):
        chosen = [row for row in rows if row.dtype == dtype and row.launch == "eager" and row.cache == "warm"]
        for kind, picture in (
            ("attention", attention),
            ("decode", decode),
            ("memory", memory),
            ("roofline", roofline),
        ):
            figure = picture(chosen)
            if figure is not None:
                name = f"{chip}-{kind}-{dtype}.png"
                figure.suptitle(f"{kind}, {dtype}, {chip}")
                figure.savefig(folder / name, dpi=110, bbox_inches="tight", metadata={"Software": None})
                names.append(name)
    return names


def subplots(count: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * count, 3.9), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, axes


def colour(provider: str, providers: Sequence[str]) -> str:
    others = [name for name in providers if name not in INK]
    return INK.get(provider) or MUTED[others.index(provider) % len(MUTED)]


def lines(axis: Any, rows: Sequence[Row], x: str, y: str, title: str) -> None:
    """One line per provider over the swept length."""
    providers = list(dict.fromkeys(row.provider for row in rows))
    for provider in providers:
        points = sorted((row.sizes[x], getattr(row, y)) for row in rows if row.provider == provider)
        style = {"linewidth": 2.4, "zorder": 3} if provider in INK else {"linewidth": 1.2, "alpha": 0.9}
        axis.plot(*zip(*points, strict=True), marker="o", markersize=4, label=provider,
                  color=colour(provider, providers), **style)  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.set_xlabel("tokens T" if x == "seqlen_q" else "keys in the cache S")
    axis.set_title(title, fontsize=10)


def swept(rows: Sequence[Row], suite: str) -> list[Row]:
    return [
        row
        for row in rows
        if row.suite == suite and row.shape.startswith(f"{FAMILY},") and row.sizes["prompt_length"] == 10
        and (suite != "decode" or (row.layout == "head-major" and row.sizes["batch"] == 1))
    ]  # fmt: skip


def attention(rows: Sequence[Row]) -> Any | None:
    """Time, and useful TFLOP/s, against T."""
    chosen = swept(rows, "attention")
    modes = [m for m in ("forward", "forward+backward") if any(row.mode == m for row in chosen)]
    if not modes:
        return None
    figure, axes = subplots(2 * len(modes))
    for i, mode in enumerate(modes):
        part = [row for row in chosen if row.mode == mode]
        lines(axes[2 * i], part, "seqlen_q", "p50_ms", f"{mode}, ms")
        axes[2 * i].set_yscale("log")
        lines(axes[2 * i + 1], part, "seqlen_q", "tflops", f"{mode}, TFLOP/s")
    axes[-1].legend(fontsize=7, bbox_to_anchor=(1.02, 1), loc="upper left")
    return figure


def decode(rows: Sequence[Row]) -> Any | None:
    """Bytes of the cache per second against S; the probe is what the machine can do."""
    chosen = swept(rows, "decode")
    if not chosen:
        return None
    figure, axes = subplots(1)
    lines(axes[0], chosen, "seqlen_k", "gbps", f"one token of {FAMILY}, GB/s of cache")
    axes[0].legend(fontsize=7, bbox_to_anchor=(1.02, 1), loc="upper left")
    return figure


def memory(rows: Sequence[Row]) -> Any | None:
    """Peak memory beyond the inputs, beside what outputs and gradients need."""
    chosen = [row for row in rows if row.suite == "memory"]
    groups = list(dict.fromkeys((row.shape, row.mode) for row in chosen))
    if not groups:
        return None
    figure, axes = subplots(len(groups))
    for axis, (shape, mode) in zip(axes, groups, strict=True):
        part = [row for row in chosen if (row.shape, row.mode) == (shape, mode)]
        names = [row.provider for row in part]
        peak, needed = part[0].figures  # in the order they were written
        axis.barh(names, [row.figures[peak] for row in part], color=[colour(n, names) for n in names])
        axis.axvline(part[0].figures[needed], color="black", linewidth=1, linestyle=":", label=needed)
        axis.set_xscale("log")
        axis.invert_yaxis()
        axis.tick_params(labelsize=7)
        axis.set_title(f"{shape}\n{mode}, MB", fontsize=9)
    axes[0].legend(fontsize=7)
    return figure


def roofline(rows: Sequence[Row]) -> Any | None:
    """Useful arithmetic against arithmetic per byte of inputs and outputs, under the measured roof."""
    product = [row.tflops for row in rows if row.provider.startswith("torch.mm") and row.tflops]
    probes = ("plain read of the cache", "copy of as many bytes")
    read = [row.gbps for row in rows if row.provider in probes and row.gbps]
    ours = [
        row for row in rows if row.provider in INK and row.tflops and row.suite in ("attention", "decode")
    ]
    if not (product and read and ours):
        return None
    peak, bandwidth = max(product), max(read) / 1e3
    figure, (axis,) = subplots(1)
    intensities = [2.0**k for k in range(-2, 14)]
    axis.plot(intensities, [min(peak, bandwidth * i) for i in intensities], color="black", linewidth=1,
              label=f"torch.mm {peak:.3g} TFLOP/s, read {bandwidth * 1e3:.0f} GB/s")  # fmt: skip
    for mode in dict.fromkeys(row.mode for row in ours):
        part = [row for row in ours if row.mode == mode]
        points = [
            (1e12 * (row.tflops or 0) * (row.p50_ms or 0) / 1e3 / moved(row), row.tflops) for row in part
        ]
        axis.scatter(*zip(*points, strict=True), s=22, label=mode)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("operations per byte of inputs and outputs")
    axis.set_title("zinit_kernels under the roof, TFLOP/s", fontsize=10)
    axis.legend(fontsize=7)
    return figure


def moved(row: Row) -> float:
    """Bytes of query, key, value and out, once each; their gradients too where they are made."""
    size, item = row.sizes, 4 if row.dtype == "float32" else 2
    query = size["batch"] * size["heads_q"] * size["seqlen_q"] * size["head_dim"]
    key = size["batch"] * size["heads_kv"] * size["seqlen_k"] * size["head_dim"]
    passes = {"forward": 1, "decode": 1, "backward": 2, "forward+backward": 3}[row.mode]
    return float(passes * 2 * (query + key) * item)

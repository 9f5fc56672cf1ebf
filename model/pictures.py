"""Pictures of a run: PNG files through matplotlib, without a screen and without pyplot.

pyplot would choose a backend by the environment, and Jupyter exports one (MPLBACKEND) that is not installed everywhere.
A picture is an extra: where it cannot be drawn, a warning says why.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import UserError, warn
from .run_folder import write_file


def loss_picture(path: str | Path, entries: Sequence[Mapping[str, float]]) -> None:
    """The training loss (and its running mean) and the validation loss against the step, from a run's metrics."""

    def draw(axes: Any) -> None:
        training = [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]
        validation = [(entry["step"], entry["val_loss"]) for entry in entries if "val_loss" in entry]
        if training:
            steps, losses = zip(*training, strict=True)
            axes.plot(steps, losses, color="tab:blue", alpha=0.3)
            axes.plot(steps, running_mean(losses), color="tab:blue", label="training")
        if validation:
            axes.plot(*zip(*validation, strict=True), color="tab:orange", marker="o", label="validation")
        axes.set(xlabel="step", ylabel="loss per answer token (nats)", ylim=(0, None))
        if training or validation:
            axes.legend()

    save_picture(path, draw)


def layer_picture(path: str | Path, entries: Sequence[Mapping[str, Any]], lowest: int) -> None:
    """Each adapted layer's gate and gradient against the step, from a run's metrics; nothing for metrics of before they
    had them. lowest: the number of the lowest adapted layer.
    """
    rows = [entry for entry in entries if entry.get("layer_grad_norms")]
    if not rows:
        return
    width = max(len(row["layer_grad_norms"]) for row in rows)
    rows = [row for row in rows if len(row["layer_grad_norms"]) == width]

    def draw(figure: Any) -> None:
        from matplotlib import colormaps

        steps = [row["step"] for row in rows]
        panels = figure.subplots(2, 1, sharex=True)
        for axes, name in zip(panels, ("layer_gates", "layer_grad_norms"), strict=True):
            for place in range(width):
                values = [row[name][place] if row.get(name) else math.nan for row in rows]
                color = colormaps["viridis"](place / max(width - 1, 1))
                label = f"layer {lowest + place}" if place in (0, width - 1) else None
                axes.plot(steps, values, color=color, label=label)
            axes.grid(alpha=0.3)
        panels[0].set(ylabel="mean |tanh(gate)|")
        panels[1].set(xlabel="step", ylabel="gradient's norm", yscale="log")
        panels[0].legend()

    save_figure(path, draw)


def save_picture(path: str | Path, draw: Callable[[Any], None]) -> None:
    """Writes a PNG of what `draw` puts on matplotlib's axes, whole or not at all, as `save_figure` does."""

    def on_axes(figure: Any) -> None:
        axes = figure.subplots()
        draw(axes)
        axes.grid(alpha=0.3)

    save_figure(path, on_axes)


def save_figure(path: str | Path, draw: Callable[[Any], None]) -> None:
    """Writes a PNG of what `draw` puts on matplotlib's figure, whole or not at all.

    Raises UserError if the file cannot be written. Whatever goes wrong in matplotlib is a warning.
    """
    backend = os.environ.pop("MPLBACKEND", None)  # matplotlib looks at it when it is imported
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150)
    except UserError:
        raise
    except (
        Exception
    ) as error:  # a broken matplotlibrc, no fonts, no matplotlib: nothing that was trained is lost
        reason = " ".join(str(error).split()) or type(error).__name__
        warn(f"the picture {path} was not drawn: {reason}.")
        return
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    write_file(path, buffer.getvalue())


def running_mean(values: Sequence[float], keep: float = 0.9) -> list[float]:
    """Exponential mean, without the pull towards 0 at its beginning."""
    total = weight = 0.0
    means = []
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        means.append(total / weight)
    return means

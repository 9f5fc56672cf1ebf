"""What a run reports: a line of JSON per step, and a picture of the losses."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from .errors import UserError
from .storage import write_file, writing

Entry = dict[str, float]


class MetricsLog:
    """metrics.jsonl: one object a line, each with its "step", flushed as it is written.

    Training lines carry the step from 0, validation lines the number of steps done. A run that resumes with
    `steps_done` drops what came after and writes it again; a new run, with 0, begins an empty file.
    """

    def __init__(self, path: str | Path, steps_done: int = 0):
        self.path = Path(path)
        before = read_metrics(self.path) if steps_done else []
        self.entries = [entry for entry in before if entry["step"] + ("loss" in entry) <= steps_done]
        write_file(self.path, "".join(map(_line, self.entries)).encode())
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 closed by close()

    def write(self, **entry: float) -> None:
        """Appends one line."""
        self.entries.append(entry)
        with writing(self.path):
            self._file.write(_line(entry))
            self._file.flush()

    def close(self) -> None:
        """Ends writing; `entries` stays."""
        with writing(self.path):
            self._file.close()


def read_metrics(path: str | Path) -> list[Entry]:
    """The entries of a metrics file, [] if there is none; a last line cut short by a crash is left out.

    Raises UserError for a file that is none.
    """
    path, entries = Path(path), []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            raise UserError(f"{path} is no metrics file: {line[:40]!r} holds no step. Move it away to go on.")
        entries.append(entry)
    return entries


def loss_picture(path: str | Path, entries: Sequence[Mapping[str, float]]) -> None:
    """A PNG of the training loss (and its running mean) and the validation loss against the step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    training = [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]
    validation = [(entry["step"], entry["val_loss"]) for entry in entries if "val_loss" in entry]
    if training:
        steps, losses = zip(*training, strict=True)
        axes.plot(steps, losses, color="tab:blue", alpha=0.3)
        axes.plot(steps, running_mean(losses), color="tab:blue", label="training")
    if validation:
        axes.plot(*zip(*validation, strict=True), color="tab:orange", marker="o", label="validation")
    axes.set(xlabel="step", ylabel="loss per answer token (nats)", ylim=(0, None))
    axes.grid(alpha=0.3)
    if training or validation:
        axes.legend()
    save_figure(path, figure)


def running_mean(values: Sequence[float], keep: float = 0.9) -> list[float]:
    """Exponential mean, without the pull towards 0 at its beginning."""
    total = weight = 0.0
    means = []
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        means.append(total / weight)
    return means


def save_figure(path: str | Path, figure: object) -> None:
    """Writes a matplotlib figure as PNG, whole or not at all, and lets go of it."""
    from matplotlib import pyplot

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    pyplot.close(figure)
    write_file(path, buffer.getvalue())


def _line(entry: Mapping[str, float]) -> str:
    return json.dumps(entry) + "\n"

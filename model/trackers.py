"""Metrics in TensorBoard, Weights & Biases and MLflow, each through its own library.

    check_trackers("tensorboard,mlflow")           # before anything is written
    for tracker in open_trackers("tensorboard,mlflow", folder, options, steps_done): ...

Projects, servers and keys are what each library's own environment variables say (WANDB_PROJECT, MLFLOW_TRACKING_URI,
...). A run that resumes goes on in its record of the same tracker.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from .errors import UserError, warn
from .run_folder import write_file

Values = Mapping[str, float]


class Tracker(Protocol):
    """Where metrics go besides metrics.jsonl."""

    def log(self, step: int, values: Values) -> None:
        """The numbers of one step."""

    def close(self) -> None:
        """Writes what is still held back."""


def check_trackers(names: str | None) -> list[str]:
    """The names in a list with commas. Raises UserError for one that is not known or whose library is missing."""
    found = [name.strip() for name in (names or "").split(",") if name.strip()]
    for name in found:
        if name not in _LIBRARIES:
            raise UserError(
                f"--log {name}: the trackers are {', '.join(_LIBRARIES)}, with commas between them."
            )
        try:
            _LIBRARIES[name]()
        except ImportError:
            package = {"wandb": "wandb", "mlflow": "mlflow"}.get(name, "tensorboard")
            raise UserError(
                f"--log {name} needs a library that is not installed: pip install {package}."
            ) from None
    return list(dict.fromkeys(found))


def open_trackers(
    names: Sequence[str], folder: Path, config: Mapping[str, Any], steps_done: int
) -> list[Tracker]:
    """The trackers of a run. config: its options. steps_done: of the run that it goes on with, 0 for a new one.

    Raises UserError for one that cannot be opened. One that fails later is dropped with a warning: a server that has
    gone is no reason to end hours of training.
    """
    found: list[Tracker] = []
    for name in names:
        try:
            found.append(_Guarded(name, _TRACKERS[name](folder, config, steps_done)))
        except UserError:
            raise
        except Exception as error:  # whatever a library, a server or a setting of theirs comes up with
            raise UserError(
                f"--log {name} cannot be opened: {_reason(error)}; --resume goes on without it."
            ) from error
    return found


def numbers(entry: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a metrics entry; a list becomes one number for each of its places."""
    found: dict[str, float] = {}
    for name, value in entry.items():
        if isinstance(value, list):
            found |= {f"{name}/{place:02d}": item for place, item in enumerate(value)}
        elif name != "step":
            found[name] = value
    return found


class _Guarded:
    """A tracker that is dropped when it fails."""

    def __init__(self, name: str, tracker: Tracker):
        self.name, self.tracker = name, tracker

    def log(self, step: int, values: Values) -> None:
        self._try(lambda: self.tracker.log(step, values))

    def close(self) -> None:
        self._try(lambda: self.tracker.close())

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            warn(f"--log {self.name} failed and is left out from here on ({_reason(error)}).")
            self.tracker = _Nowhere()


class _Nowhere:
    def log(self, step: int, values: Values) -> None:
        pass

    def close(self) -> None:
        pass


def _reason(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300].rstrip(".")


class _TensorBoard:
    def __init__(self, folder: Path, config: Mapping[str, Any], steps_done: int):
        self.writer = _tensorboard()(str(folder / "tensorboard"), purge_step=steps_done or None)
        if not steps_done:
            self.writer.add_text(
                "options", "\n".join(f"    {name}: {value}" for name, value in config.items())
            )

    def log(self, step: int, values: Values) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _Wandb:
    def __init__(self, folder: Path, config: Mapping[str, Any], steps_done: int):
        self.run = _wandb().init(
            id=_run_id(folder, "wandb", steps_done), dir=str(folder), name=folder.name,
            resume="allow", config=dict(config),
        )  # fmt: skip

    def log(self, step: int, values: Values) -> None:
        # wandb's own step must rise, and a validation has the step of the training step before it
        self.run.log({"trained_steps": step, **values})

    def close(self) -> None:
        self.run.finish()


class _MLflow:
    def __init__(self, folder: Path, config: Mapping[str, Any], steps_done: int):
        self.mlflow = _mlflow()
        known = folder / "mlflow.run"
        before = known.read_text().strip() if steps_done and known.is_file() else None
        run = self.mlflow.start_run(run_id=before, run_name=None if before else folder.name)
        if before is None:
            self.mlflow.log_params({name: str(value)[:500] for name, value in config.items()})
            write_file(known, f"{run.info.run_id}\n".encode())

    def log(self, step: int, values: Values) -> None:
        self.mlflow.log_metrics({name: float(value) for name, value in values.items()}, step=step)

    def close(self) -> None:
        self.mlflow.end_run()


def _run_id(folder: Path, name: str, steps_done: int) -> str:
    """An id that a run keeps when it resumes."""
    known = folder / f"{name}.run"
    if steps_done and known.is_file():
        return known.read_text().strip()
    new = hashlib.sha256(uuid.uuid4().bytes).hexdigest()[:16]
    write_file(known, f"{new}\n".encode())
    return new


def _tensorboard() -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter


def _wandb() -> Any:
    import wandb

    return wandb


def _mlflow() -> Any:
    import mlflow

    return mlflow


_LIBRARIES: dict[str, Callable[[], Any]] = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}
_TRACKERS: dict[str, Callable[[Path, Mapping[str, Any], int], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _MLflow,
}

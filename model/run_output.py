"""What a run writes into its folder, and when: one process writes, the others keep what they need to know."""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from .adapter import LlamaAdapter
from .config import LlamaConfig
from .config_file import write_config
from .errors import warn
from .lora import Lora, save_lora
from .pictures import layer_picture, loss_picture
from .resume import save_checkpoint
from .run_folder import MetricsLog, remove_leftovers, writing
from .trackers import numbers, open_trackers
from .train_options import ADAPTER_FILES, LORA_FOLDER, config_of
from .validation import Best, Previews, drop_later
from .vision.files import save_adapter

_ADAPTERS = {*ADAPTER_FILES.values(), LORA_FOLDER}
FILES = (
    "checkpoint.pt", "metrics.jsonl", "loss.png", "layers.png", "config.yaml", "best.safetensors",
    f"best-{LORA_FOLDER}", *_ADAPTERS,
)  # fmt: skip


class RunOutput:
    """The files of one run. writes: False in a process that leaves them to another."""

    def __init__(
        self,
        options: argparse.Namespace,
        model: LlamaConfig,
        adapter: LlamaAdapter | Lora,
        optimizer: torch.optim.Optimizer,
        run: dict[str, Any],
        metadata: Mapping[str, str],
        writes: bool = True,
    ):
        self.options, self.model, self.adapter, self.optimizer = options, model, adapter, optimizer
        self.run, self.metadata, self.writes = run, metadata, writes
        self.folder: Path = options.out
        self.refuse_another: Callable[[], None] | None = None  # `held` gives it
        self.checkpoint_file = self.folder / "checkpoint.pt"
        is_lora = isinstance(adapter, Lora)
        self.adapter_file = self.folder / (LORA_FOLDER if is_lora else ADAPTER_FILES[options.format])
        self.best_file = self.folder / (f"best-{LORA_FOLDER}" if is_lora else "best.safetensors")

    def begin(self, done: int, previews: Previews | None = None) -> None:
        """Prepares the folder for a run that goes on after `done` steps; a new one replaces what was there."""
        self.trackers = []
        if self.writes:
            if not self.options.resume:
                # first: whatever ends the run from here on, --resume goes on with this one
                self.save_state(done)
            if done == 0:  # also where that one was killed before it had removed what an older run left
                self._remove(set(FILES) - {"checkpoint.pt", "metrics.jsonl"})
            remove_leftovers(self.folder, FILES)
            config = config_of(self.options)
            write_config(self.folder / "config.yaml", config)
            if previews:
                drop_later(previews.path, done)
            self.trackers = open_trackers(self.options.trackers, self.folder, vars(config), done)
        self.metrics = MetricsLog(self.folder / "metrics.jsonl", done, [self._track], self.writes)
        self.best = Best(self.metrics.entries, self.options.patience)
        keeps = self.options.keep_best or self.options.patience
        if self.writes and keeps and self.best.loss < math.inf and not self.best_file.exists():
            warn(
                f"the adapter with the lowest validation loss until now, {self.best.loss:.4f}, was not kept: "
                f"{self.best_file} comes with the next lower one."
            )

    def save_state(self, done: int) -> None:
        """The checkpoint after so many steps."""
        if self.writes:
            self._check_folder()
            save_checkpoint(self.checkpoint_file, done, self.adapter, self.optimizer, self.run)

    def save_result(self) -> None:
        """The adapter as it is; one in another --format goes."""
        if self.writes:
            self._check_folder()
            self._save_adapter(self.adapter_file, self.options.format)
            self._remove(_ADAPTERS - {self.adapter_file.name})

    def _check_folder(self) -> None:
        if self.refuse_another is not None:
            self.refuse_another()

    def validated(self, done: int, epoch: float, loss: float) -> str:
        """Takes the loss of a validation, and keeps the adapter if it is the best one and wanted. What to say."""
        self.metrics.write(step=done, epoch=epoch, val_loss=loss)
        keeps = self.best.improves(loss) and bool(self.options.keep_best or self.options.patience)
        if keeps and self.writes:
            self._save_adapter(self.best_file, "zinit")
        return f"step {done}: validation loss {loss:.4f}{', the best until now' * keeps}"

    def was_validated(self, done: int) -> bool:
        """Whether the metrics have the validation after so many steps."""
        return any("val_loss" in entry and entry["step"] == done for entry in self.metrics.entries)

    def end(self) -> None:
        """Closes everything and draws the pictures."""
        self.metrics.close()
        for tracker in self.trackers:
            tracker.close()
        if self.writes:
            loss_picture(self.folder / "loss.png", self.metrics.entries)
            layer_picture(self.folder / "layers.png", self.metrics.entries, self.adapter.layers[0])

    def _save_adapter(self, path: Path, format: str) -> None:
        if isinstance(self.adapter, Lora):
            save_lora(path, self.adapter, self.options.base)
            return
        with writing(path):
            save_adapter(path, self.adapter, self.model, format, self.metadata)

    def _track(self, entry: Mapping[str, Any]) -> None:
        for tracker in self.trackers:
            tracker.log(entry["step"], numbers(entry))

    def _remove(self, names: set[str]) -> None:
        for name in names:
            if name in (LORA_FOLDER, f"best-{LORA_FOLDER}"):
                shutil.rmtree(self.folder / name, ignore_errors=True)
            else:
                (self.folder / name).unlink(missing_ok=True)

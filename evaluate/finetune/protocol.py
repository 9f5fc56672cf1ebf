"""The protocol of all comparisons: choose each method's learning rate on the validation data, then test once a seed.

1. Every method is trained with each of its learning rates, with the first seed. The best on the validation data is
   chosen, the first of equals.
2. With that rate it is trained anew for every seed, and each of these models sees the test data once.

All methods get the same data in the same order, and the same number of steps. A finding is in the ledger before the
next one is begun, so a run that was killed goes on where it ended.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

import zinit_kernels

from ..asking import Interrupted
from ..ledgers import Entry, entries_of
from ..lines import LineFile
from ..shared import (
    held,
    interruptible,
    make_directory,
    messages,
    progress,
    refuse_unwritable,
)
from .fitting import fit
from .methods import LEARNING_RATES, Size, adapt, split_name, trained_numbers

LEDGER = "ledger.jsonl"


class Task:
    """What is learned. Subclasses are told nothing about methods.

    title: of the table. score: the name of the figure that learning rates are chosen by, larger is better. figures: the
    names of the test figures, in the order in which they are shown.
    """

    title = ""
    score = ""
    figures: Sequence[str] = ()

    def make(self, seed: int) -> nn.Module:
        """The base with a fresh head, whose initial values depend on the seed."""
        raise NotImplementedError

    def count(self, refit: bool) -> int:
        """Training examples; refit: with the validation data, if the protocol trains on them in the end."""
        raise NotImplementedError

    def loss(self, model: Any, rows: torch.Tensor, refit: bool) -> torch.Tensor:
        """Of these training examples."""
        raise NotImplementedError

    def validate(self, model: Any) -> float:
        """The score on the validation data."""
        raise NotImplementedError

    def test(self, model: Any) -> dict[str, float]:
        """The figures on the test data."""
        raise NotImplementedError


@dataclass(frozen=True)
class Plan:
    """What a comparison runs."""

    methods: Sequence[str]
    seeds: Sequence[int]
    steps: int
    batch_size: int
    size: Size
    head_learning_rate: float
    with_head: bool = True
    device: torch.device = torch.device("cpu")
    learning_rates: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def rates(self, method: str) -> Sequence[float]:
        """The learning rates of a method: its own, its kind's, or the defaults."""
        kind, _ = split_name(method)
        return self.learning_rates.get(method) or self.learning_rates.get(kind) or LEARNING_RATES[kind]


def compare(task: Task, plan: Plan, out: Path, run: Mapping[str, Any], name: str = "") -> list[Entry]:
    """Runs what the ledger of the folder does not have yet; its entries.

    Args:
        run: what tells this run from another one. name: of the task, where one ledger holds several.

    Raises:
        Interrupted: at the first Ctrl-C, after the model that was being trained. UserError: the ledger of another run.
    """
    for method in plan.methods:
        split_name(method)
    refuse_unwritable(out)
    make_directory(out)
    with held(out), closing(LineFile(out / LEDGER, run)) as ledger:
        found = {_key(entry): entry for entry in entries_of(ledger.path, ledger.entries)}
        tried = [("validation", m, rate, plan.seeds[0]) for m in plan.methods for rate in plan.rates(m)]
        total, done = len(tried) + len(plan.methods) * len(plan.seeds), 0
        with interruptible() as stop, progress(messages(), total) as show:

            def once(kind: str, method: str, rate: float, seed: int) -> dict[str, Any]:
                nonlocal done
                key = (name, kind, method, rate, seed)
                if key not in found:
                    if stop.is_set():
                        raise Interrupted(f"{done} of {total} models are trained")
                    show(done, "models", f"{method} at {rate:g}, seed {seed}", always=True)
                    found[key] = {"task": name, "kind": kind, **_train(task, plan, kind, method, rate, seed)}
                    ledger.add([found[key]])
                done += 1
                show(done, "models")
                return found[key]

            entries = []
            for method in plan.methods:
                choices = [once("validation", method, rate, plan.seeds[0]) for rate in plan.rates(method)]
                best = max(choices, key=lambda entry: entry["figures"][task.score])
                entries += choices
                entries += [once("test", method, best["learning_rate"], seed) for seed in plan.seeds]
    return entries


@cache
def revision() -> str:
    """The commit of this checkout, with a + where tracked files were changed; the version where it is none."""
    folder = Path(__file__).resolve().parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=folder,
            capture_output=True,
            text=True,
        )
    except OSError:  # no git here
        return zinit_kernels.__version__
    is_ours = found.returncode == 0 and "site-packages" not in folder.parts
    return found.stdout.strip() if is_ours else zinit_kernels.__version__


def _key(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(entry[name] for name in ("task", "kind", "method", "learning_rate", "seed"))


def _train(task: Task, plan: Plan, kind: str, method: str, rate: float, seed: int) -> dict[str, Any]:
    refit = kind == "test"
    torch.manual_seed(seed)
    model = task.make(seed)
    torch.manual_seed(seed)
    groups = adapt(model, method, plan.size, rate, plan.head_learning_rate, plan.with_head)
    model.to(plan.device)
    began = time.perf_counter()
    if groups:

        def loss(rows: torch.Tensor) -> torch.Tensor:
            return task.loss(model, rows, refit)

        fit(groups, loss, task.count(refit), plan.batch_size, plan.steps, seed)
    seconds = time.perf_counter() - began
    with torch.inference_mode():
        figures = task.test(model) if refit else {task.score: task.validate(model)}
    return {
        "method": method, "learning_rate": rate, "seed": seed, "figures": figures,
        "numbers": trained_numbers(groups), "seconds": round(seconds, 2), "commit": revision(),
    }  # fmt: skip

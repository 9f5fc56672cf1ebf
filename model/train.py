"""Trains an adapter on instruction data: python -m model.train --base DIR --data FILE --out DIR

The defaults are the paper's recipe (arXiv 2303.16199, section 4.1, and its official script). The output folder gets

    adapter.safetensors   the adapter after the last whole epoch (adapter.pth with --format official-v1)
    checkpoint.pt         what --resume needs, at every epoch's end, every --save-every steps and on Ctrl-C
    metrics.jsonl         one line per step and per validation
    loss.png              the same as a picture
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from zinit_kernels.console import Parser

from .adapter import LlamaAdapter
from .adapter_files import load_adapter, save_adapter
from .checkpoint import base_print, data_print, load_checkpoint, refuse_missing, restore, save_checkpoint
from .config import AdapterConfig
from .data import Sample, batches, encode, split
from .errors import UserError, program_name, run_program, warn
from .llama import Llama
from .loading import DTYPES, default_device, load_base, open_device
from .metrics import MetricsLog, loss_picture
from .records import read_records
from .storage import held, make_directory, refuse_occupied, remove_leftovers, writing
from .tokenizer import load_tokenizer
from .training import Recipe, batch_loss, evaluate, make_optimizer, train

ADAPTER_FILES = {"zinit": "adapter.safetensors", "official-v1": "adapter.pth"}


def main(arguments: list[str] | None = None) -> None:
    """The program. Everything is read and checked before the first file is written."""
    options = _parser().parse_args(arguments)
    _check_output(options)
    if options.save_every is not None and options.save_every < 1:
        raise UserError(f"--save-every must be at least 1, got {options.save_every}.")
    recipe = _recipe(options)
    console = Console(stderr=True, highlight=False)
    base, training, validation = _load(options, console)
    adapter = _make_adapter(options, base)
    _try_backend(options.backend, base, adapter, training[0], recipe)
    optimizer = make_optimizer(adapter, recipe)
    run = {
        "base model": base_print(base),
        "dtype": str(base.dtype),
        "device": base.device.type,
        "backend": options.backend,
        "data": data_print(training),
        "adapter": asdict(adapter.config) | {"init": str(options.init)},
    } | asdict(recipe)
    with held(make_directory(options.out)):
        _check_output(options)  # again: while the base was loaded another run may have begun here
        first_step = 0
        if options.resume:
            path = options.out / "checkpoint.pt"
            checkpoint = load_checkpoint(path, run)
            restore(path, checkpoint, adapter, optimizer)
            first_step = checkpoint.step
        Run(options, recipe, console, base, adapter, optimizer, training, validation, run).go(first_step)


@dataclass
class Run:
    """A training run with its files and its progress line."""

    options: argparse.Namespace
    recipe: Recipe
    console: Console
    base: Llama
    adapter: LlamaAdapter
    optimizer: torch.optim.Optimizer
    training: list[Sample]
    validation: list[Sample]
    identity: dict[str, Any]  # what a run that goes on with this one must agree on

    def __post_init__(self) -> None:
        self.output: Path = self.options.out
        self.steps_per_epoch = self.recipe.steps_per_epoch(len(self.training))
        self.total_steps = self.recipe.epochs * self.steps_per_epoch

    def go(self, first_step: int) -> None:
        """Trains to the end, or to Ctrl-C, which saves and exits with status 130."""
        self.console.print(self.summary(first_step))
        if not self.options.resume:
            # first: whatever ends the run from here on, --resume goes on with this one
            self.save_checkpoint(0)
            for name in ("loss.png", *ADAPTER_FILES.values()):
                (self.output / name).unlink(missing_ok=True)
        remove_leftovers(self.output, ("checkpoint.pt", "metrics.jsonl", "loss.png", *ADAPTER_FILES.values()))
        metrics = MetricsLog(self.output / "metrics.jsonl", first_step)
        done, tokens, seconds = first_step, 0, 0.0
        with interruptible() as interrupt, _progress(self.console) as progress:
            bar = progress.add_task("", total=self.total_steps, completed=done, loss="-", speed="-")

            def show_pass(number: int, total: int) -> None:
                progress.update(bar, description=f"validating {number}/{total}")

            if done % self.steps_per_epoch == 0 and not any(
                "val_loss" in entry and entry["step"] == done for entry in metrics.entries
            ):
                self.validate(metrics, done, interrupt, show_pass)
            for report in train(
                self.base, self.adapter, self.training, self.recipe, self.optimizer,
                first_step=first_step, stop=interrupt.is_set,
            ):  # fmt: skip
                done = report.step + 1
                metrics.write(**report._asdict())
                tokens, seconds = tokens + report.num_tokens, seconds + report.seconds
                epoch = f"epoch {int(report.epoch) + 1}/{self.recipe.epochs}"
                speed = f"{tokens / seconds:,.0f}"
                progress.update(
                    bar, completed=done, description=epoch, loss=f"{report.loss:.3f}", speed=speed
                )
                if done % self.steps_per_epoch == 0:
                    self.validate(metrics, done, interrupt, show_pass)
                    self.save_adapter()
                    self.save_checkpoint(done)
                elif self.options.save_every and done % self.options.save_every == 0:
                    self.save_checkpoint(done)
            stopped = interrupt.is_set()
        if stopped:
            self.save_checkpoint(done)
        elif done == first_step:
            self.save_adapter()  # nothing was left to train, but the --format may be another
        metrics.close()
        loss_picture(self.output / "loss.png", metrics.entries)
        if stopped:
            self.console.print(
                f"Stopped after step {done} of {self.total_steps}; --resume goes on from there."
            )
            sys.exit(130)  # what shells expect of a program that Ctrl-C ended
        self.console.print(self.farewell(metrics))

    def validate(
        self, metrics: MetricsLog, step: int, interrupt: Event, report: Callable[[int, int], None]
    ) -> None:
        """Writes the loss on the samples held back, if there are any; an interrupted one is made up for on --resume."""
        if not self.validation:
            return
        loss = evaluate(self.base, self.adapter, self.validation, self.recipe, interrupt.is_set, report)
        if not interrupt.is_set():
            metrics.write(step=step, epoch=step / self.steps_per_epoch, val_loss=loss)

    def save_checkpoint(self, step: int) -> None:
        """Writes what --resume needs."""
        save_checkpoint(self.output / "checkpoint.pt", step, self.adapter, self.optimizer, self.identity)

    def save_adapter(self) -> None:
        """Writes the adapter in the format asked for; an earlier one in another format goes."""
        with writing(path := self.output / ADAPTER_FILES[self.options.format]):
            metadata = {"base": base_print(self.base, torch.bfloat16)}
            save_adapter(path, self.adapter, self.base.config, self.options.format, metadata)
        for name in ADAPTER_FILES.values():
            if name != path.name:
                (self.output / name).unlink(missing_ok=True)

    def summary(self, first_step: int) -> str:
        """What is about to be trained."""
        trainable = self.adapter.num_parameters
        share = trainable / (trainable + sum(parameter.numel() for parameter in self.base.parameters()))
        resumed = f", from step {first_step}" if first_step else ""
        return (
            f"{trainable:,} trainable parameters ({share:.3%}) in layers {self.adapter.layers[0]} to "
            f"{self.adapter.layers[-1]}; {len(self.training)} samples to train on, {len(self.validation)} to validate; "
            f"{self.total_steps} steps in {self.recipe.epochs} epochs{resumed}; "
            f"learning rate up to {self.recipe.peak_lr:.3g}"
        )

    def farewell(self, metrics: MetricsLog) -> str:
        """What came of it."""
        losses = [entry["val_loss"] for entry in metrics.entries if "val_loss" in entry]
        change = f"Validation loss {losses[0]:.4f} -> {losses[-1]:.4f}. " if losses else ""
        return f"{change}The adapter is in {self.output / ADAPTER_FILES[self.options.format]}."


@contextmanager
def interruptible() -> Iterator[Event]:
    """An event that the first Ctrl-C (or SIGTERM) sets. A second one ends the program as usual."""
    event = Event()
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: object) -> None:
        event.set()
        restore()

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    for number in previous:
        signal.signal(number, ask)
    try:
        yield event
    finally:
        restore()


def _check_output(options: argparse.Namespace) -> None:
    """Whether the output folder is one that this run may write into."""
    if options.resume:
        refuse_missing(options.out / "checkpoint.pt")
    elif not options.overwrite:
        refuse_occupied(options.out, "go on with --resume, or replace the run in it with --overwrite")


def _load(options: argparse.Namespace, console: Console) -> tuple[Llama, list[Sample], list[Sample]]:
    """The frozen base, and the samples to train on and to validate on."""
    records = [record for path in options.data for record in read_records(path, options.strict)]
    base = load_base(options.base, DTYPES.get(options.dtype), open_device(options.device)).freeze()
    base.set_backend(options.backend)
    tokenizer = load_tokenizer(options.base).check_vocabulary(base.config.vocab_size)
    if tokenizer.eos_id is None:
        warn("the tokenizer names no end-of-sequence token: the adapter will not learn where an answer ends.")
    max_seq_len = min(512, base.config.max_seq_len) if options.max_seq_len is None else options.max_seq_len
    if max_seq_len < 2:
        raise UserError(f"--max-seq-len must be at least 2, got {max_seq_len}.")
    if max_seq_len > base.config.max_seq_len:
        raise UserError(
            f"--max-seq-len {max_seq_len} is beyond the model's context of {base.config.max_seq_len}."
        )
    samples, report = encode(records, tokenizer, max_seq_len)
    console.print(f"{len(records)} records: {report}")
    if options.strict and (report.truncated or report.dropped or report.untold):
        raise UserError(f"--strict: of {len(records)} records {report}.")
    data = " and ".join(map(str, options.data))
    if not 0 <= options.validation < 1:
        raise UserError(f"--validation must be a share from 0 to below 1, got {options.validation}.")
    training, validation = split(samples, options.validation, options.seed)
    if not training and validation:
        raise UserError(f"--validation took the only sample of {data}: pass --validation 0.")
    if not training:
        raise UserError(f"{data} leaves no sample to train on ({report}).")
    return base, training, validation


def _make_adapter(options: argparse.Namespace, base: Llama) -> LlamaAdapter:
    chosen = {"prompt_length": options.prompt_length, "gate_activation": options.gate_activation}
    if options.init:
        adapter = load_adapter(options.init, base.config, **chosen, base=base_print(base, torch.bfloat16))
        if options.layers not in (None, len(adapter.layers)):
            raise UserError(f"{options.init} adapts {len(adapter.layers)} layers, not {options.layers}.")
        return adapter.to(base.device)
    told = {name: value for name, value in chosen.items() if value is not None}
    config = AdapterConfig(num_layers=options.layers, **told)
    generator = torch.Generator().manual_seed(options.seed)
    return LlamaAdapter(base.config, config, generator).to(base.device)


def _try_backend(backend: str, base: Llama, adapter: LlamaAdapter, sample: Sample, recipe: Recipe) -> None:
    """One pass over a single token, so that a backend that cannot run is refused before anything is written."""
    if backend == "auto":
        return
    short = Sample(sample.tokens[:2], 1)
    try:
        with torch.no_grad():
            batch_loss(
                base,
                adapter,
                next(batches([short], recipe.max_tokens, packed=recipe.packed)),
                recipe.autocast,
            )
    except ValueError as error:
        raise UserError(f"--backend {backend}: {error}.") from error


def _recipe(options: argparse.Namespace) -> Recipe:
    return Recipe(
        epochs=options.epochs,
        warmup_epochs=options.warmup_epochs,
        base_lr=options.base_lr,
        min_lr=options.min_lr,
        weight_decay=options.weight_decay,
        batch_size=options.batch_size,
        max_grad_norm=options.clip,
        max_tokens=options.max_tokens,
        packed=not options.padded,
        autocast=options.autocast,
        seed=options.seed,
    )


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("{task.fields[speed]} tokens/s"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
    )


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=program_name("train"),
        description="Trains a LLaMA-Adapter on Alpaca-style data. The defaults are the paper's recipe.",
    )
    recipe, default = Recipe(), "(default: %(default)s)"
    # fmt: off
    files = parser.add_argument_group("files")
    files.add_argument("--base", type=Path, required=True, metavar="DIR", help="Hugging Face or Meta checkpoint folder")
    files.add_argument("--data", type=Path, action="append", required=True, metavar="FILE", help="JSON list or JSONL "
                       "of objects with instruction, output and perhaps input; may be repeated: all files count")
    files.add_argument("--strict", action="store_true", help="refuse data of which a record would be left out or cut")
    files.add_argument("--out", type=Path, required=True, metavar="DIR", help="a folder that is new or empty")
    there = files.add_mutually_exclusive_group()
    there.add_argument("--resume", action="store_true", help="go on with the run in --out, exactly")
    there.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    files.add_argument("--format", choices=ADAPTER_FILES, default="zinit", help="of the adapter; official-v1 "
                       f"does not say how many prompts a layer has, nor for which base it is {default}")
    files.add_argument("--save-every", type=int, metavar="STEPS", help="checkpoints besides each epoch's end")

    adapter = parser.add_argument_group("adapter")
    adapter.add_argument("--prompt-length", type=int, help="prompts in each layer (default: 10, or as --init says)")
    adapter.add_argument("--gate-activation", choices=("tanh", "identity"),
                         help="of the gates (default: tanh, or as --init says)")
    adapter.add_argument("--layers", type=int, help="how many of the topmost (default: all but the lowest two)")
    adapter.add_argument("--init", type=Path, metavar="FILE", help="start from this adapter instead of a new one")

    training = parser.add_argument_group("recipe")
    training.add_argument("--epochs", type=int, default=recipe.epochs, help=default)
    training.add_argument("--warmup-epochs", type=float, default=recipe.warmup_epochs, help=default)
    training.add_argument("--base-lr", type=float, default=recipe.base_lr,
                          help=f"the learning rate is this times batch size / 256 {default}")
    training.add_argument("--min-lr", type=float, default=recipe.min_lr, help=f"where it ends {default}")
    training.add_argument("--weight-decay", type=float, default=recipe.weight_decay, help=default)
    training.add_argument("--batch-size", type=int, default=recipe.batch_size,
                          help=f"samples per optimizer step, in as many passes as they need {default}")
    training.add_argument("--clip", type=float, metavar="NORM", help="clip the gradient to this norm (default: off)")
    training.add_argument("--validation", type=float, default=0.05, metavar="SHARE",
                          help=f"of the samples, held back {default}")
    training.add_argument("--seed", type=int, default=recipe.seed, help=default)

    machine = parser.add_argument_group("machine")
    machine.add_argument("--max-seq-len", type=int, help="cut samples here (default: 512 or the model's context)")
    machine.add_argument("--max-tokens", type=int, default=recipe.max_tokens, help=f"in one forward pass {default}")
    machine.add_argument("--padded", action="store_true", help="pad samples to rows instead of packing them")
    machine.add_argument("--autocast", action="store_true", help="compute in bfloat16")
    machine.add_argument("--dtype", choices=DTYPES, help="of the base's weights (default: the files')")
    machine.add_argument("--device", default=default_device(), help=default)
    machine.add_argument("--backend", default="auto", help=f"of the attention kernels {default}")
    # fmt: on
    return parser


if __name__ == "__main__":
    run_program(main)

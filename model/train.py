"""Trains an adapter on instruction data: python -m model.train --base DIR --data FILE --out DIR

The defaults are the paper's recipe (arXiv 2303.16199, section 4.1, and its official script). The output folder gets

    adapter.safetensors   the adapter after the last whole epoch (adapter.pth with --format official-v1)
    checkpoint.pt         what --resume needs, at every epoch's end, every --save-every steps and on Ctrl-C
    metrics.jsonl         one line per step and per validation
    loss.png              the same as a picture
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from zinit_kernels.console import Parser

from .adapter import LlamaAdapter
from .adapter_files import read_checkpoint
from .config import AdapterConfig, LlamaConfig
from .data import EncodingReport, Sample, batches, encode, split
from .errors import UserError, program_name, run_program, warn
from .fingerprint import adapter_metadata, base_fingerprint, data_fingerprint, first_fingerprint
from .llama import Llama
from .loading import DTYPES, default_device, load_base, open_device
from .mixture import Mixture, read_share
from .pictures import loss_picture
from .program import interruptible, program
from .progress import messages, progress
from .recipe import Recipe, recipe_warnings
from .records import Record, read_records
from .resume import load_checkpoint, machine, refuse_missing, restore, save_checkpoint
from .run_folder import (
    MetricsLog,
    held,
    make_directory,
    refuse_occupied,
    refuse_unwritable,
    remove_leftovers,
    writing,
)
from .tokenizer import load_tokenizer
from .train_loop import batch_loss, evaluate, make_optimizer, train
from .vision.adapter import VisualAdapter
from .vision.features import Features
from .vision.files import EXTRAS_FORMAT, load_adapter, save_adapter
from .vision.options import add_training_options, check_options, visual_adapter
from .vision.records import Found, read_image_records
from .vision.training import encode_images, prepare_adapter

ADAPTER_FILES = {"zinit": "adapter.safetensors", "official-v1": "adapter.pth"}
FILES = ("checkpoint.pt", "metrics.jsonl", "loss.png", *ADAPTER_FILES.values())


@program(
    "lower --max-tokens or --max-seq-len, or take --dtype bfloat16; --resume goes on from the last checkpoint"
)
def main(arguments: list[str] | None = None) -> None:
    """The program. Everything is read and checked before the first file is written."""
    options = _parser().parse_args(arguments)
    options.paths, options.shares = zip(*map(read_share, options.data), strict=True)
    check_options(options)
    _check_folder(options)
    recipe = _recipe(options)
    console = messages()
    say = console.print

    found = [_read_file(options, path) for path in options.paths]
    base = load_base(options.base, DTYPES.get(options.dtype), open_device(options.device)).freeze()
    base.set_backend(options.backend)
    adapter = _make_adapter(options, base)
    records = [_with_images(options, adapter, file, console) for file in found]
    training, validation, mixture, report = _samples(options, records, base.config)
    say(report)
    if isinstance(adapter, VisualAdapter):
        all_records = [record for file in records for record in file]
        prepare_adapter(adapter, all_records, options.stage, not options.resume and _is_new(options))
    _try_backend(options.backend, base, adapter, training[0], recipe)
    lengths = [len(training[i].tokens) for i in mixture.order(recipe.seed, 0)]
    for sentence in recipe_warnings(recipe, lengths, options.init is None):
        warn(f"{sentence}.")
    optimizer = make_optimizer(adapter, recipe)
    steps_per_epoch, num_steps = recipe.steps_per_epoch(mixture.size), recipe.num_steps(mixture.size)
    run = _identity(options, recipe, base, adapter, training, mixture)
    metadata = adapter_metadata(base)

    with held(make_directory(options.out)):
        _check_folder(options)  # again: while the base was loaded another run may have begun here
        checkpoint_file, adapter_file = (
            options.out / "checkpoint.pt",
            options.out / ADAPTER_FILES[options.format],
        )
        done = 0  # optimizer steps
        if options.resume:
            checkpoint = load_checkpoint(checkpoint_file, run, num_steps)
            restore(checkpoint_file, checkpoint, adapter, optimizer)
            done = checkpoint.step
        say(_summary(recipe, base, adapter, mixture.size, len(validation), done))

        def save_state() -> None:
            save_checkpoint(checkpoint_file, done, adapter, optimizer, run)

        def save_result() -> None:
            with writing(adapter_file):
                save_adapter(adapter_file, adapter, base.config, options.format, metadata)
            _remove(options.out, set(ADAPTER_FILES.values()) - {adapter_file.name})  # of another --format

        def validate() -> None:
            if not validation:
                return

            def tell(number: int, total: int) -> None:
                show(done, f"validating {number}/{total}, step")

            loss = evaluate(base, adapter, validation, recipe, interrupt.is_set, tell)
            if not interrupt.is_set():  # an interrupted one is made up for on --resume
                metrics.write(step=done, epoch=done / steps_per_epoch, val_loss=loss)
                say(f"step {done}: validation loss {loss:.4f}")

        if not options.resume:
            save_state()  # first: whatever ends the run from here on, --resume goes on with this one
            _remove(options.out, {"loss.png", *ADAPTER_FILES.values()})
        remove_leftovers(options.out, FILES)
        metrics = MetricsLog(options.out / "metrics.jsonl", done)
        first, tokens, seconds = done, 0, 0.0
        with interruptible() as interrupt, progress(console, num_steps, done) as show:
            was_validated = any("val_loss" in entry and entry["step"] == done for entry in metrics.entries)
            if done % steps_per_epoch == 0 and not was_validated:
                validate()
            for report in train(
                base, adapter, training, recipe, optimizer,
                first_step=first, stop=interrupt.is_set, mixture=mixture,
            ):  # fmt: skip
                done = report.step + 1
                metrics.write(**report._asdict())
                tokens, seconds = tokens + report.num_tokens, seconds + report.seconds
                epoch_ends = done % steps_per_epoch == 0
                title = f"epoch {int(report.epoch) + 1}/{recipe.epochs}, step"
                detail = f"loss {report.loss:.3f}, {tokens / seconds:,.0f} tokens/s"
                show(done, title, detail, always=epoch_ends or done == first + 1)
                if epoch_ends:
                    validate()
                    save_result()
                if epoch_ends or (options.save_every and done % options.save_every == 0):
                    save_state()
            stopped = interrupt.is_set()
        if stopped:
            save_state()
        elif done == first:
            save_result()  # nothing was left to train, but the --format may be another
        metrics.close()
        loss_picture(options.out / "loss.png", metrics.entries)
    if stopped:
        say(f"Stopped after step {done} of {num_steps}; --resume goes on from there.")
        sys.exit(130)  # what shells expect of a program that Ctrl-C ended
    losses = [entry["val_loss"] for entry in metrics.entries if "val_loss" in entry]
    change = f"Validation loss {losses[0]:.4f} -> {losses[-1]:.4f}. " if losses else ""
    say(f"{change}The adapter is in {adapter_file}.")


def _check_folder(options: argparse.Namespace) -> None:
    """Whether the output folder is one that this run may write into."""
    if options.save_every is not None and options.save_every < 1:
        raise UserError(f"--save-every must be at least 1, got {options.save_every}.")
    refuse_unwritable(options.out)
    if options.resume:
        refuse_missing(options.out / "checkpoint.pt")
    elif not options.overwrite:
        refuse_occupied(options.out, "go on with --resume, or replace the run in it with --overwrite")


def _remove(directory: Path, names: set[str]) -> None:
    for name in names:
        (directory / name).unlink(missing_ok=True)


def _read_file(options: argparse.Namespace, path: Path) -> Sequence[Record] | Sequence[Found]:
    """The records of one file; with --encoder they may be about images, which are not looked at yet."""
    if options.encoder is None:
        return read_records(path, options.strict)
    return read_image_records(path, options.images, options.strict)


def _with_images(
    options: argparse.Namespace,
    adapter: LlamaAdapter,
    found: Sequence[Record] | Sequence[Found],
    console: Console,
) -> Sequence[Record]:
    """The records of one file, with all their images encoded."""
    if not isinstance(adapter, VisualAdapter) or not isinstance(adapter.source, Features):
        return found
    with progress(
        console, len({path for record, _ in found for path in record.images}), transient=True
    ) as show:
        return encode_images(
            found, adapter.source, options.skip_bad_images, lambda done, total: show(done, "images encoded")
        )


def _samples(
    options: argparse.Namespace, files: Sequence[Sequence[Record]], model: LlamaConfig
) -> tuple[list[Sample], list[Sample], Mixture, str]:
    """The samples to train on, file after file, those to validate on, which of the former an epoch has, and a sentence
    that says what became of the records.
    """
    data = " and ".join(map(str, options.paths))
    tokenizer = load_tokenizer(options.base).check_vocabulary(model.vocab_size)
    if tokenizer.eos_id is None:
        warn("the tokenizer names no end-of-sequence token: the adapter will not learn where an answer ends.")
    max_seq_len = min(512, model.max_seq_len) if options.max_seq_len is None else options.max_seq_len
    if max_seq_len < 2:
        raise UserError(f"--max-seq-len must be at least 2, got {max_seq_len}.")
    if max_seq_len > model.max_seq_len:
        raise UserError(f"--max-seq-len {max_seq_len} is beyond the model's context of {model.max_seq_len}.")
    if not 0 <= options.validation < 1:
        raise UserError(f"--validation must be a share from 0 to below 1, got {options.validation}.")
    encoded = [encode(records, tokenizer, max_seq_len) for records in files]
    report = EncodingReport(max_seq_len, *map(sum, zip(*(counts[1:] for _, counts in encoded), strict=True)))
    num_records = sum(map(len, files))
    incomplete = report.truncated + report.dropped + report.untold
    if options.strict and incomplete:
        raise UserError(f"--strict: of {num_records} records {report}.")
    samples = [(file, sample) for file, (part, _) in enumerate(encoded) for sample in part]
    training, validation = split(samples, options.validation, options.seed)
    if not training and validation:
        took = "the only sample" if len(samples) == 1 else f"all {len(samples)} samples"
        raise UserError(
            f"--validation {options.validation} took {took} of {data}: pass a smaller share, or 0."
        )
    if not training:
        raise UserError(f"{data} leaves no sample to train on ({report}).")
    if 2 * incomplete > num_records:
        whole = num_records - incomplete
        warn(
            f"only {whole} of {num_records} answers are whole, and from a cut one the adapter does not learn where "
            f"an answer ends: raise --max-seq-len (the model's context is {model.max_seq_len})."
        )
    in_files = Counter(file for file, _ in training)
    mixture = Mixture.of([in_files[file] for file in range(len(files))], options.shares)
    return (
        [sample for _, sample in training],
        [sample for _, sample in validation],
        mixture,
        f"{num_records} records: {report}",
    )


def _make_adapter(options: argparse.Namespace, base: Llama) -> LlamaAdapter:
    chosen = {"prompt_length": options.prompt_length, "gate_activation": options.gate_activation}
    init = None
    if options.init:
        init = load_adapter(options.init, base, **chosen)
        if options.layers not in (None, len(init.layers)):
            raise UserError(f"{options.init} adapts {len(init.layers)} layers, not {options.layers}.")
    told = {name: value for name, value in chosen.items() if value is not None}
    config = AdapterConfig(num_layers=options.layers, **told) if init is None else init.config
    if options.encoder is not None:
        return visual_adapter(options, base, config, init).to(base.device)
    if init is not None:
        return init.to(base.device)
    generator = torch.Generator().manual_seed(options.seed)
    return LlamaAdapter(base.config, config, generator).to(base.device)


def _is_new(options: argparse.Namespace) -> bool:
    """Whether the visual part is a new one, whose features have no statistics yet."""
    return options.init is None or read_checkpoint(options.init).extras_format != EXTRAS_FORMAT


def _try_backend(backend: str, base: Llama, adapter: LlamaAdapter, sample: Sample, recipe: Recipe) -> None:
    """One pass over a single token, so that a backend that cannot run is refused before anything is written."""
    if backend == "auto":
        return
    short = Sample(sample.tokens[:2], 1, sample.images)
    try:
        with torch.no_grad():
            (batch,) = batches([short], recipe.max_tokens, packed=recipe.packed)
            batch_loss(base, adapter, batch, recipe.autocast)
    except ValueError as error:
        raise UserError(f"--backend {backend}: {error}.") from error


def _identity(
    options: argparse.Namespace,
    recipe: Recipe,
    base: Llama,
    adapter: LlamaAdapter,
    training: Sequence[Sample],
    mixture: Mixture,
) -> dict[str, object]:
    """What a run that goes on with this one must share with it; "conditions" alone may change, with a warning."""
    choices = asdict(recipe)
    # how a step is cut into passes changes its rounding alone, and is what one changes where memory ends
    conditions = machine(base) | {"max_tokens": choices.pop("max_tokens")}
    # checkpoints from before there were images have none of these, and text alone must go on with them
    choices |= {"projection_lr": None, "visual": None, "stage": options.stage}
    source = None
    if isinstance(adapter, VisualAdapter):
        source = adapter.source if isinstance(adapter.source, Features) else None
        choices["projection_lr"] = recipe.projection_lr
        choices["visual"] = asdict(adapter.visual_config) | asdict(adapter.feature_config)
        choices["visual"] |= {"encoder": adapter.encoder_fingerprint, "source": source and source.fingerprint}
    return {
        "base model": first_fingerprint(base),  # all that checkpoints of the first version have
        "base weights": base_fingerprint(base),
        "dtype": str(base.dtype),
        "device": base.device.type,
        "backend": options.backend,
        "data": data_fingerprint(training, {} if source is None else source.digests),
        "mixture": None if mixture == Mixture.of(mixture.available) else list(mixture.counts),
        "adapter": asdict(adapter.config) | {"init": str(options.init)},
        "conditions": conditions,
    } | choices


def _summary(
    recipe: Recipe, base: Llama, adapter: LlamaAdapter, num_training: int, num_validation: int, done: int
) -> str:
    """What is about to be trained. num_training: samples an epoch."""
    trainable = adapter.num_parameters
    share = trainable / (trainable + sum(parameter.numel() for parameter in base.parameters()))
    resumed = f", from step {done}" if done else ""
    return (
        f"{trainable:,} trainable parameters ({share:.3%}) in layers {adapter.layers[0]} to {adapter.layers[-1]}; "
        f"{num_training} samples to train on, {num_validation} to validate; {recipe.num_steps(num_training)} steps in "
        f"{recipe.epochs} epochs{resumed}; learning rate up to {recipe.highest_lr(num_training):.3g}"
    )


def _recipe(options: argparse.Namespace) -> Recipe:
    return Recipe(
        epochs=options.epochs,
        warmup_epochs=options.warmup_epochs,
        base_lr=options.base_lr,
        min_lr=options.min_lr,
        weight_decay=options.weight_decay,
        batch_size=options.batch_size,
        max_grad_norm=options.clip,
        projection_lr=1.0 if options.projection_lr is None else options.projection_lr,
        max_tokens=options.max_tokens,
        packed=not options.padded,
        autocast=options.autocast,
        seed=options.seed,
    )


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=program_name("train"),
        description="Trains a LLaMA-Adapter on Alpaca-style data. The defaults are the paper's recipe.",
    )
    recipe, default = Recipe(), "(default: %(default)s)"
    # fmt: off
    files = parser.add_argument_group("files")
    files.add_argument("--base", type=Path, required=True, metavar="DIR",
                       help="Hugging Face or Meta checkpoint folder, or a GGUF file")
    files.add_argument("--data", action="extend", nargs="+", required=True, metavar="FILE", help="JSON list or JSONL "
                       "of objects with instruction, output and perhaps input, and with --encoder of records about "
                       "images; of several files all count: FILE:0.5 takes each of its samples every other epoch, "
                       "FILE:2 twice an epoch, FILE:n=1000 so many of them an epoch")
    files.add_argument("--strict", action="store_true", help="refuse data of which a record would be left out or cut")
    files.add_argument("--out", type=Path, required=True, metavar="DIR", help="a folder that is new or empty")
    there = files.add_mutually_exclusive_group()
    there.add_argument("--resume", action="store_true", help="go on with the run in --out as if it had not "
                       "stopped: bit for bit with as many threads, the same chip and torch, to rounding otherwise")
    there.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    files.add_argument("--format", choices=ADAPTER_FILES, default="zinit", help="of the adapter; official-v1 "
                       f"does not say how many prompts a layer has, nor for which base it is {default}")
    files.add_argument("--save-every", type=int, metavar="STEPS", help="checkpoints besides each epoch's end")

    add_training_options(parser.add_argument_group("images"))

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

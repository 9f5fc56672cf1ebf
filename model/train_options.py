"""The options of `model.train`, and what they say: the recipe, and whether the output folder may be written into."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from zinit_kernels.console import Parser

from .config_file import with_config
from .data.encoding import TEMPLATES
from .errors import UserError, program_name
from .loading import DTYPES, default_device
from .lora import LoraChoice
from .mixture import read_share
from .quantised import add_option as add_quantise_option
from .recipe import Recipe
from .resume import refuse_missing
from .run_folder import refuse_occupied, refuse_unwritable
from .trackers import check_trackers
from .vision.options import add_training_options, check_options

_OF_ONE_START = {"config", "resume", "auto_resume", "overwrite", "dry_run", "paths", "shares", "trackers"}
ADAPTER_FILES = {"zinit": "adapter.safetensors", "official-v1": "adapter.pth"}
LORA_FOLDER = "lora"
_MANY = 1 << 20  # steps: a run of more is not counted one by one


def read_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options, with `paths` and `shares` of the data files. Raises UserError for what has no effect."""
    parser = training_parser()
    words = with_config(parser, sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(words)
    options.paths, options.shares = zip(*map(read_share, options.data), strict=True)
    check_options(options)
    if options.encoder is not None and (options.cache or options.chat_template or options.template == "chat"):
        raise UserError(
            "--encoder reads records about images, which take neither --cache nor a chat template."
        )
    if options.template == "alpaca" and options.chat_template is not None:
        raise UserError("--chat-template has no effect with --template alpaca.")
    for name in ("validate_every", "patience", "sample_every", "save_every"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}.")
    if options.sample_prompts is not None and options.sample_every is None:
        raise UserError("--sample-prompts has no effect without --sample-every.")
    for name in ("validate_every", "patience", "keep_best"):
        if getattr(options, name) and options.validation == 0:
            raise UserError(
                f"--{name.replace('_', '-')} has no effect with --validation 0, which leaves nothing to validate on."
            )
    if options.sample_every is not None and (options.shard or options.tensor_parallel > 1):
        raise UserError(
            "--sample-every answers with a whole base: leave out --shard and --tensor-parallel, or it."
        )
    if options.quantise and (options.shard or options.tensor_parallel > 1):
        raise UserError("--quantise takes a whole base: leave out --shard and --tensor-parallel, or it.")
    if options.encoder is not None and (options.shard or options.tensor_parallel > 1):
        raise UserError("--encoder takes a whole base: leave out --shard and --tensor-parallel.")
    if options.compile and (options.shard or options.tensor_parallel > 1):
        raise UserError("--compile takes a whole base: leave out --shard and --tensor-parallel, or it.")
    _check_method(options)
    options.trackers = check_trackers(options.log)
    _refuse_twice(options.paths)
    return options


def _check_method(options: argparse.Namespace) -> None:
    """Raises UserError for an option that the method has no use for."""
    of_lora = ("rank", "lora_alpha", "lora_targets")
    of_adapter = ("prompt_length", "layers", "gate_activation", "init", "encoder")
    if options.method == "adapter":
        unused = [name for name in of_lora if getattr(options, name) is not None]
    else:
        unused = [name for name in of_adapter if getattr(options, name) is not None]
        unused += ["format"] * (options.format != "zinit")
        if options.tensor_parallel > 1:
            raise UserError(
                "--method lora puts its factors into whole layers, which --tensor-parallel cuts: take --shard instead."
            )
    if unused:
        raise UserError(f"--{unused[0].replace('_', '-')} has no effect with --method {options.method}.")


def never_due(options: argparse.Namespace, recipe: Recipe, num_samples: int) -> Iterator[str]:
    """What the options ask for during the run, and what so short a run never comes to: a sentence each."""
    steps, every = recipe.num_steps(num_samples), recipe.steps_per_epoch(num_samples)
    for name in ("validate_every", "sample_every", "save_every"):
        wanted = getattr(options, name)
        if wanted is not None and wanted > steps:
            option = f"--{name.replace('_', '-')} {wanted}"
            yield f"{option} never comes: the run has {steps} steps, {every} an epoch. Lower it"
    if options.patience is not None:
        due = {step for step in (options.validate_every, every) if step}
        validations = sum(any(step % one == 0 for one in due) for step in range(1, min(steps, _MANY) + 1))
        if options.patience > validations:
            yield (
                f"--patience {options.patience} never ends the run, which validates {validations} times after its "
                "beginning: lower it, or validate more often by --validate-every"
            )


def lora_of(options: argparse.Namespace) -> LoraChoice:
    """The LoRA that the options ask for."""
    told = {"rank": options.rank, "alpha": options.lora_alpha}
    if options.lora_targets is not None:
        told["targets"] = tuple(name.strip() for name in options.lora_targets.split(","))
    return LoraChoice(**{name: value for name, value in told.items() if value is not None})


def config_of(options: argparse.Namespace) -> argparse.Namespace:
    """The options that a configuration file has: not what is about one start of the run alone."""
    return argparse.Namespace(
        **{name: value for name, value in vars(options).items() if name not in _OF_ONE_START}
    )


def _refuse_twice(paths: Sequence[Path]) -> None:
    """Raises UserError for a file that is named twice: its samples would be trained on and validated on at once."""
    known: dict[tuple[int, int], Path] = {}
    for path in paths:
        if (
            not path.is_file() and not path.is_dir()
        ):  # a pipe may be named again; what is missing is said when it is read
            continue
        place = path.stat()
        first = known.setdefault((place.st_dev, place.st_ino), path)
        if first is not path:
            same = "" if first == path else f", which is {first}"
            raise UserError(
                f"--data names {path}{same}, twice: {path}:2 takes each of its samples twice an epoch."
            )


def check_folder(options: argparse.Namespace) -> None:
    """Raises UserError unless the output folder is one that this run may write into."""
    if options.auto_resume and (options.out / "checkpoint.pt").exists():
        options.resume = True
    if options.dry_run:
        return
    refuse_unwritable(options.out)
    if options.resume:
        refuse_missing(options.out / "checkpoint.pt")
    elif options.overwrite and options.init is not None and _is_of_run(options.init, options.out):
        raise UserError(
            f"--overwrite would remove {options.init}, which --init starts from: move it out of {options.out}, or name "
            "another folder for --out."
        )
    elif not options.overwrite:
        refuse_occupied(options.out, "go on with --resume, or replace the run in it with --overwrite")


def _is_of_run(path: Path, folder: Path) -> bool:
    """Whether a path is the folder of a run, or the adapter in it; links are followed."""
    path, folder = path.resolve(), folder.resolve()
    return path == folder or (path.parent == folder and path.name in ADAPTER_FILES.values())


def recipe_of(options: argparse.Namespace) -> Recipe:
    """How the options say to train."""
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


def training_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = Parser(
        prog=program_name("train"),
        description="Trains a LLaMA-Adapter on Alpaca-style data. The defaults are the paper's recipe.",
    )
    recipe, default = Recipe(), "(default: %(default)s)"
    # fmt: off
    files = parser.add_argument_group("files")
    files.add_argument("--base", type=Path, required=True, metavar="DIR",
                       help="Hugging Face or Meta checkpoint folder, or a GGUF file")
    files.add_argument("--data", action="extend", nargs="+", required=True, metavar="FILE", help="JSON, JSONL or "
                       "Parquet, or a folder that the datasets library saved: objects with instruction, output and "
                       "perhaps input, or conversations (messages, conversations), and with --encoder records about "
                       "images; of several files all count: FILE:0.5 takes each of its samples every other epoch, "
                       "FILE:2 twice an epoch, FILE:n=1000 so many of them an epoch")
    files.add_argument("--template", choices=TEMPLATES, default="auto", help="how a record becomes a text: Alpaca's, "
                       "the tokenizer's chat template, or auto: the first for instructions, the second for "
                       f"conversations {default}")
    files.add_argument("--chat-template", type=Path, metavar="FILE", help="a Jinja file in the place of the "
                       "tokenizer's chat template")
    files.add_argument("--cache", type=Path, metavar="DIR", help="keep the tokenised data here: made once for a file, "
                       "a tokenizer and a template, and read from disk, so that data may be larger than memory")
    files.add_argument("--strict", action="store_true", help="refuse data of which a record would be left out or cut")
    files.add_argument("--out", type=Path, required=True, metavar="DIR", help="a folder that is new or empty")
    there = files.add_mutually_exclusive_group()
    there.add_argument("--resume", action="store_true", help="go on with the run in --out as if it had not "
                       "stopped: bit for bit with as many threads, the same chip and torch, to rounding otherwise")
    there.add_argument("--auto-resume", action="store_true", help="--resume if --out holds a run, and a new run if "
                       "not: for jobs that a cluster starts again")
    there.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    files.add_argument("--format", choices=ADAPTER_FILES, default="zinit", help="of the adapter; official-v1 "
                       f"does not say how many prompts a layer has, nor for which base it is {default}")
    files.add_argument("--save-every", type=int, metavar="STEPS", help="checkpoints besides each epoch's end")

    files.add_argument("--config", type=Path, metavar="FILE", help="options from a YAML file, as `epochs: 3`; the "
                       "command line has the last word, and the run's own are in config.yaml in --out")
    files.add_argument("--dry-run", action="store_true", help="say what the run would take, parameters, memory and "
                       "time, and write nothing")

    watching = parser.add_argument_group("watching")
    watching.add_argument("--validate-every", type=int, metavar="STEPS", help="validations besides each epoch's end")
    watching.add_argument("--keep-best", action="store_true", help="keep the adapter with the lowest validation loss "
                          "too, as best.safetensors")
    watching.add_argument("--patience", type=int, metavar="N", help="stop after N validations that brought nothing "
                          "better; --keep-best comes with it")
    watching.add_argument("--sample-every", type=int, metavar="STEPS", help="let the model answer, into "
                          "previews.jsonl: the prompts of three validation samples")
    watching.add_argument("--sample-prompts", type=Path, metavar="FILE", help="or those of this file, as `zinit "
                          "generate --prompts-file` reads it")
    watching.add_argument("--log", metavar="NAMES", help="metrics also into tensorboard, wandb or mlflow, with commas "
                          "between them")

    add_training_options(parser.add_argument_group("images"))

    adapter = parser.add_argument_group("adapter")
    adapter.add_argument("--method", choices=("adapter", "lora"), default="adapter", help="what is trained: prompts "
                         f"and gates, or LoRA through PEFT, saved into lora/ as PEFT does {default}")
    lora = LoraChoice()
    adapter.add_argument("--rank", type=int, help=f"of LoRA (default: {lora.rank})")
    adapter.add_argument("--lora-alpha", type=float, help=f"LoRA's scale times the rank (default: {lora.alpha:g})")
    adapter.add_argument("--lora-targets", metavar="NAMES", help="linear layers, with commas between them (default: "
                         f"{','.join(lora.targets)})")
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
    add_quantise_option(machine)
    machine.add_argument("--shard", action="store_true", help="under torchrun: divide the base's weights among the "
                         "processes (FSDP2), for a base that one device cannot hold")
    machine.add_argument("--tensor-parallel", type=int, default=1, metavar="N", help="under torchrun: N processes "
                         f"divide the heads of each pass among themselves {default}")
    machine.add_argument("--checkpoint-activations", action="store_true", help="keep only each layer's input for the "
                         "backward pass and compute the rest again: less memory, about a third more time")
    machine.add_argument("--compile", action="store_true", help="compile the layers with torch.compile")
    machine.add_argument("--autocast", action="store_true", help="compute in bfloat16")
    machine.add_argument("--dtype", choices=DTYPES, help="of the base's weights (default: the files')")
    machine.add_argument("--device", default=default_device(), help=default)
    machine.add_argument("--backend", default="auto", help=f"of the attention kernels {default}")
    # fmt: on
    return parser

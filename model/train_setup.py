"""What a training run is made of: samples from files of records, an adapter, and what a resumed run must share."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console

from .adapter import LlamaAdapter
from .adapter_files import read_checkpoint
from .config import AdapterConfig, LlamaConfig
from .data import Conversation, EncodingReport, Sample, batches
from .data.cache import Key, cached, content_digest, tokenizer_digest
from .data.encoding import Encoder
from .data.report import report_on
from .data.samples import split_indices
from .data.sources import check_source, read_source
from .data.views import Joined, Subset
from .errors import UserError, warn
from .fingerprint import data_fingerprint, run_fingerprints
from .llama import Llama
from .lora import Lora
from .mixture import Mixture
from .parallel.world import World
from .progress import counted, progress
from .quantised import kept_as, num_weights
from .recipe import Recipe
from .records import Record, read_text
from .resume import machine
from .tokenizer import Tokenizer, load_tokenizer
from .train_loop import batch_loss
from .train_options import lora_of
from .vision.adapter import VisualAdapter
from .vision.features import Features
from .vision.files import EXTRAS_FORMAT, load_adapter
from .vision.options import visual_adapter
from .vision.records import Found, read_image_records
from .vision.training import encode_images, prepare_adapter


class Samples(NamedTuple):
    """What a run trains on and validates on."""

    training: Sequence[Sample]  # file after file
    validation: Sequence[Sample]
    mixture: Mixture  # which of the training samples an epoch has
    outcome: str  # a sentence: what became of the records, and what the samples are like
    tokenizer: Tokenizer


# The records of one file; those about images, which are not looked at yet; or a file that is read through the cache
File = Sequence[Record | Conversation] | Sequence[Found] | Path


def read_file(options: argparse.Namespace, path: Path) -> File:
    """What one --data names; with --encoder the records may be about images."""
    if options.encoder is not None:
        return read_image_records(path, options.images, options.strict)
    check_source(path)
    return path if options.cache is not None else list(read_source(path, options.strict))


def make_adapter(options: argparse.Namespace, base: Llama) -> LlamaAdapter | Lora:
    """The adapter to train: a new one, or --init's; with --encoder it has a visual part. Or a LoRA, in the base."""
    if options.method == "lora":
        return Lora(base, lora_of(options), options.seed)
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


def make_samples(
    options: argparse.Namespace,
    found: Sequence[File],
    model: LlamaConfig,
    adapter: LlamaAdapter,
    console: Console,
) -> Samples:
    """The samples of all files. Images are encoded first, and a new visual part takes its statistics from them."""
    files = [_with_images(options, adapter, file, console) for file in found]
    samples = _samples(options, files, model, console)
    if isinstance(adapter, VisualAdapter):
        records = [record for file in files if not isinstance(file, Path) for record in file]
        prepare_adapter(adapter, records, options.stage, not options.resume and _is_new(options))
    return samples


def _with_images(options: argparse.Namespace, adapter: LlamaAdapter, found: File, console: Console) -> File:
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
    options: argparse.Namespace, files: Sequence[File], model: LlamaConfig, console: Console
) -> Samples:
    data = " and ".join(map(str, options.paths))
    tokenizer = load_tokenizer(options.base).check_vocabulary(model.vocab_size)
    if options.chat_template is not None:
        tokenizer = replace(tokenizer, chat_template=read_text(options.chat_template))
    if tokenizer.eos_id is None:
        warn("the tokenizer names no end-of-sequence token: the adapter will not learn where an answer ends.")
    max_seq_len = min(512, model.max_seq_len) if options.max_seq_len is None else options.max_seq_len
    if max_seq_len < 2:
        raise UserError(f"--max-seq-len must be at least 2, got {max_seq_len}.")
    if max_seq_len > model.max_seq_len:
        raise UserError(f"--max-seq-len {max_seq_len} is beyond the model's context of {model.max_seq_len}.")
    if not 0 <= options.validation < 1:
        raise UserError(f"--validation must be a share from 0 to below 1, got {options.validation}.")
    if (
        options.chat_template is not None
        and options.template == "auto"
        and not _may_hold_conversations(files)
    ):
        warn(
            f"--chat-template has no effect: {data} holds no conversations. Add --template chat, which takes it for "
            "instructions too."
        )
    encoded = [_encode(options, file, tokenizer, max_seq_len, console) for file in files]
    report = EncodingReport(max_seq_len, *map(sum, zip(*(part.report[1:] for part in encoded), strict=True)))
    num_records = sum(part.num_records for part in encoded)
    if options.strict and report.incomplete:
        raise UserError(f"--strict: of {num_records} records {report}.")
    samples = Joined([part.samples for part in encoded])
    kept, held_back = split_indices(len(samples), options.validation, options.seed)
    if not kept and held_back:
        took = "the only sample" if len(samples) == 1 else f"all {len(samples)} samples"
        raise UserError(
            f"--validation {options.validation} took {took} of {data}: pass a smaller share, or 0."
        )
    if not kept:
        raise UserError(f"{data} leaves no sample to train on ({report}).")
    in_files = Counter(map(samples.part_of, kept))
    for number, path in enumerate(options.paths):
        if not in_files[number]:
            reason = (
                "the validation took all of it" if len(encoded[number].samples) else encoded[number].report
            )
            raise UserError(
                f"{path} leaves no sample to train on ({reason}): a part of a mixture must not be empty, so take it "
                "out of --data."
            )
    if 2 * report.incomplete > num_records:
        whole = num_records - report.incomplete
        warn(
            f"only {whole} of {num_records} answers are whole, and from a cut one the adapter does not learn where "
            f"an answer ends: raise --max-seq-len (the model's context is {model.max_seq_len})."
        )
    if unended := sum(part.unended for part in encoded):
        warn(
            f"in {unended} conversations the chat template ends an answer without a special token: the adapter will "
            "not learn where an answer ends."
        )
    mixture = Mixture.of([in_files[file] for file in range(len(files))], options.shares)
    training = Subset(samples, kept)
    like = report_on(training, mixture.order(options.seed, 0), options.batch_size, options.max_tokens)
    outcome = f"{num_records} records: {report}; {like}"
    return Samples(training, Subset(samples, held_back), mixture, outcome, tokenizer)


def _may_hold_conversations(files: Sequence[File]) -> bool:
    return any(
        isinstance(file, Path) or any(isinstance(record, Conversation) for record in file) for file in files
    )


class _Encoded(NamedTuple):
    """The samples of one file."""

    samples: Sequence[Sample]
    num_records: int
    report: EncodingReport
    unended: int


def _encode(
    options: argparse.Namespace, file: File, tokenizer: Tokenizer, max_seq_len: int, console: Console
) -> _Encoded:
    encoder = Encoder(tokenizer, max_seq_len, options.template)
    title = "records encoded"
    if not isinstance(file, Path):
        samples = [
            sample for record in counted(console, file, title) if (sample := encoder(record)) is not None
        ]
        return _Encoded(samples, len(file), encoder.report, encoder.unended)
    template = f"{options.template} {tokenizer.chat_template}"
    key = Key(content_digest(file), tokenizer_digest(options.base), template, max_seq_len, options.strict)
    records = counted(console, read_source(file, options.strict), title)
    kept = cached(options.cache, key, map(encoder, records), encoder, str(file))
    return _Encoded(kept, kept.num_records, kept.report, kept.unended)


def _is_new(options: argparse.Namespace) -> bool:
    """Whether the visual part is a new one, whose features have no statistics yet."""
    return options.init is None or read_checkpoint(options.init).extras_format != EXTRAS_FORMAT


def try_backend(backend: str, base: Llama, adapter: LlamaAdapter, sample: Sample, recipe: Recipe) -> None:
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


def run_identity(
    options: argparse.Namespace,
    recipe: Recipe,
    base: Llama,
    adapter: LlamaAdapter | Lora,
    training: Sequence[Sample],
    validation: Sequence[Sample],
    mixture: Mixture,
    world: World,
    device: torch.device,
) -> dict[str, object]:
    """What a run that goes on with this one must share with it; "conditions" alone may change, with a warning."""
    choices = asdict(recipe)
    # how a step is cut into passes changes its rounding alone, and is what one changes where memory ends
    conditions = machine(device) | {"max_tokens": choices.pop("max_tokens")} | world.describe()
    conditions |= {"compile": True} if options.compile else {}
    # checkpoints from before there were images have none of these, and text alone must go on with them
    choices |= {"projection_lr": None, "visual": None, "stage": options.stage}
    source = None
    if isinstance(adapter, VisualAdapter):
        source = adapter.source if isinstance(adapter.source, Features) else None
        choices["projection_lr"] = recipe.projection_lr
        choices["visual"] = asdict(adapter.visual_config) | asdict(adapter.feature_config)
        choices["visual"] |= {"encoder": adapter.encoder_fingerprint, "source": source and source.fingerprint}
    digests = {} if source is None else source.digests
    return {
        "quantise": kept_as(base, options.quantise),  # first: packed weights have other fingerprints, too
        **run_fingerprints(base),
        "dtype": str(base.dtype),
        "device": device.type,
        "backend": options.backend,
        "data": data_fingerprint(training, digests),
        "validation data": data_fingerprint(validation, digests),
        "mixture": None if mixture == Mixture.of(mixture.available) else list(mixture.counts),
        "adapter": asdict(adapter.config) | {"init": str(options.init)},
        "conditions": conditions,
    } | choices


def run_summary(
    recipe: Recipe, base: Llama, adapter: LlamaAdapter, num_training: int, num_validation: int
) -> str:
    """What is about to be trained. num_training: samples an epoch."""
    trainable = adapter.num_parameters
    share = trainable / (trainable + num_weights(base))
    return (
        f"{trainable:,} trainable parameters ({share:.3%}) in layers {adapter.layers[0]} to {adapter.layers[-1]}; "
        f"{num_training} samples to train on, {num_validation} to validate; {recipe.num_steps(num_training)} steps in "
        f"{recipe.epochs} epochs; learning rate up to {recipe.highest_lr(num_training):.3g}"
    )

"""Trains an adapter on instruction data: python -m model.train --base DIR --data FILE --out DIR

The defaults are the paper's recipe (arXiv 2303.16199, section 4.1, and its official script). The output folder gets

    adapter.safetensors   the adapter after the last whole epoch (adapter.pth with --format official-v1)
    checkpoint.pt         what --resume needs, at every epoch's end, every --save-every steps and on Ctrl-C
    metrics.jsonl         one line per step and per validation
    loss.png, layers.png  the same as pictures
    config.yaml           the options, as --config takes them
    best.safetensors      with --keep-best, the adapter with the lowest validation loss
"""

from __future__ import annotations

import sys
from pathlib import Path

from .config_file import write_config
from .data.views import token_lengths
from .errors import run_program, warn
from .fingerprint import adapter_metadata
from .forecast import forecast
from .loading import DTYPES, load_base, open_device
from .pictures import layer_picture, loss_picture
from .program import interruptible, program
from .progress import messages, progress
from .recipe import recipe_warnings
from .resume import load_checkpoint, restore, save_checkpoint
from .run_folder import MetricsLog, held, make_directory, remove_leftovers, writing
from .trackers import numbers, open_trackers
from .train_loop import evaluate, make_optimizer, train
from .train_options import ADAPTER_FILES, check_folder, config_of, read_options, recipe_of
from .train_setup import make_adapter, make_samples, read_file, run_identity, run_summary, try_backend
from .validation import Best, Previews, drop_later
from .vision.files import save_adapter

FILES = (
    "checkpoint.pt", "metrics.jsonl", "loss.png", "layers.png", "config.yaml", "best.safetensors",
    *ADAPTER_FILES.values(),
)  # fmt: skip


@program(
    "lower --max-tokens or --max-seq-len, or take --dtype bfloat16; --resume goes on from the last checkpoint"
)
def main(arguments: list[str] | None = None) -> None:
    """The program. Everything is read and checked before the first file is written."""
    options = read_options(arguments)
    check_folder(options)
    recipe = recipe_of(options)
    console = messages()
    say = console.print

    # the base, the adapter and the samples
    found = [read_file(options, path) for path in options.paths]
    base = load_base(options.base, DTYPES.get(options.dtype), open_device(options.device)).freeze()
    base.set_backend(options.backend)
    adapter = make_adapter(options, base)
    training, validation, mixture, outcome, tokenizer = make_samples(
        options, found, base.config, adapter, console
    )
    say(outcome)
    try_backend(options.backend, base, adapter, training[0], recipe)
    lengths = token_lengths(training)[mixture.order(recipe.seed, 0)].tolist()
    for sentence in recipe_warnings(recipe, lengths, options.init is None):
        warn(f"{sentence}.")
    base.recompute = options.checkpoint_activations
    if options.compile:
        base.compile_layers()
    if options.dry_run:
        say(str(forecast(base, adapter, training, mixture, recipe)))
        return
    previews = None
    if options.sample_every:
        previews = Previews(
            options.out / "previews.jsonl", tokenizer, options.sample_prompts, validation or training,
            base.config.max_seq_len,
        )  # fmt: skip
    optimizer = make_optimizer(adapter, recipe)
    steps_per_epoch, num_steps = recipe.steps_per_epoch(mixture.size), recipe.num_steps(mixture.size)
    run = run_identity(options, recipe, base, adapter, training, mixture)
    metadata = adapter_metadata(base)

    # the folder belongs to this process from here on
    with held(make_directory(options.out)):
        check_folder(options)  # again: while the base was loaded another run may have begun here
        checkpoint_file, adapter_file = (
            options.out / "checkpoint.pt",
            options.out / ADAPTER_FILES[options.format],
        )
        done = 0  # optimizer steps
        if options.resume:
            checkpoint = load_checkpoint(checkpoint_file, run, num_steps)
            restore(checkpoint_file, checkpoint, adapter, optimizer)
            done = checkpoint.step
        say(run_summary(recipe, base, adapter, mixture.size, len(validation), done))

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
                is_best = best.improves(loss)
                keeps = is_best and bool(options.keep_best or options.patience)
                say(f"step {done}: validation loss {loss:.4f}{', the best until now' * keeps}")
                if keeps:
                    with writing(options.out / "best.safetensors"):
                        save_adapter(
                            options.out / "best.safetensors", adapter, base.config, "zinit", metadata
                        )

        if not options.resume:
            save_state()  # first: whatever ends the run from here on, --resume goes on with this one
            _remove(options.out, set(FILES) - {"checkpoint.pt", "metrics.jsonl"})
        remove_leftovers(options.out, FILES)
        config = config_of(options)
        write_config(options.out / "config.yaml", config)
        if previews:
            drop_later(previews.path, done)

        # the training loop
        trackers = open_trackers(options.trackers, options.out, vars(config), done)
        metrics = MetricsLog(
            options.out / "metrics.jsonl",
            done,
            [
                lambda entry, tracker=tracker: tracker.log(entry["step"], numbers(entry))
                for tracker in trackers
            ],
        )
        best = Best(metrics.entries, options.patience)
        first, tokens, seconds = done, 0, 0.0
        with interruptible() as interrupt, progress(console, num_steps, done) as show:
            was_validated = any("val_loss" in entry and entry["step"] == done for entry in metrics.entries)
            if done % steps_per_epoch == 0 and not was_validated:
                validate()
            for report in train(
                base, adapter, training, recipe, optimizer,
                first_step=num_steps if best.exhausted else first, stop=interrupt.is_set, mixture=mixture,
            ):  # fmt: skip
                done = report.step + 1
                metrics.write(**report._asdict())
                tokens, seconds = tokens + report.num_tokens, seconds + report.seconds
                epoch_ends = done % steps_per_epoch == 0
                validates = epoch_ends or is_due(options.validate_every, done)
                title = f"epoch {int(report.epoch) + 1}/{recipe.epochs}, step"
                detail = f"loss {report.loss:.3f}, {tokens / seconds:,.0f} tokens/s"
                show(done, title, detail, always=epoch_ends or done == first + 1)
                if validates:
                    validate()
                if previews and is_due(options.sample_every, done):
                    say(previews.write(done, base, adapter))
                if epoch_ends or best.exhausted:
                    save_result()
                if epoch_ends or best.exhausted or is_due(options.save_every, done):
                    save_state()
                if best.exhausted:
                    break
            stopped = interrupt.is_set()

        # the last files, and what came of the run
        if stopped:
            save_state()
        elif done == first:
            save_result()  # nothing was left to train, but the --format may be another
        metrics.close()
        for tracker in trackers:
            tracker.close()
        loss_picture(options.out / "loss.png", metrics.entries)
        layer_picture(options.out / "layers.png", metrics.entries, adapter.layers[0])
    if stopped:
        say(f"Stopped after step {done} of {num_steps}; --resume goes on from there.")
        sys.exit(130)  # what shells expect of a program that Ctrl-C ended
    losses = [entry["val_loss"] for entry in metrics.entries if "val_loss" in entry]
    change = f"Validation loss {losses[0]:.4f} -> {losses[-1]:.4f}. " if losses else ""
    if best.exhausted:
        say(f"Stopped after step {done} of {num_steps}: {best.since} validations brought nothing better.")
    say(f"{change}The adapter is in {adapter_file}.")


def is_due(every: int | None, done: int) -> bool:
    """Whether what happens every so many steps happens after this one."""
    return every is not None and done % every == 0


def _remove(directory: Path, names: set[str]) -> None:
    for name in names:
        (directory / name).unlink(missing_ok=True)


if __name__ == "__main__":
    run_program(main)

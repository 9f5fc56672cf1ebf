"""Trains an adapter on instruction data: python -m model.train --base DIR --data FILE --out DIR

The defaults are the paper's recipe (arXiv 2303.16199, section 4.1, and its official script). The output folder gets

    adapter.safetensors   the adapter after the last whole epoch (adapter.pth with --format official-v1)
    checkpoint.pt         what --resume needs, at every epoch's end, every --save-every steps and on Ctrl-C
    metrics.jsonl         one line per step and per validation
    loss.png, layers.png  the same as pictures
    config.yaml           the options, as --config takes them
    best.safetensors      with --keep-best, the adapter with the lowest validation loss

torchrun starts it as many processes, which take each step together; the first one writes and speaks.
"""

from __future__ import annotations

import math
import sys
from contextlib import nullcontext

from .data.views import token_lengths
from .errors import run_program, warn
from .fingerprint import adapter_metadata
from .forecast import forecast
from .loading import DTYPES, load_base, open_device
from .parallel.divide import check_division, divide
from .parallel.world import local_device, open_world
from .program import interruptible, program
from .progress import messages, progress
from .recipe import recipe_warnings
from .resume import load_checkpoint, restore
from .run_folder import held, make_directory
from .run_output import RunOutput
from .train_loop import evaluate, make_optimizer, train
from .train_options import check_folder, never_due, read_options, recipe_of
from .train_setup import make_adapter, make_samples, read_file, run_identity, run_summary, try_backend
from .validation import Previews


@program(
    "lower --max-tokens or --max-seq-len, or take --dtype bfloat16; --resume goes on from the last checkpoint",
    several=True,
)
def main(arguments: list[str] | None = None) -> None:
    """The program. Everything is read and checked before the first file is written."""
    options = read_options(arguments)
    check_folder(options)
    recipe = recipe_of(options)
    world = open_world(options.device, options.tensor_parallel, options.shard)
    console = messages()
    console.quiet = not world.is_first
    say = console.print

    # the base, the adapter and the samples
    found = [read_file(options, path) for path in options.paths]
    device = open_device(local_device(options.device))
    # a base that is divided is read from the CPU's memory map, of which each process takes its part
    base = load_base(
        options.base, DTYPES.get(options.dtype), "cpu" if world.divides else device, options.quantise
    ).freeze()
    base.set_backend(options.backend)
    adapter = make_adapter(options, base)
    training, validation, mixture, outcome, tokenizer = make_samples(
        options, found, base.config, adapter, console
    )
    say(outcome)
    if not world.divides:
        try_backend(options.backend, base, adapter, training[0], recipe)
    lengths = token_lengths(training)[mixture.order(recipe.seed, 0)].tolist()
    for sentence in recipe_warnings(recipe, lengths, options.init is None and options.method == "adapter"):
        warn(f"{sentence}.")
    for sentence in never_due(options, recipe, mixture.size):
        warn(f"{sentence}.")
    check_division(base.config, world, recipe.batch_size, mixture.size)
    base.recompute = options.checkpoint_activations
    if options.compile:
        base.compile_layers()
    if options.dry_run:
        say(str(forecast(base, adapter, training, mixture, recipe)))
        return
    previews = Previews.of(options, tokenizer, validation or training, base.config.max_seq_len)
    optimizer = make_optimizer(adapter.to(device), recipe)
    steps_per_epoch, num_steps = recipe.steps_per_epoch(mixture.size), recipe.num_steps(mixture.size)
    run = run_identity(options, recipe, base, adapter, training, validation, mixture, world, device)
    output = RunOutput(options, base.config, adapter, optimizer, run, adapter_metadata(base), world.is_first)
    summary = run_summary(recipe, base, adapter, mixture.size, len(validation))
    base = divide(base, world, device)

    # the folder belongs to this run from here on
    with held(make_directory(options.out)) if world.is_first else nullcontext() as refuse_another:
        output.refuse_another = refuse_another
        if world.is_first:
            check_folder(options)  # again: while the base was loaded another run may have begun here
        done = 0  # optimizer steps
        if options.resume:
            checkpoint = load_checkpoint(output.checkpoint_file, run, num_steps)
            restore(output.checkpoint_file, checkpoint, adapter, optimizer)
            done = checkpoint.step
        say(summary + (f"; from step {done}" if done else ""))
        output.begin(done, previews)

        def validate() -> None:
            if not validation:
                return

            def tell(number: int, total: int) -> None:
                show(done, f"validating {number}/{total}, step")

            loss = evaluate(base, adapter, validation, recipe, interrupt.is_set, tell, world)
            if not (math.isnan(loss) and world.any(interrupt.is_set())):  # then --resume makes up for it
                say(output.validated(done, done / steps_per_epoch, loss))

        # the training loop
        first, tokens, seconds = done, 0, 0.0
        with interruptible() as interrupt, progress(console, num_steps, done) as show:
            if done % steps_per_epoch == 0 and not output.was_validated(done):
                validate()
            for report in train(
                base, adapter, training, recipe, optimizer, stop=interrupt.is_set, mixture=mixture, world=world,
                first_step=num_steps if output.best.exhausted else first,
            ):  # fmt: skip
                done = report.step + 1
                output.metrics.write(**report._asdict())
                tokens, seconds = tokens + report.num_tokens, seconds + report.seconds
                epoch_ends = done % steps_per_epoch == 0
                title = f"epoch {int(report.epoch) + 1}/{recipe.epochs}, step"
                detail = f"loss {report.loss:.3f}, {tokens / seconds:,.0f} tokens/s"
                show(done, title, detail, always=epoch_ends or done == first + 1)
                if epoch_ends or is_due(options.validate_every, done):
                    validate()
                if previews and world.is_first and is_due(options.sample_every, done):
                    say(previews.write(done, base, adapter))
                ends = epoch_ends or output.best.exhausted
                if ends:
                    output.save_result()
                if ends or is_due(options.save_every, done):
                    output.save_state(done)
                if output.best.exhausted:
                    break
            stopped = world.any(interrupt.is_set())

        # the last files, and what came of the run
        if stopped:
            output.save_state(done)
        elif done == first:
            output.save_result()  # nothing was left to train, but the --format may be another
        output.end()
    world.close()
    if stopped:
        say(f"Stopped after step {done} of {num_steps}; --resume goes on from there.")
        sys.exit(130)  # what shells expect of a program that Ctrl-C ended
    losses = [entry["val_loss"] for entry in output.metrics.entries if "val_loss" in entry]
    change = f"Validation loss {losses[0]:.4f} -> {losses[-1]:.4f}. " if losses else ""
    if output.best.exhausted:
        say(
            f"Stopped after step {done} of {num_steps}: {output.best.since} validations brought nothing better."
        )
    say(f"{change}The adapter is in {output.adapter_file}.")


def is_due(every: int | None, done: int) -> bool:
    """Whether what happens every so many steps happens after this one."""
    return every is not None and done % every == 0


if __name__ == "__main__":
    run_program(main)

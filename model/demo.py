"""All of LLaMA-Adapter in a few minutes, without a download: python -m model.demo

A small LLaMA is pre-trained, once, on generated text. It learns facts and skills, and leaves instructions unanswered.
An adapter of less than a hundredth of its size then learns to answer them. Both are asked questions that neither has
read. The demo prints a table, and draws the training loss with gates that start at zero, with gates that start at
random and without gates (after figure 5 of arXiv 2303.16199).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from zinit_kernels import explain
from zinit_kernels.console import Parser

from . import corpus
from .adapter import LlamaAdapter
from .adapter_files import save_adapter
from .config import AdapterConfig
from .data import Sample, batches, encode
from .errors import program_name, run_program
from .fingerprint import adapter_metadata
from .llama import Llama
from .loading import load_base
from .pictures import running_mean, save_picture
from .program import program
from .progress import stage
from .recipe import Recipe
from .records import Record
from .run_folder import make_directory, refuse_occupied, writing
from .sampling import generate
from .small_base import STEPS, small_base
from .tokenizer import Tokenizer, load_tokenizer
from .train_loop import evaluate, make_optimizer, train

MOST_OF_BASE, LEAST_OF_ADAPTED = 0.1, 0.8  # of the held-out instructions, answered exactly
MOST_TRAINABLE = 0.05  # of all parameters
ARMS = {  # by gate_init
    "zero": "zero-init gates",
    "random": "random-init gates",
    "none": "no gates, one softmax",  # vanilla attention to prompts and tokens
}
PRETRAINING = (
    "The base was pre-trained on generated text: notes and sentences that state facts, questions with answers, and "
    "instruction forms, seven of eight left blank. No question and no form is about a held-out subject."
)
LONGEST_ANSWER = 8  # tokens
DECODED = 64  # new tokens of each sequence where decoding is timed


@dataclass(frozen=True)
class Size:
    """How much of everything the demo does."""

    pretraining_steps: int = STEPS
    instructions: int = 1200
    held_out: int = 200
    adapted_layers: int = 4
    recipe: Recipe = Recipe(epochs=4, warmup_epochs=0.5, batch_size=16, base_lr=0.32)
    seeds: int = 3  # of each kind of gate, for the picture
    compared: int = 800  # instructions that the picture's adapters are trained on
    compared_epochs: int = 2
    timed_rounds: int = 3
    timed_steps: int = 8  # of training in a round


@dataclass(frozen=True)
class Result:
    """What the demo found out."""

    base: Path  # the base's directory
    trainable: int
    share: float  # of all parameters
    bitwise_at_start: bool  # a new adapter leaves every logit of the base as it is
    base_accuracy: float  # exact match on held-out instructions
    adapted_accuracy: float
    fused_backend: str  # of zinit_kernels; "composed" where no kernel was built
    training_speed: dict[str, float]  # tokens/s: eager and fused on the same padded batches, and packed
    decoding_speed: dict[str, float]  # tokens/s: eager and fused
    final_losses: dict[str, list[float]]  # on held-out instructions, one per seed, by gate_init

    def bars(self) -> dict[str, bool]:
        """What the demo promises, and whether it holds."""
        return {
            "the output at step 0 is the base's, bit for bit": self.bitwise_at_start,
            f"the adapter is below {MOST_TRAINABLE:.0%} of the parameters": self.share < MOST_TRAINABLE,
            f"the base answers at most {MOST_OF_BASE:.0%} of the held-out instructions": self.base_accuracy
            <= MOST_OF_BASE,
            f"the adapted model answers at least {LEAST_OF_ADAPTED:.0%}": self.adapted_accuracy
            >= LEAST_OF_ADAPTED,
        }


def run(output: Path, size: Size, console: Console) -> Result:
    """Runs the demo. Its files go into `output`: a folder that is new, empty or an earlier demo's."""
    if not (output / "cache").is_dir():
        refuse_occupied(output, "name another with --out")
    with stage(console, "pre-training the base, once", size.pretraining_steps) as show:
        directory = small_base(make_directory(output / "cache"), size.pretraining_steps, show)
    base, tokenizer = load_base(directory).freeze(), load_tokenizer(directory)
    training = corpus.instructions(size.instructions, seed=0)
    held_out = corpus.held_out(size.held_out, seed=0)
    samples, _ = encode(training, tokenizer, base.config.max_seq_len)
    unseen, _ = encode(held_out, tokenizer, base.config.max_seq_len)

    adapter = new_adapter(base, size)
    bitwise = same_logits(base, adapter, unseen)
    base_accuracy = exact_match(base, None, tokenizer, held_out)
    tune(base, adapter, samples, size.recipe, console, "training the adapter")
    with writing(path := output / "adapter.safetensors"):
        save_adapter(path, adapter, base.config, metadata=adapter_metadata(base))
    accuracy = exact_match(base, adapter, tokenizer, held_out)
    losses = compare_gates(base, samples[: size.compared], unseen, size, console, output / "gates.png")

    training_speed, decoding_speed = time_attention(base, adapter, samples, unseen, size, console)
    trainable = adapter.num_parameters
    share = trainable / (trainable + sum(parameter.numel() for parameter in base.parameters()))
    return Result(
        directory,
        trainable,
        share,
        bitwise,
        base_accuracy,
        accuracy,
        fused_backend(base),
        training_speed,
        decoding_speed,
        losses,
    )


def compare_gates(
    base: Llama,
    samples: Sequence[Sample],
    unseen: Sequence[Sample],
    size: Size,
    console: Console,
    picture: Path,
) -> dict[str, list[float]]:
    """Trains adapters of every arm with one recipe, draws their losses, and returns the losses on unseen samples."""
    curves: dict[str, list[list[float]]] = {gates: [] for gates in ARMS}
    losses: dict[str, list[float]] = {gates: [] for gates in ARMS}
    for seed in range(1, size.seeds + 1):
        recipe = replace(size.recipe, epochs=size.compared_epochs, seed=seed)
        for gates, name in ARMS.items():
            adapter = new_adapter(base, size, gates, seed)
            title = f"{name}, seed {seed} of {size.seeds}"
            curves[gates].append(tune(base, adapter, samples, recipe, console, title))
            losses[gates].append(evaluate(base, adapter, unseen, recipe))
    draw(picture, curves)
    return losses


def time_attention(
    base: Llama,
    adapter: LlamaAdapter,
    samples: Sequence[Sample],
    unseen: Sequence[Sample],
    size: Size,
    console: Console,
) -> tuple[dict[str, float], dict[str, float]]:
    """Training and decoding tokens/s, eager and fused: medians of interleaved rounds."""
    training: dict[str, list[float]] = {"eager": [], "fused": [], "packed": []}
    decoding: dict[str, list[float]] = {"eager": [], "fused": []}
    padded, packed = (replace(size.recipe, packed=packed) for packed in (False, True))
    with stage(console, "timing attention, eager and fused", size.timed_rounds) as show:
        for done in range(size.timed_rounds):
            for name, backend in (("eager", "reference"), ("fused", "auto")):
                base.set_backend(backend)
                training[name].append(training_tokens_per_second(base, adapter, samples, padded, size))
                decoding[name].append(decoded_tokens_per_second(base, adapter, unseen))
            training["packed"].append(training_tokens_per_second(base, adapter, samples, packed, size))
            show(done + 1)
    return (
        {name: median(found) for name, found in training.items()},
        {name: median(found) for name, found in decoding.items()},
    )


def exact_match(
    base: Llama, adapter: LlamaAdapter | None, tokenizer: Tokenizer, records: Sequence[Record]
) -> float:
    """The share of instructions whose greedy answer is exactly the right one."""
    prompts = [tokenizer.encode(record.prompt) for record in records]
    answers = generate(base, prompts, adapter, max_new_tokens=LONGEST_ANSWER, temperature=0)
    right = [
        tokenizer.decode(answer) == record.output for answer, record in zip(answers, records, strict=True)
    ]
    return sum(right) / len(right)


def new_adapter(base: Llama, size: Size, gates: str = "zero", seed: int = 0) -> LlamaAdapter:
    """An untrained adapter."""
    config = AdapterConfig(num_layers=size.adapted_layers, gate_init=gates)
    return LlamaAdapter(base.config, config, torch.Generator().manual_seed(seed))


@torch.no_grad()
def same_logits(base: Llama, adapter: LlamaAdapter, samples: Sequence[Sample]) -> bool:
    """Whether every logit is the base's, bit for bit."""
    batch = next(batches(samples, max_tokens=2048))
    layout = {"cu_seqlens": batch.cu_seqlens, "max_seqlen": batch.max_seqlen}
    return torch.equal(base(batch.tokens, **layout), base(batch.tokens, adapter, **layout))


def tune(
    base: Llama,
    adapter: LlamaAdapter,
    samples: Sequence[Sample],
    recipe: Recipe,
    console: Console,
    title: str,
) -> list[float]:
    """Trains the adapter; the loss of every step."""
    losses = []
    with stage(console, title, recipe.epochs * recipe.steps_per_epoch(len(samples))) as show:
        for report in train(base, adapter, samples, recipe, make_optimizer(adapter, recipe)):
            losses.append(report.loss)
            show(report.step + 1, report.loss)
    return losses


def training_tokens_per_second(
    base: Llama, adapter: LlamaAdapter, samples: Sequence[Sample], recipe: Recipe, size: Size
) -> float:
    """The speed of a few training steps of a copy of the adapter, without padding."""
    copy = new_adapter(base, size)
    copy.load_state_dict(adapter.state_dict())
    reports = list(islice(train(base, copy, samples, recipe, make_optimizer(copy, recipe)), size.timed_steps))
    return sum(report.num_tokens for report in reports) / sum(report.seconds for report in reports)


def decoded_tokens_per_second(base: Llama, adapter: LlamaAdapter, samples: Sequence[Sample]) -> float:
    """The speed of decoding 16 sequences together, with the time for their prompts."""
    prompts = [sample.tokens[: sample.prompt_length] for sample in samples[:16]]
    began = time.perf_counter()
    answers = generate(base, prompts, adapter, max_new_tokens=DECODED, temperature=0, eos_ids=())
    return sum(map(len, answers)) / (time.perf_counter() - began)


def fused_backend(base: Llama) -> str:
    """The backend of zinit_kernels that backend="auto" takes for this model."""
    config = base.config
    tokens = torch.zeros(1, config.num_heads_q, 16, config.head_dim, device=base.device)
    prompts = torch.zeros(1, config.num_heads_q, 10, config.head_dim, device=base.device)
    gate = torch.zeros(config.num_heads_q, device=base.device)
    return explain(tokens, tokens, tokens, prompts, prompts, gate, is_causal=True).selected


def draw(path: Path, curves: dict[str, list[list[float]]]) -> None:
    """Draws the loss against the step: each seed thin, their mean thick."""
    seeds = len(curves["zero"])

    def put(axes: Any) -> None:
        for (gates, runs), colour in zip(
            curves.items(), ("tab:blue", "tab:orange", "tab:green"), strict=True
        ):
            for losses in runs:
                axes.plot(running_mean(losses), color=colour, alpha=0.3, linewidth=1)
            mean = [sum(losses) / len(losses) for losses in zip(*runs, strict=True)]
            axes.plot(running_mean(mean), color=colour, label=ARMS[gates])
        title = f"Running means of the loss by one recipe: {seeds} seeds (thin), their mean (thick)"
        axes.set_title(title, fontsize="medium")
        axes.set(xlabel="step", ylabel="training loss (nats)", ylim=(0, None))
        axes.legend()

    save_picture(path, put)


def table(result: Result) -> Table:
    """The table of the demo's results."""
    shown = Table("", "base", "with adapter", title="LLaMA-Adapter on a small LLaMA")
    shown.add_row("trainable parameters", "", f"{result.trainable:,} ({result.share:.2%} of all)")
    shown.add_row("output at step 0", "", "the base's, bit for bit" if result.bitwise_at_start else "DIFFERS")
    shown.add_row(
        "held-out instructions answered exactly",
        f"{result.base_accuracy:.1%}",
        f"{result.adapted_accuracy:.1%}",
    )
    shown.add_section()
    shown.add_row("tokens/s", "eager formula", f"fused ({result.fused_backend})")
    for name, speed in (
        ("decoding, 16 at once", result.decoding_speed),
        ("training, the same padded batches", result.training_speed),
    ):
        ratio = speed["fused"] / speed["eager"]
        shown.add_row(name, f"{speed['eager']:,.0f}", f"{speed['fused']:,.0f} ({ratio:.2f}x)")
    shown.add_row("training, packed as it is by default", "", f"{result.training_speed['packed']:,.0f}")
    shown.add_section()
    seeds = len(result.final_losses["zero"])
    shown.add_row(f"held-out loss, {seeds} seeds", "", "mean (lowest to highest)")
    for gates, losses in result.final_losses.items():
        mean = sum(losses) / len(losses)
        shown.add_row(ARMS[gates], "", f"{mean:.3f} ({min(losses):.3f} to {max(losses):.3f})")
    return shown


@program("free some: the demo takes about 1 GB")
def main(arguments: list[str] | None = None) -> None:
    """The program; exits with status 1 if a promise does not hold."""
    parser = Parser(prog=program_name("demo"), description=__doc__.split("\n\n")[1])
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    console, began = Console(highlight=False, markup=False, emoji=False), time.perf_counter()
    result = run(options.out, Size(), console)
    console.print(table(result))
    console.print(PRETRAINING)
    for bar, met in result.bars().items():
        console.print(f"{'met' if met else 'MISSED'}: {bar}")
    console.print(
        f"The picture is {options.out / 'gates.png'}. This took {time.perf_counter() - began:.0f} s."
    )
    console.print(
        f"Ask it: {program_name('generate')} --base {result.base} "
        f'--adapter {options.out / "adapter.safetensors"} --instruction "What is the opposite of hot?"',
        soft_wrap=True,
    )
    if not all(result.bars().values()):
        sys.exit(1)


if __name__ == "__main__":
    run_program(main)

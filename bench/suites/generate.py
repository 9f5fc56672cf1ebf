"""Generation: tokens per second, and how near that is to reading the weights and the cache once per token.

The same base and prompts, greedy, with an adapter and without: this project's loop, transformers', litgpt's and, on a
CPU, llama.cpp's. There also from weights of 8 and 4 bits; llama.cpp's are Q8_0 and Q4_0 blocks with nearly the same
numbers. Each sequence may have an adapter of its own. On a CPU all weights lie in huge pages, and are read from there
for the limit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.config import LlamaConfig
from model.huge_pages import use_huge_pages
from model.llama import Adapter, Llama
from model.quantised import quantise
from model.sampling import generate
from model.serving.prompt_table import PromptTable

from .. import llama_cpp
from ..ledger import Row
from ..llama_cpp import LlamaCpp
from ..machine import device_copy, plain_read, why_failed, why_missing
from ..measure import Clock, measure
from ..methods import (
    ACCELERATED,
    LITGPT,
    NEEDS_HF,
    NEEDS_PEFT,
    ONE_BILLION,
    PEFT,
    ROUNDING,
    SEVEN_BILLION,
    SMOLLM2,
    TINY,
    in_litgpt,
    in_peft,
    in_peft_accelerated,
    in_transformers,
    our_adapter,
    random_base,
)
from ..problem import name_of
from ..runner import (
    Chart,
    Comparison,
    Figure,
    Job,
    Note,
    Options,
    Select,
    Suite,
    Target,
    speed_of,
    speed_over,
)

ADAPTED, ALONE, BASE_ALONE = "zinit, adapted", "zinit, base alone", "transformers, base alone"
EACH, INT8, INT4 = "zinit, an adapter each", "zinit, int8, adapted", "zinit, int4, adapted"
LLAMA_CPP, LLAMA_CPP_Q8, LLAMA_CPP_Q4 = "llama.cpp", "llama.cpp, Q8_0", "llama.cpp, Q4_0"
ADAPTERS = 16  # at most, where each sequence has its own
SPEED, FIRST = "tokens/s", "first token ms"
OF_BEST = "of best read"  # bytes per second over those of the fastest plain read in these rounds


class Base(NamedTuple):
    name: str
    config: LlamaConfig
    prompt: int  # tokens
    new: int
    batches: tuple[int, ...]
    long_prompt: int = 0  # tokens, read in a job of its own


SMALL, BILLION = "SmolLM2-135M's shape", "Llama-3.2-1B's shape"
BASES = {
    "cpu": (Base(SMALL, SMOLLM2, 64, 32, (1, 4, 16), 512), Base(BILLION, ONE_BILLION, 16, 16, (1, 4))),
    "cuda": (Base("LLaMA-7B", SEVEN_BILLION, 128, 32, (1, 32)),),
}
WHOLE_BLOCKS = replace(TINY, intermediate_size=192)  # llama.cpp's blocks are 32 numbers of a row
SMOKE = Base("tiny LLaMA", WHOLE_BLOCKS, 8, 4, (1,), 16)
Generate = Callable[[Tensor, int], Tensor]  # (prompts [B, T], N): the N new tokens of each, [B, N]
Scores = Callable[[Tensor], Tensor]  # tokens [B, T] -> logits [B, T, V], computed without a cache


def jobs(options: Options) -> list[Job]:
    """One per base, dtype and number of sequences, and one for a long prompt."""
    found = []
    for base in bases_of(options):
        for dtype in options.dtypes:
            for batch in base.batches:
                title = f"generate, {base.name}, B {batch}, {name_of(dtype)}"
                found.append(Job(title, partial(rows, options, base, batch, dtype)))
            if base.long_prompt:
                title = f"generate, {base.name}, {base.long_prompt} tokens, {name_of(dtype)}"
                found.append(Job(title, partial(prompt_rows, options, base, dtype)))
    return found


def bases_of(options: Options) -> list[Base]:
    found = [SMOKE] if options.smoke else list(BASES[options.device.type])
    return [base for base in found if options.wants_shape(base.name)]


def by_this_project(base: Llama, adapter: Adapter | None) -> tuple[Generate, Scores]:
    def run(prompts: Tensor, new: int) -> Tensor:
        new_tokens = generate(base, prompts.tolist(), adapter, max_new_tokens=new, temperature=0, eos_ids=[])
        return torch.tensor(new_tokens)

    return run, lambda tokens: base.logits(base.hidden_states(tokens, adapter))


def with_our_adapter(base: Llama) -> tuple[Generate, Scores]:
    return by_this_project(base, our_adapter(base).requires_grad_(False))


def with_an_adapter_each(base: Llama) -> tuple[Generate, Scores]:
    """The sequences take the rows of a table of adapters in turn."""
    table = PromptTable(base)
    for number in range(ADAPTERS):
        adapter = our_adapter(base)
        torch.manual_seed(number)
        torch.nn.init.normal_(adapter.prompts)
        table.add(adapter)

    def adapter_of(prompts: Tensor) -> Adapter | None:
        return table.adapter_of([row % ADAPTERS for row in range(len(prompts))])

    def run(prompts: Tensor, new: int) -> Tensor:
        return by_this_project(base, adapter_of(prompts))[0](prompts, new)

    return run, lambda tokens: by_this_project(base, adapter_of(tokens))[1](tokens)


def by_transformers(make: Callable[[Llama], Any], base: Llama) -> tuple[Generate, Scores]:
    model = make(base).eval()

    def run(prompts: Tensor, new: int) -> Tensor:
        tokens = model.generate(
            prompts, max_new_tokens=new, min_new_tokens=new, do_sample=False, use_cache=True, pad_token_id=0
        )
        return tokens[:, prompts.shape[1] :]

    return run, lambda tokens: model(tokens).logits


def by_litgpt(base: Llama) -> tuple[Generate, Scores]:
    """Its loop takes one sequence; its cache is made once."""
    from litgpt.generate.base import generate as generate_one

    model = in_litgpt(base).eval()

    def run(prompts: Tensor, new: int) -> Tensor:
        length = prompts.shape[1] + new
        if model.mask_cache is None or model.mask_cache.shape[-1] < length:
            model.set_kv_cache(1, length, device=prompts.device, dtype=base.dtype)
        return generate_one(model, prompts[0], length, temperature=0.0, include_prompt=False)[None]

    return run, model


def by_llama_cpp(base: Llama) -> tuple[Generate, Scores]:
    """It has no adapter. What it makes is compared with what this project's base finds likeliest."""
    return LlamaCpp(base).generate, lambda tokens: base.logits(base.hidden_states(tokens))


class Generator(NamedTuple):
    """A way to generate; `build` makes it for a base."""

    name: str
    build: Callable[[Llama], tuple[Generate, Scores]]
    needs: tuple[str, ...] = ()
    one_sequence: bool = False
    quantise: str | None = None  # the base's format; from bfloat16
    on_cpu: bool = False  # on a CPU alone

    def base_of(self, base: Llama) -> Llama:
        """The base as this generator reads it."""
        if self.quantise is not None:
            base = quantise(copy.deepcopy(base), self.quantise)
        use_huge_pages(base)
        return base


GENERATORS = (
    Generator(ADAPTED, with_our_adapter),
    Generator(ALONE, partial(by_this_project, adapter=None)),
    Generator(EACH, with_an_adapter_each),
    Generator(INT8, with_our_adapter, quantise="int8", on_cpu=True),
    Generator(INT4, with_our_adapter, quantise="int4", on_cpu=True),
    Generator(ACCELERATED, partial(by_transformers, in_peft_accelerated), NEEDS_PEFT),
    Generator(PEFT, partial(by_transformers, in_peft), NEEDS_PEFT),
    Generator(BASE_ALONE, partial(by_transformers, in_transformers), NEEDS_HF),
    Generator(LITGPT, by_litgpt, ("litgpt",), one_sequence=True),
    Generator(LLAMA_CPP, by_llama_cpp, llama_cpp.NEEDS, on_cpu=True),
    Generator(LLAMA_CPP_Q8, by_llama_cpp, llama_cpp.NEEDS, quantise="int8", on_cpu=True),
    Generator(LLAMA_CPP_Q4, by_llama_cpp, llama_cpp.NEEDS, quantise="int4", on_cpu=True),
)


@torch.no_grad()
def why_wrong(generator: Generator, dtype: torch.dtype, device: torch.device) -> str:
    """Why the tokens that a tiny model decodes are not, up to rounding, those that a pass without a cache finds
    likeliest; "" if they are."""
    random = torch.Generator().manual_seed(0)
    prompts = torch.randint(TINY.vocab_size, (1, 9), generator=random).to(device)
    try:
        run, scores = generator.build(generator.base_of(random_base(WHOLE_BLOCKS, dtype, device)))
        made = run(prompts, 8).to(device)
        logits = scores(torch.cat([prompts, made], 1))[:, prompts.shape[1] - 1 : -1].float()
    except Exception as error:  # any: what raises gets no figure, and the others go on
        return why_failed(error)
    lost = (logits.amax(-1) - logits.gather(-1, made[..., None])[..., 0]).max() / logits.std()
    return (
        ""
        if lost <= ROUNDING[dtype]
        else f"wrong result: a token {lost:.2g} standard deviations from the best"
    )


def usable(options: Options, batch: int, dtype: torch.dtype, note: Note) -> Iterator[Generator]:
    """Those that can run here and are right on a tiny model; the user is told why the others are left out."""
    for generator in GENERATORS:
        if not options.wants_provider(generator.name):
            continue
        if reason := why_missing(*generator.needs):
            note(f"{generator.name} left out: {reason}")
        elif generator.on_cpu and options.device.type != "cpu":
            note(f"{generator.name} left out: it is for a CPU")
        elif generator.quantise is not None and dtype != torch.bfloat16:
            continue  # its figures are those of the other dtype: the weights are the same
        elif generator.name == LLAMA_CPP and dtype == torch.float16:
            continue
        elif generator.one_sequence and batch > 1:
            note(f"{generator.name} left out of batches: it takes one sequence")
        elif wrong := why_wrong(generator, dtype, options.device):
            note(f"{generator.name}, {name_of(dtype)}: no figure, {wrong}")
        else:
            yield generator


def rows(options: Options, base: Base, batch: int, dtype: torch.dtype, note: Note) -> Iterator[Row]:
    model = random_base(base.config, dtype, options.device)
    prompts = some_prompts(base, batch, base.prompt, options.device)
    calls: dict[str, Callable[[], object]] = {}
    names = {}  # -> bytes that a token reads
    use_huge_pages(model)
    seqlen = base.prompt + base.new // 2
    for generator in usable(options, batch, dtype, note):
        own = model if generator.quantise is None else generator.base_of(model)
        run, _ = generator.build(own)
        names[generator.name] = bytes_per_token(own, batch, seqlen)
        calls[f"{generator.name}, first"] = partial(run, prompts, 1)
        calls[f"{generator.name}, all"] = partial(run, prompts, base.new)
    if not calls:
        return
    weights = list(model.state_dict().values())
    num_bytes = sum(w.nbytes for w in weights)
    on_gpu = options.device.type == "cuda"
    calls["transfer"] = device_copy(num_bytes, options.device) if on_gpu else plain_read(*weights)
    times = measure(calls, options.seconds if options.smoke else 4 * options.seconds, Clock(options.device))
    limit = num_bytes / times.median("transfer")  # bytes per second
    best = num_bytes / min(times.seconds["transfer"])
    for name, streamed in names.items():
        first, everything = f"{name}, first", f"{name}, all"
        per_step = (times.median(everything) - times.median(first)) / (base.new - 1)
        others = [o for o in (ADAPTED, ALONE, PEFT) if o != name and o in names]
        yield Row(
            "generate", base.name, {"batch": batch, "prompt": base.prompt, "new_tokens": base.new},
            f"B {batch}, {base.prompt} + {base.new} tokens", name_of(dtype), name,
            gbps=streamed / per_step / 1e9, ratios={o: times.ratio(everything, f"{o}, all") for o in others},
            figures={
                SPEED: batch / per_step,
                FIRST: 1e3 * times.median(first),
                "of the bandwidth limit": streamed / per_step / limit,
                OF_BEST: streamed / per_step / best,
            },
            **times.in_ms(everything),
        )  # fmt: skip


def prompt_rows(options: Options, base: Base, dtype: torch.dtype, note: Note) -> Iterator[Row]:
    """The first token behind a long prompt."""
    model = random_base(base.config, dtype, options.device)
    prompts = some_prompts(base, 1, base.long_prompt, options.device)
    use_huge_pages(model)
    calls: dict[str, Callable[[], object]] = {}
    for generator in usable(options, 1, dtype, note):
        run, _ = generator.build(model if generator.quantise is None else generator.base_of(model))
        calls[generator.name] = partial(run, prompts, 1)
    if not calls:
        return
    times = measure(calls, options.seconds if options.smoke else 4 * options.seconds, Clock(options.device))
    for name in calls:
        yield Row(
            "generate", base.name, {"batch": 1, "prompt": base.long_prompt, "new_tokens": 1},
            mode_of_prompt(base), name_of(dtype), name,
            ratios={o: times.ratio(name, o) for o in (ADAPTED, ALONE, PEFT) if o != name and o in calls},
            figures={FIRST: 1e3 * times.median(name)}, **times.in_ms(name),
        )  # fmt: skip


def mode_of_prompt(base: Base) -> str:
    return f"first token of {base.long_prompt}"


def some_prompts(base: Base, batch: int, length: int, device: torch.device) -> Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randint(3, base.config.vocab_size, (batch, length), generator=random).to(device)


def bytes_per_token(model: Llama, batch: int, seqlen: int) -> int:
    """Bytes read to decode one token of each sequence: all weights, and the cache. Of an embedding that is not the
    output projection as well only some rows are read."""
    config = model.config
    unread = "" if config.tie_embeddings else "embed_tokens.weight"
    weights = sum(w.nbytes for name, w in model.state_dict().items() if name != unread)
    keys_and_values = 2 * config.num_layers * config.num_heads_kv * config.head_dim * model.dtype.itemsize
    return weights + batch * seqlen * keys_and_values


def profiled(options: Options) -> tuple[str, Callable[[], object], int]:
    """Generating with this project's adapter."""
    base = bases_of(options)[0]
    model = random_base(base.config, options.dtypes[0], options.device)
    run, _ = with_our_adapter(model)
    streamed = base.new * bytes_per_token(model, 1, base.prompt + base.new // 2)
    title = f"{base.name}, {base.prompt} + {base.new} tokens"
    return title, partial(run, some_prompts(base, 1, base.prompt, options.device), base.new), streamed


def rows_by(provider: str) -> Select:
    return lambda row: (row.suite, row.provider) == ("generate", provider)


def speed_ratio(other: str, rate: Callable[[Row], float]) -> Figure:
    """A row's rate over that of another provider of the same setting."""

    def ratio(row: Row, rows: Sequence[Row]) -> float | None:
        for found in rows:
            if found.setting == row.setting and found.provider == other:
                return rate(row) / rate(found)
        return None

    return ratio


def decoded(provider: str, base: str, batches: tuple[int, ...], *dtypes: str) -> Select:
    """A provider's rows of decoded tokens."""
    return lambda row: (
        (row.suite, row.provider, row.shape) == ("generate", provider, base)
        and row.dtype in dtypes
        and SPEED in row.figures
        and row.sizes["batch"] in batches
    )


def long_prompt(provider: str, dtype: str) -> Select:
    return lambda row: (
        (row.suite, row.provider, row.dtype) == ("generate", provider, dtype) and SPEED not in row.figures
    )


def decodes_over(other: str, provider: str, base: str, batch: int, dtype: str, bound: float) -> Target:
    what = f"{provider}, {base}, {dtype}, B {batch}: tokens/s over {other}'s"
    return Target(
        what,
        decoded(provider, base, (batch,), dtype),
        speed_ratio(other, lambda row: row.figures[SPEED]),
        bound,
    )


def reads_over(other: str, provider: str, dtype: str, bound: float) -> Target:
    what = f"{provider}, {dtype}: a prompt's tokens/s over {other}'s"
    return Target(
        what, long_prompt(provider, dtype), speed_ratio(other, lambda row: 1 / row.figures[FIRST]), bound
    )


def share_of_read(base: str, bound: float) -> Target:
    select = decoded(ADAPTED, base, (1,), "float32", "bfloat16")
    what = f"{ADAPTED}, {base}, B 1: bytes per second over the best plain read's"
    return Target(what, select, lambda row, rows: row.figures.get(OF_BEST), bound)


BF16 = "bfloat16"
CPU_TARGETS = (
    share_of_read(BILLION, 0.85),
    share_of_read(SMALL, 0.75),
    decodes_over(LLAMA_CPP, ADAPTED, SMALL, 1, "float32", 1.0),
    decodes_over(LLAMA_CPP, ADAPTED, SMALL, 1, BF16, 1.1),
    decodes_over(LLAMA_CPP_Q8, INT8, SMALL, 1, BF16, 1.4),
    decodes_over(LLAMA_CPP_Q4, INT4, SMALL, 1, BF16, 1.6),
    decodes_over(LLAMA_CPP, ADAPTED, BILLION, 1, BF16, 1.0),
    decodes_over(LLAMA_CPP_Q4, INT4, BILLION, 1, BF16, 1.0),
    decodes_over(LLAMA_CPP, ADAPTED, BILLION, 4, BF16, 1.3),
    decodes_over(LLAMA_CPP_Q4, INT4, BILLION, 4, BF16, 1.3),
    decodes_over(ADAPTED, INT8, BILLION, 1, BF16, 1.8),
    decodes_over(ADAPTED, INT4, BILLION, 1, BF16, 2.7),
    decodes_over(BASE_ALONE, ADAPTED, SMALL, 1, BF16, 3.5),
    decodes_over(BASE_ALONE, ADAPTED, SMALL, 4, BF16, 2.5),
    decodes_over(BASE_ALONE, ADAPTED, SMALL, 4, "float32", 3.0),
    decodes_over(ALONE, ADAPTED, SMALL, 1, BF16, 1 / 1.02),
    decodes_over(ADAPTED, EACH, SMALL, 16, BF16, 1 / 1.03),
    reads_over(LLAMA_CPP, ADAPTED, BF16, 2.3),
    reads_over(LLAMA_CPP, ADAPTED, "float32", 1.2),
    reads_over(LLAMA_CPP_Q4, INT4, BF16, 1.5),
)
COMPARISONS = (
    Comparison("generate", "PEFT's adaption prompt", rows_by(ADAPTED), speed_over(PEFT), 5),
    Comparison("generate", "litgpt's adapter", rows_by(LITGPT), speed_of(ADAPTED), 6),
    Comparison("generate", "transformers, no adapter", rows_by(BASE_ALONE), speed_of(ADAPTED)),
    Comparison("PEFT accelerated, generate", "PEFT", rows_by(ACCELERATED), speed_over(PEFT)),
)
# from plain weights; the targets compare packed ones
BESIDE_LLAMA_CPP = Comparison("generate", "llama.cpp, no adapter", rows_by(LLAMA_CPP), speed_of(ADAPTED), 7)
SUITES = (
    Suite(
        "generate",
        "Greedy generation. The bandwidth limit is one read of all weights and the cache per token, at the rate at "
        "which this machine reads (a GPU: copies) the weights in the same rounds: in the median, or at best.",
        jobs,
        targets={"cpu": CPU_TARGETS},
        comparisons={"cpu": (*COMPARISONS, BESIDE_LLAMA_CPP), "cuda": COMPARISONS},
        charts=(Chart(SPEED, "Generation is {} times as fast as with PEFT", ADAPTED, PEFT),),
        profiled=profiled,
    ),
)

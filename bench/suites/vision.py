"""Prompts per image: what they cost over prompts that all sequences share, by CPU time of one thread.

A training step (forward, backward, AdamW) of the multi-modal adapter, with an image for each sequence, against the text
adapter on the same tokens, and the memory of both at their peaks; and 8 questions on 8 images against 8 questions on
one image, prefill and decoded token. Features are random, since the encoder runs once for an image and is no part of
a step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch

from model.adapter import LlamaAdapter
from model.config import AdapterConfig, LlamaConfig
from model.data import Sample, pack
from model.llama import KVCache, Llama
from model.loss import answer_loss
from model.vision.adapter import VisualAdapter
from model.vision.config import VisualConfig

from ..ledger import Row
from ..machine import why_failed
from ..measure import in_fresh_process, in_use, measure, one_thread, peak_of
from ..methods import EIGHTH, TINY, random_base
from ..runner import Job, Note, Options, Suite, Target, rows_of, speed_over

TEXT, SEEING = "zinit, text alone", "zinit, an image each"
ONE, EACH = "zinit, one image for all", "zinit, 8 images"
STEP, PREFILL, DECODE = "training step", "prefill", "decode"
FEATURE_SIZE, TOKENS_AN_IMAGE, GATE = 1536, 26, 0.3
QUESTIONS, DECODED = 8, 8  # sequences, tokens that are decoded
QUESTION = 128  # tokens, as a ScienceQA question with its context has
PEAK_MB, PROMPTS_MB = "peak MB", "prompts MB"
LIMIT = 1.02


class Shape(NamedTuple):
    name: str
    config: LlamaConfig
    batch: int
    seqlen: int


SHAPES = {
    False: Shape("LLaMA-7B's shape at 1/8 width", EIGHTH, 4, 256),
    True: Shape("tiny LLaMA", TINY, 2, 16),
}


def jobs(options: Options) -> list[Job]:
    """Training, and generation; on a CPU only."""
    shape = SHAPES[options.smoke]
    if options.device.type != "cpu" or not options.wants_shape(shape.name):
        return []
    return [
        Job(f"vision, {STEP}", partial(training_rows, options, shape)),
        Job(f"vision, {PREFILL} and {DECODE}", partial(generation_rows, options, shape)),
    ]


def cpu_seconds(function: Callable[[], object]) -> float:
    """CPU time of the second call: the first is charged for the caches that another function left behind."""
    function()
    start = time.process_time()
    function()
    return time.process_time() - start


def adapter_of(config: LlamaConfig, kind: str) -> LlamaAdapter:
    """An adapter whose gates are not at 0; with the visual part of LLaMA-Adapter V2 at a small size."""
    generator = torch.Generator().manual_seed(0)
    if kind == TEXT:
        adapter = LlamaAdapter(config, AdapterConfig(), generator)
    else:
        visual = VisualConfig("queries", FEATURE_SIZE, 64, blocks=1, heads=4)
        adapter = VisualAdapter(config, AdapterConfig(), visual, generator=generator)
    assert adapter.gates is not None
    with torch.no_grad():
        adapter.gates.fill_(GATE)
    return adapter


def images(count: int) -> list[torch.Tensor]:
    """The features of some images."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(TOKENS_AN_IMAGE, FEATURE_SIZE, generator=generator) for _ in range(count)]


def training_step(base: Llama, shape: Shape, kind: str) -> Callable[[], object]:
    """One step on `batch` packed sequences of `seqlen` tokens; with an image of its own for each."""
    adapter = adapter_of(base.config, kind)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-6)
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(3, base.config.vocab_size, (shape.batch, shape.seqlen + 1), generator=generator)
    batch = pack([Sample(row, 1) for row in tokens.tolist()])
    features = images(shape.batch)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        seen = adapter
        if isinstance(adapter, VisualAdapter):
            seen = adapter.with_images(features, [(image,) for image in range(shape.batch)])
        hidden = base.hidden_states(
            batch.tokens, seen, cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen
        )
        answer_loss(hidden, batch.targets, base.output_weight).backward()
        optimizer.step()

    return step


def peak(shape: Shape, kind: str, note: Note) -> int | None:
    """Bytes at the peak of a step, with weights and optimizer; None where they cannot be had."""
    try:
        return in_fresh_process(peak_alone, shape, kind)
    except Exception as error:  # any: a process that is killed for its memory raises BrokenProcessPool
        note(f"{kind}: no peak, {why_failed(error)}")
        return None


def peak_alone(shape: Shape, kind: str) -> int:
    torch.set_num_threads(1)
    device = torch.device("cpu")
    before = in_use(device)
    base = random_base(shape.config, torch.float32, device)
    step = training_step(base, shape, kind)
    step()  # the optimizer makes its state
    return in_use(device) - before + peak_of(step, device)


def prompt_bytes(shape: Shape) -> int:
    """Of the prompts' own: hidden, key and value of each prompt, image and adapted layer, and their gradients."""
    config = shape.config
    layers, prompts = len(AdapterConfig().layers(config.num_layers)), AdapterConfig().prompt_length
    width = config.hidden_size + 2 * config.num_heads_kv * config.head_dim
    return 2 * 4 * layers * prompts * shape.batch * width


def training_rows(options: Options, shape: Shape, note: Note) -> Iterator[Row]:
    peaks = {} if options.smoke else {kind: peak(shape, kind, note) for kind in (TEXT, SEEING)}
    with one_thread():
        base = random_base(shape.config, torch.float32, options.device)
        steps = {kind: training_step(base, shape, kind) for kind in (TEXT, SEEING)}
        times = measure(steps, options.seconds if options.smoke else 4 * options.seconds, cpu_seconds)
    for kind in steps:
        figures = {}
        if bytes_at_peak := peaks.get(kind):
            figures = {PEAK_MB: bytes_at_peak / 1e6, PROMPTS_MB: prompt_bytes(shape) / 1e6}
        yield Row(
            "vision", shape.name, {"batch": shape.batch, "seqlen": shape.seqlen}, STEP, "float32", kind,
            ratios={other: times.ratio(kind, other) for other in steps if other != kind}, figures=figures,
            **times.in_ms(kind),
        )  # fmt: skip


def generation_rows(options: Options, shape: Shape, note: Note) -> Iterator[Row]:
    with one_thread():
        base = random_base(shape.config, torch.float32, options.device)
        for mode, make in ((PREFILL, prefill), (DECODE, decode)):
            functions = {ONE: make(base, [0] * QUESTIONS), EACH: make(base, list(range(QUESTIONS)))}
            times = measure(functions, options.seconds if options.smoke else 4 * options.seconds, cpu_seconds)
            for kind in functions:
                yield Row(
                    "vision", shape.name, {"batch": QUESTIONS, "seqlen": QUESTION}, mode, "float32", kind,
                    ratios={other: times.ratio(kind, other) for other in functions if other != kind},
                    **times.in_ms(kind, per=DECODED if mode == DECODE else 1),
                )  # fmt: skip


@torch.no_grad()
def prefill(base: Llama, chosen: Sequence[int]) -> Callable[[], KVCache]:
    """All questions in one packed pass into a new cache, their images projected in it; chosen: the image of each."""
    adapter = adapter_of(base.config, SEEING)
    assert isinstance(adapter, VisualAdapter)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, base.config.vocab_size, (QUESTIONS * QUESTION,), generator=generator)
    cu_seqlens = torch.arange(0, len(tokens) + 1, QUESTION, dtype=torch.int32)
    features = images(max(chosen) + 1)

    @torch.no_grad()
    def run() -> KVCache:
        cache = KVCache(base.config, QUESTIONS, QUESTION + DECODED, base.dtype)
        seen = adapter.with_images(features, [(image,) for image in chosen])
        base.hidden_states(tokens, seen, cu_seqlens=cu_seqlens, max_seqlen=QUESTION, cache=cache)
        return cache

    return run


def decode(base: Llama, chosen: Sequence[int]) -> Callable[[], object]:
    """DECODED tokens of every question, after the prefill."""
    adapter = adapter_of(base.config, SEEING)
    assert isinstance(adapter, VisualAdapter)
    seen = adapter.with_images(images(max(chosen) + 1), [(image,) for image in chosen])
    cache = prefill(base, chosen)()
    tokens = torch.full((QUESTIONS, 1), 5)

    @torch.no_grad()
    def run() -> None:
        cache.lengths.fill_(QUESTION)
        for _ in range(DECODED):
            base.hidden_states(tokens, seen, cache=cache)

    return run


def peak_beyond(row: Row, rows: Sequence[Row]) -> float | None:
    """The peak with images over the text step's peak and the prompts' own bytes."""
    text = [r.figures.get(PEAK_MB) for r in rows if r.setting == row.setting and r.provider == TEXT]
    if not text or not text[-1] or PEAK_MB not in row.figures:
        return None
    return row.figures[PEAK_MB] / (text[-1] + row.figures[PROMPTS_MB])


def target(mode: str, ours: str, other: str, ratio: float) -> Target:
    select = rows_of(ours, "vision", mode, "width", "LLaMA", dtype="float32")
    return Target(f"{ours}, CPU time, {mode}: times as fast as {other}", select, speed_over(other), 1 / ratio)


TARGETS = (
    target(STEP, SEEING, TEXT, 1.03),
    target(PREFILL, EACH, ONE, LIMIT),
    target(DECODE, EACH, ONE, LIMIT),
    Target(
        f"{SEEING}, {STEP}: peak memory / that of text alone and the prompts' own bytes",
        rows_of(SEEING, "vision", STEP, "width", "LLaMA", dtype="float32"), peak_beyond, 1.10, at_most=True,
    ),
)  # fmt: skip
SUITES = (
    Suite(
        "vision",
        "Prompts that depend on an image against prompts that all sequences share: CPU time of one thread, ms per "
        "training step, per prefill of 8 questions and per decoded token of all 8.",
        jobs,
        targets={"cpu": TARGETS},
    ),
)

"""Decoding on a GPU: a step of the whole model is captured as a CUDA graph once, and replayed for each token.

An eager step of 32 layers is some hundred launches, which cost the host as much time as the GPU needs to read the
weights. A replayed one is a single launch. Nothing in a step waits for the device: the token is chosen there, and the
host looks at the tokens after every `STEPS` of them. Answers shorter than that never wait for a capture.

No GPU has run this. So the first replay is compared with an eager step, and where they differ, or where nothing can be
captured, the steps stay eager, with a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .choice import NOT_NUMBERS, choose_on_device
from .errors import UserError
from .llama import Adapter, KVCache, Llama, select_sequences

TOLERANCE = 1e-2  # of the largest logit, between a replay and the same step without a graph
STEPS = 8  # between two looks at the tokens; a sequence that has ended computes 7 in vain at most
# Runs a call, and returns what runs it again on the same memory; the generators are those that it draws from.
Capture = Callable[[Callable[[], None], Sequence[torch.Generator]], Callable[[], object]]


def capture_graph(call: Callable[[], None], generators: Sequence[torch.Generator]) -> Callable[[], object]:
    """Captures a call as a CUDA graph, after it has run on another stream, as torch asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        call()
    return graph.replay


class DeviceSteps:
    """The next tokens of a batch, computed `STEPS` at a time. capture: how a step is made repeatable."""

    def __init__(
        self,
        model: Llama,
        adapter: Adapter | None,
        cache: KVCache,
        hidden: Tensor,
        capture: Capture = capture_graph,
    ):
        self.model, self.adapter, self.cache, self.capture = model, adapter, cache, capture
        self.hidden: Tensor | None = hidden  # of the prompts; None once a token was chosen from it
        self.ahead: list[list[int]] = []  # steps that are computed, and not asked for yet
        self.computed = 0  # steps
        self.replay: Callable[[], object] | None = None
        self.generators: list[torch.Generator] = []

    def next(
        self, temperature: float, top_p: float, generators: Sequence[torch.Generator], most: int
    ) -> list[int]:
        """A token for each sequence. `most`: tokens of a sequence that may be asked for, this one too."""
        if self.hidden is not None:
            device = self.hidden.device
            seeds = [generator.initial_seed() for generator in generators]
            self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
            self.temperature, self.top_p = temperature, top_p
            self.tokens, self.finite = self._choose(self.model.logits(self.hidden))
            self.hidden = None
            self.ahead = [self._on_host(self.tokens[None])[0]]
        if not self.ahead:
            self._compute(min(STEPS, most), captured=self.computed > 0 and most > STEPS)
        return self.ahead.pop(0)

    def select(self, kept: list[int]) -> None:
        """Goes on with these rows of the batch, in a graph of its own."""
        self.cache, self.adapter = self.cache.select(kept), select_sequences(self.adapter, kept)
        self.tokens, self.generators = self.tokens[kept], [self.generators[row] for row in kept]
        self.ahead = [[step[row] for row in kept] for step in self.ahead]
        self.replay = None

    def _choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return choose_on_device(logits, self.temperature, self.top_p, self.generators)

    def _step(self) -> None:
        """Reads the last tokens and chooses the next, in place: what a graph repeats."""
        hidden = self.model.hidden_states(self.tokens[:, None], self.adapter, cache=self.cache)[:, 0]
        self.logits = self.model.logits(hidden)
        tokens, finite = self._choose(self.logits)
        self.tokens.copy_(tokens)
        self.finite.logical_and_(finite)

    def _compute(self, count: int, captured: bool) -> None:
        """captured: whether there is enough to come, so that a graph is worth the time that its capture takes."""
        if self.replay is None and captured:
            self.replay = self._captured()
        steps = self.tokens.new_empty(count, len(self.tokens))
        for step in steps:
            (self.replay or self._step)()
            step.copy_(self.tokens)
        self.computed += count
        self.ahead = self._on_host(steps)

    def _on_host(self, steps: Tensor) -> list[list[int]]:
        tokens: list[list[int]] = steps.tolist()
        if not self.finite:
            raise UserError(NOT_NUMBERS)
        return tokens

    def _captured(self) -> Callable[[], object]:
        """A step that can be repeated. Tokens and cache are left as they were."""
        state = [(tensor, tensor.clone()) for tensor in (self.tokens, self.cache.lengths, self.finite)]

        def restore() -> None:
            for tensor, value in state:
                tensor.copy_(value)

        self._step()  # kernels are built, tried and tuned here, outside of a capture
        expected = self.logits.clone()
        restore()
        try:
            replay = self.capture(self._step, self.generators)
            restore()
            replay()
            off = float((self.logits - expected).abs().max() / expected.abs().max())
        except RuntimeError as error:  # whatever torch and CUDA raise in a capture, memory that ends too
            restore()
            warnings.warn(f"decoding runs without a CUDA graph: {str(error).splitlines()[0]}", stacklevel=2)
            return self._step
        restore()
        if not off <= TOLERANCE and bool(expected.isfinite().all()):
            warnings.warn(
                f"decoding runs without a CUDA graph: its logits differ from those of the same step by {off:.1e} of "
                "the largest. Please report this with the output of `zinit check --gpu`.",
                stacklevel=2,
            )
            return self._step
        return replay

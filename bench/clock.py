"""Seconds of one call, on a CPU or a CUDA device, with warm or cold caches, launched eagerly or from a graph."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

FLUSH_BYTES = {"cpu": 128 << 20, "cuda": 512 << 20}  # several times the last-level cache of what is in use
GRAPH_WARMUPS = 3  # on a side stream before a capture, as torch asks


class Clock:
    """Times calls on `device`; `cold` empties the last-level cache before each one.

    A call is timed right after an untimed one of itself, so that it is not charged for the caches another one left
    behind; a cold one after the flush too. A call that took long the last time is its own warm-up: filling the caches
    anew costs 2 ms, 1 % of LONG.
    """

    LONG = 0.2  # seconds

    def __init__(self, device: torch.device, cold: bool = False):
        self.device, self.cold = device, cold
        self._last: dict[int, float] = {}
        self._flush = (
            torch.empty(FLUSH_BYTES[device.type], dtype=torch.uint8, device=device) if cold else None
        )

    def __call__(self, call: Callable[[], object]) -> float:
        if self._last.get(id(call), 0.0) < self.LONG:
            call()
        if self._flush is not None:
            self._flush.zero_()
        found = self._on_device(call) if self.device.type == "cuda" else self._here(call)
        self._last[id(call)] = found
        return found

    @staticmethod
    def _here(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def _on_device(self, call: Callable[[], object]) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # without this pause the device waits for the launch of a short call, and that would be timed
        torch.cuda._sleep(200_000)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """The call as a replay of a CUDA graph; its outputs stay in the graph's memory."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(GRAPH_WARMUPS):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay

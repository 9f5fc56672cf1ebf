"""How a call is measured: its seconds, in turns with others; its memory at the peak; and where its time goes."""

from __future__ import annotations

import gc
import os
import random
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from .machine import device_copy, matrix_product, peak_arithmetic, plain_read

FLUSH_BYTES = {"cpu": 128 << 20, "cuda": 512 << 20}  # several times the last-level cache
GRAPH_WARMUPS = 3  # on a side stream before a capture, as torch asks
MIN_ROUNDS, MAX_ROUNDS = 3, 101
# freed memory goes back to the system at once, so that resident memory is memory in use
RETURN_AT_ONCE = (
    "glibc.malloc.mmap_threshold=65536:glibc.malloc.trim_threshold=65536:glibc.malloc.arena_max=1"
)
PROFILE_LINES = 15
PROFILE_STEPS = 3


class Clock:
    """The seconds of one call on `device`; with `cold`, the last-level cache is emptied before it.

    An untimed call of the same function comes first, so that a call is not charged for the caches that another one
    left behind. A function whose last call took longer than WARM_UP_BELOW seconds needs none: filling the caches
    costs 2 ms, 1 % of that.
    """

    WARM_UP_BELOW = 0.2

    def __init__(self, device: torch.device, cold: bool = False):
        self.device, self.cold = device, cold
        self._last: dict[int, float] = {}
        self._flush = (
            torch.empty(FLUSH_BYTES[device.type], dtype=torch.uint8, device=device) if cold else None
        )

    def __call__(self, call: Callable[[], object]) -> float:
        if self._last.get(id(call), 0.0) < self.WARM_UP_BELOW:
            call()
        if self._flush is not None:
            self._flush.zero_()
        found = self._on_gpu(call) if self.device.type == "cuda" else self._on_cpu(call)
        self._last[id(call)] = found
        return found

    @staticmethod
    def _on_cpu(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def _on_gpu(self, call: Callable[[], object]) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # without this pause the device would wait for the launch of a short call, and the wait would be timed
        torch.cuda._sleep(200_000)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


class Times:
    """Seconds by function and round."""

    def __init__(self, seconds: Mapping[str, list[float]]):
        self.seconds = seconds

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def quantile(self, name: str, share: float) -> float:
        """The value below which `share` of the rounds lie, interpolated."""
        return torch.tensor(self.seconds[name], dtype=torch.float64).quantile(share).item()

    def ratio(self, name: str, *others: str) -> float:
        """Median over the rounds of time(name) / the least of the others' times."""
        least = [min(self.seconds[other][i] for other in others) for i in range(self.rounds)]
        return statistics.median(a / b for a, b in zip(self.seconds[name], least, strict=True))

    def in_ms(self, name: str, per: float = 1.0) -> dict[str, Any]:
        """A row's fields about time; `per` = units of work in a call (tokens, say)."""
        p20, p50, p80 = (1e3 * self.quantile(name, share) / per for share in (0.2, 0.5, 0.8))
        return {"rounds": self.rounds, "p20_ms": p20, "p50_ms": p50, "p80_ms": p80}

    @property
    def rounds(self) -> int:
        return len(next(iter(self.seconds.values())))


def measure(
    functions: Mapping[str, Callable[[], object]], seconds: float, clock: Callable[..., float] | None = None
) -> Times:
    """Times every function once per round, in a new order each, for about `seconds` and at least 3 rounds.

    The speed of a shared machine drifts by the minute, so only ratios within a round are compared.
    """
    clock = clock or Clock(torch.device("cpu"))
    order, shuffled = list(functions), random.Random(0)
    found: dict[str, list[float]] = {name: [] for name in functions}
    stop = time.perf_counter() + seconds
    for done in range(MAX_ROUNDS):
        if done >= MIN_ROUNDS and time.perf_counter() > stop:
            break
        shuffled.shuffle(order)
        for name in order:
            found[name].append(clock(functions[name]))
    return Times(found)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread, whose CPU time does not depend on what else the machine does."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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


def resident(field: str) -> int:
    """Bytes of this process: VmRSS (now) or VmHWM (the peak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def restart_peak() -> None:
    """VmHWM begins anew at the present resident memory."""
    Path("/proc/self/clear_refs").write_text("5")


def in_use(device: torch.device) -> int:
    """Bytes in use now: of the process, or of its tensors on a GPU."""
    gc.collect()
    return resident("VmRSS") if device.type == "cpu" else torch.cuda.memory_allocated()


def peak_of(call: Callable[[], object], device: torch.device) -> int:
    """Bytes at the peak of a call, beyond those in use before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    before = resident("VmRSS")
    restart_peak()
    call()
    return resident("VmHWM") - before


@contextmanager
def malloc_settings(settings: str) -> Iterator[None]:
    """Processes that are started meanwhile have these settings of glibc's malloc."""
    saved = os.environ.get("GLIBC_TUNABLES")
    os.environ["GLIBC_TUNABLES"] = settings
    try:
        yield
    finally:
        if saved is None:
            del os.environ["GLIBC_TUNABLES"]
        else:
            os.environ["GLIBC_TUNABLES"] = saved


def in_fresh_process(function: Callable[..., Any], *arguments: object, malloc: str = RETURN_AT_ONCE) -> Any:
    """function(*arguments) in a new process with these malloc settings; its exceptions are raised here."""
    with malloc_settings(malloc):
        # Ctrl-C reaches this process too: it ends silently, and the parent says what was kept
        quietly = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_DFL)}
        with ProcessPoolExecutor(1, mp_context=get_context("spawn"), **quietly) as pool:
            return pool.submit(function, *arguments).result()


def profile_call(
    title: str, call: Callable[[], object], least_bytes: int, device: torch.device, dtype: torch.dtype,
    trace: Path, smoke: bool, console: Console,
) -> None:  # fmt: skip
    """Prints the operators that take the time and how near the call is to the machine's limits; writes a trace.

    `least_bytes` are the bytes that the call must at least move.
    """
    call()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(1 if smoke else PROFILE_STEPS):
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
    trace.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(trace))
    console.print(_top_operators(profiler, device.type == "cuda", title))
    console.print(_against_the_limits(call, device, dtype, least_bytes, 0.1 if smoke else 3.0))


def _top_operators(profiler: profile, on_gpu: bool, title: str) -> Table:
    """The operators (on a GPU the kernels) by the time spent in themselves."""
    field = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: getattr(event, field), reverse=True)
    total = sum(getattr(event, field) for event in events) or 1
    table = Table("kernel" if on_gpu else "operator", "ms", "share", "calls", title=title, box=None)
    for event in events[:PROFILE_LINES]:
        own = getattr(event, field)
        table.add_row(event.key[:80], f"{own / 1e3:.2f}", f"{100 * own / total:.1f} %", str(event.count))
    return table


def _against_the_limits(
    call: Callable[[], object], device: torch.device, dtype: torch.dtype, least_bytes: int, seconds: float
) -> Table:
    """The call's arithmetic and bytes per second beside the machine's, measured in the same rounds."""
    with FlopCounterMode(display=False) as counter:
        call()
    flops = counter.get_total_flops()
    peak = peak_arithmetic(dtype) if device.type == "cpu" else None
    arithmetic, its_flops = peak or matrix_product(dtype, device)
    moved = 512 << 20
    if device.type == "cuda":
        transfer = device_copy(moved, device)
    else:
        transfer = plain_read(torch.ones(moved, dtype=torch.uint8))
    times = measure({"call": call, "limit": arithmetic, "transfer": transfer}, seconds, Clock(device))
    taken = times.median("call")
    table = Table("", "achieved", "the machine's", "share", title="against the machine's limits", box=None)
    for name, rate, limit in (
        ("TFLOP/s", flops / taken / 1e12, its_flops / times.median("limit") / 1e12),
        ("GB/s at least", least_bytes / taken / 1e9, moved / times.median("transfer") / 1e9),
    ):
        table.add_row(name, f"{rate:.3g}", f"{limit:.3g}", f"{100 * rate / limit:.0f} %")
    return table

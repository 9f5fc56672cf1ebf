"""The CPU backend against torch's own attention, on this machine.

    python -m bench.cpu [--only forward|backward|decode] [--seconds 6] [--threads 2] [--json FILE]

The floor is plain causal SDPA without prompts, which does less than is asked for. The rival that does the same is
SDPA(tokens) + act(gate) * SDPA(prompts); its temporaries cost page faults under glibc's default malloc and fewer
under a tuned one, so its forward is measured under both. Figures are medians over interleaved rounds of ratios
within a round, through the public functions; bars are goals. A kernel that fails its check against the float64
reference gets no figure, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from zinit_kernels import zero_init_attention, zero_init_attention_with_kvcache
from zinit_kernels.backends import extension
from zinit_kernels.testing import CacheCase, Case, check_cache_case, check_case

from .interleave import measure
from .probes import machine, matrix_product, plain_read
from .providers import sdpa_twice

PROMPTS = 10
DTYPES = (torch.float32, torch.bfloat16)
TUNED_MALLOC = "glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=8589934592"

# Goals by float32 and bfloat16; ratios of times unless said otherwise.
FORWARD_BAR = {128: (0.55, 0.50), 512: (0.55, 0.50), 2048: (0.80, 0.80)}
BACKWARD_BAR = {128: (0.85, 0.18), 512: (0.58, 0.10), 2048: (0.75, 0.13)}
RATE_BAR = (0.75, 0.80)  # of torch.mm's rate, at 512 tokens and more
PROMPT_BAR = {128: 1.12, 512: 1.05, 2048: 1.05}
DECODE_BAR = {"MHA": (1.7, 8.0), "32/8": (3.5, 28.0)}
READ_BAR = {"MHA": (1.3, 1.4), "32/8": (1.8, 2.0)}
DECODE_PROMPT_BAR = 1.06


@dataclass(frozen=True)
class Shape:
    """T queries and as many keys, or one query and S keys where decoding."""

    batch: int
    heads_q: int
    heads_kv: int
    seqlen: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.batch},{self.heads_q}/{self.heads_kv},{self.seqlen},{self.head_dim}"

    @property
    def heads(self) -> str:
        return "MHA" if self.heads_q == self.heads_kv else f"{self.heads_q}/{self.heads_kv}"


@dataclass
class Row:
    """One figure; bar None: for information."""

    stage: str
    what: str
    dtype: str
    shape: str
    figure: float | None  # None: the kernel failed its check
    bar: float | None = None
    at_least: bool = False
    milliseconds: float | None = None  # of the fused call
    rounds: int = 0

    def verdict(self) -> str:
        if self.figure is None:
            return "wrong result"
        if self.bar is None:
            return ""
        excess = self.bar / self.figure if self.at_least else self.figure / self.bar
        return "met" if excess <= 1 else f"missed by {100 * (excess - 1):.0f} %"


PREFILL_SHAPES = [
    Shape(batch, heads_q, heads_kv, seqlen, head_dim)
    for seqlen in (128, 512, 2048)
    for batch, heads_q, heads_kv, head_dim in (
        (1, 32, 32, 128),
        (1, 32, 8, 128),
        (1 if seqlen == 2048 else 4, 8, 8, 64),
    )
]
DECODE_SHAPES = [Shape(1, 32, heads_kv, seqlen, 128) for heads_kv in (32, 8) for seqlen in (512, 2048, 8192)]


def random_inputs(shape: Shape, dtype: torch.dtype, queries: int) -> list[Tensor]:
    """query, key, value, prompt_key, prompt_value, gate"""
    torch.manual_seed(0)
    table = (1, shape.heads_kv, PROMPTS, shape.head_dim)
    cache = (shape.batch, shape.heads_kv, shape.seqlen, shape.head_dim)
    shapes = ((shape.batch, shape.heads_q, queries, shape.head_dim), cache, cache, table, table)
    return [torch.randn(s).to(dtype) for s in shapes] + [torch.randn(shape.heads_q) + 0.3]


def with_gradients(function: Callable[..., Tensor], tensors: list[Tensor]) -> Callable[[], object]:
    """Forward, then the gradients of all tensors."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    grad_out = torch.randn_like(function(*leaves))
    return lambda: torch.autograd.grad(function(*leaves), leaves, grad_out)


def prefill_functions(shape: Shape, dtype: torch.dtype, backward: bool) -> dict[str, Callable[[], object]]:
    tensors = random_inputs(shape, dtype, shape.seqlen)
    fused = partial(zero_init_attention, is_causal=True, backend="cpu")
    plain = partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=shape.heads != "MHA")
    twice = partial(sdpa_twice, is_causal=True)
    calls = {"fused": (fused, 6), "no prompt": (fused, 3), "plain": (plain, 3), "twice": (twice, 6)}
    if backward:
        return {name: with_gradients(f, tensors[:n]) for name, (f, n) in calls.items() if name != "no prompt"}
    return {name: partial(f, *tensors[:n]) for name, (f, n) in calls.items()}


def forward_flops(shape: Shape) -> float:
    """The useful ones of a causal forward: two products over the visible keys and the prompts."""
    keys = shape.seqlen * (shape.seqlen + 1) / 2 + shape.seqlen * PROMPTS
    return 4.0 * shape.batch * shape.heads_q * shape.head_dim * keys


def small_case(shape: Shape) -> Case:
    """A sibling that the reference can afford in float64."""
    group = shape.heads_q // shape.heads_kv
    return Case(
        str(shape),
        heads_q=2 * group,
        heads_kv=2,
        seqlens_q=(min(shape.seqlen, 261),),
        head_dim=shape.head_dim,
    )


def prefill_rows(stage: str, shape: Shape, dtype: torch.dtype, seconds: float) -> Iterator[Row]:
    backward, column, seqlen = stage == "backward", DTYPES.index(dtype), shape.seqlen
    row = partial(Row, stage, dtype=str(dtype).removeprefix("torch."), shape=str(shape))
    title = "forward + backward / plain SDPA" if backward else "forward / plain SDPA"
    bar = (BACKWARD_BAR if backward else FORWARD_BAR)[seqlen][column]
    try:
        check_case(small_case(shape), dtype, "cpu", backward=backward)
    except AssertionError:
        yield row(what=title, figure=None, bar=bar)
        return
    product, product_flops = matrix_product()
    times = measure({**prefill_functions(shape, dtype, backward), "mm": product}, seconds)
    row = partial(row, milliseconds=1e3 * times.median("fused"), rounds=times.rounds)
    yield row(what=title, figure=times.ratio("fused", "plain"), bar=bar)
    yield row(what="SDPA twice + add / fused", figure=times.ratio("twice", "fused"))
    if backward:
        return
    rate = times.ratio("mm", "fused") * forward_flops(shape) / product_flops
    yield row(
        what="rate / torch.mm's", figure=rate, bar=RATE_BAR[column] if seqlen >= 512 else None, at_least=True
    )
    yield row(what="prompt on / off", figure=times.ratio("fused", "no prompt"), bar=PROMPT_BAR[seqlen])


def decode_functions(shape: Shape, tensors: list[Tensor]) -> dict[str, Callable[[], object]]:
    """key and value as [B, Hkv, S, D] with any strides."""
    query, key, value, prompt_key, prompt_value, gate = tensors
    decode = partial(
        zero_init_attention_with_kvcache,
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        cache_seqlens=torch.full((shape.batch,), shape.seqlen, dtype=torch.int32),
        backend="cpu",
    )
    prompts = {"prompt_k": prompt_key.transpose(1, 2), "prompt_v": prompt_value.transpose(1, 2), "gate": gate}
    return {
        "fused": partial(decode, **prompts),
        "no prompt": partial(decode, prompt_k=None, prompt_v=None, gate=None),
        "twice": partial(sdpa_twice, *tensors, is_causal=False),
    }


def decode_rows(shape: Shape, dtype: torch.dtype, seconds: float, token_major: bool) -> Iterator[Row]:
    layout = "[B, S, H, D]" if token_major else "[B, H, S, D]"
    row = partial(Row, "decode", dtype=str(dtype).removeprefix("torch."), shape=f"{shape} {layout}")
    column, bar = DTYPES.index(dtype), DECODE_BAR[shape.heads]
    group = shape.heads_q // shape.heads_kv
    small = CacheCase(
        "sibling", heads_q=2 * group, heads_kv=2, head_dim=shape.head_dim, head_major=not token_major
    )
    try:
        check_cache_case(small, dtype, "cpu")
    except AssertionError:
        yield row(what="SDPA twice + add / decode", figure=None, bar=bar[column], at_least=True)
        return
    tensors = random_inputs(shape, dtype, 1)
    stored = [t.transpose(1, 2).contiguous() if token_major else t for t in tensors[1:3]]
    tensors[1:3] = [t.transpose(1, 2) for t in stored] if token_major else stored
    times = measure({**decode_functions(shape, tensors), "read": plain_read(*stored)}, seconds)
    row = partial(row, milliseconds=1e3 * times.median("fused"), rounds=times.rounds)
    yield row(
        what="SDPA twice + add / decode", figure=times.ratio("twice", "fused"), bar=bar[column], at_least=True
    )
    read_bar = READ_BAR[shape.heads][column] if shape.seqlen >= 8192 else None
    yield row(what="decode / plain read", figure=times.ratio("fused", "read"), bar=read_bar)
    prompt_bar = DECODE_PROMPT_BAR if shape.seqlen >= 2048 else None
    yield row(what="prompt on / off", figure=times.ratio("fused", "no prompt"), bar=prompt_bar)


def jobs(stages: list[str], seconds: float) -> list[tuple[str, Callable[[], Iterator[Row]]]]:
    found: list[tuple[str, Callable[[], Iterator[Row]]]] = []
    for stage in stages:
        for dtype in DTYPES:
            for shape in DECODE_SHAPES if stage == "decode" else PREFILL_SHAPES:
                title = f"{stage} {str(dtype).removeprefix('torch.')} {shape}"
                if stage == "decode":
                    found += [
                        (title, partial(decode_rows, shape, dtype, seconds, major)) for major in (False, True)
                    ]
                else:
                    found.append((title, partial(prefill_rows, stage, shape, dtype, seconds)))
    return found


def run(stages: list[str], seconds: float, console: Console) -> list[Row]:
    rows: list[Row] = []
    with Progress(console=console, transient=True) as progress:
        todo = jobs(stages, seconds)
        task = progress.add_task("", total=len(todo))
        for title, job in todo:
            progress.update(task, description=title)
            rows += job()
            progress.advance(task)
    return rows


def rerun_with_tuned_malloc(seconds: float, threads: int) -> list[Row]:
    """The forward rows of the rival, by a process of its own: malloc reads its settings at the start."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "bench.cpu", "--only", "forward", "--default-malloc-only"]
        command += ["--seconds", str(seconds), "--threads", str(threads), "--json", str(report)]
        environment = {**os.environ, "GLIBC_TUNABLES": TUNED_MALLOC}
        subprocess.run(command, env=environment, check=False, stdout=subprocess.DEVNULL)
        rows = [Row(**row) for row in json.loads(report.read_text())["rows"]]
    rival = [row for row in rows if row.what == "SDPA twice + add / fused"]
    for row in rival:
        row.what += ", tuned malloc"
    return rival


def table_of(rows: list[Row]) -> Table:
    table = Table(
        "stage", "figure", "dtype", "B,Hq/Hkv,T,D", "fused ms", "rounds", "measured", "bar", "", box=None
    )
    for row in rows:
        bar = "" if row.bar is None else f"{'>=' if row.at_least else '<='} {row.bar:g}"
        measured = "-" if row.figure is None else f"{row.figure:.2f}"
        milliseconds = "" if row.milliseconds is None else f"{row.milliseconds:.2f}"
        cells = (
            row.stage,
            row.what,
            row.dtype,
            row.shape,
            milliseconds,
            str(row.rounds),
            measured,
            bar,
            row.verdict(),
        )
        table.add_row(*cells)
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--only", choices=("forward", "backward", "decode"), help="one stage instead of all three"
    )
    parser.add_argument("--seconds", type=float, default=6.0, help="of rounds per shape (default 6)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    parser.add_argument("--json", type=Path, help="also write machine and rows to this file")
    parser.add_argument(
        "--default-malloc-only", action="store_true", help="do not measure the rival's tuned malloc"
    )
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 140)
    if reason := extension.why_unavailable("cpu"):
        console.print(f"bench.cpu needs the cpu backend: {reason}", style="red")
        return 2
    torch.set_num_threads(options.threads)
    stages = [options.only] if options.only else ["forward", "backward", "decode"]
    rows = run(stages, options.seconds, console)
    if "forward" in stages and not options.default_malloc_only:
        rows += rerun_with_tuned_malloc(options.seconds, options.threads)
    console.print(table_of(rows))
    facts = machine()
    console.print(", ".join(f"{name} {fact}" for name, fact in facts.items()))
    judged = [row for row in rows if row.bar is not None]
    console.print(f"{sum(row.verdict() == 'met' for row in judged)} of {len(judged)} bars met")
    if options.json:
        options.json.write_text(
            json.dumps({"machine": facts, "rows": [asdict(row) for row in rows]}, indent=1)
        )
    return 1 if any(row.figure is None for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())

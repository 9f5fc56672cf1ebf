"""Where the time of a training step or of decoding goes: a chrome trace, the top kernels, and the roofline.

    python -m bench profile train --out out/profile
    python -m bench profile generate

Open the trace at https://ui.perfetto.dev. docs/profiling.md has the commands for nsys and ncu.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from .clock import Clock
from .contenders import CONTENDERS, OURS, random_base
from .interleave import measure
from .probes import matrix_product, plain_read
from .suites import generate as generate_suite
from .suites import train as train_suite

TOP = 15
STEPS = 3


def call_of(
    what: str, device: torch.device, dtype: torch.dtype, smoke: bool
) -> tuple[str, Callable[[], object], int]:
    """(title, what is profiled, bytes it must at least move)"""
    if what == "train":
        base = train_suite.SMOKE if smoke else train_suite.BASES[device.type][0]
        model = random_base(base.config, dtype, device)
        weights = sum(w.nbytes for w in model.state_dict().values())
        contender = next(c for c in CONTENDERS if c.name == OURS)
        _, step = train_suite.training_step(contender, model, base)
        # forward and backward each read every frozen weight once
        return f"{OURS}, {base.name}, {base.batch} x {base.seqlen} tokens", step, 2 * weights
    made = generate_suite.SMOKE if smoke else generate_suite.BASES[device.type]
    model = random_base(made.config, dtype, device)
    adapted, _ = generate_suite.zinit_adapted(model)
    prompts = torch.randint(3, made.config.vocab_size, (1, made.prompt), device=device)
    streamed = made.new * generate_suite.bytes_per_token(model, 1, made.prompt + made.new // 2)
    title = f"{made.name}, {made.prompt} + {made.new} tokens"
    return title, lambda: adapted(prompts, made.new), streamed


def run(
    what: str, device: torch.device, dtype: torch.dtype, out: Path, smoke: bool, console: Console
) -> Path:
    """Profiles, prints the tables, writes the trace; its path."""
    title, call, least_bytes = call_of(what, device, dtype, smoke)
    call()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(1 if smoke else STEPS):
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
    out.mkdir(parents=True, exist_ok=True)
    trace = out / f"{what}.json"
    profiler.export_chrome_trace(str(trace))
    console.print(kernels(profiler, device.type == "cuda", title))
    console.print(against_the_roof(call, device, dtype, least_bytes, 0.1 if smoke else 3.0))
    console.print(f"wrote {trace}: open it at https://ui.perfetto.dev", highlight=False, soft_wrap=True)
    return trace


def kernels(profiler: profile, on_device: bool, title: str) -> Table:
    """The operators, or on a GPU the kernels, that take most of the time by themselves."""
    field = "self_device_time_total" if on_device else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: getattr(event, field), reverse=True)
    total = sum(getattr(event, field) for event in events) or 1
    table = Table("kernel" if on_device else "operator", "ms", "share", "calls", title=title, box=None)
    for event in events[:TOP]:
        own = getattr(event, field)
        table.add_row(event.key[:80], f"{own / 1e3:.2f}", f"{100 * own / total:.1f} %", str(event.count))
    return table


def against_the_roof(
    call: Callable[[], object], device: torch.device, dtype: torch.dtype, least_bytes: int, seconds: float
) -> Table:
    """Arithmetic and bytes per second beside what torch.mm and a plain copy reach in the same rounds."""
    with FlopCounterMode(display=False) as counter:
        call()
    flops = counter.get_total_flops()
    product, product_flops = matrix_product(dtype, device)
    source = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = (lambda: target.copy_(source)) if device.type == "cuda" else plain_read(source)
    copied = source.nbytes * (2 if device.type == "cuda" else 1)
    times = measure({"call": call, "product": product, "copy": copy}, seconds, Clock(device))
    taken = times.median("call")
    table = Table("", "achieved", "the machine's", "share", title="against the roof", box=None)
    for name, rate, limit in (
        ("TFLOP/s", flops / taken / 1e12, product_flops / times.median("product") / 1e12),
        ("GB/s at least", least_bytes / taken / 1e9, copied / times.median("copy") / 1e9),
    ):
        table.add_row(name, f"{rate:.3g}", f"{limit:.3g}", f"{100 * rate / limit:.0f} %")
    return table


def main(command_line: list[str], console: Console) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench profile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=("train", "generate"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32"
    )
    parser.add_argument("--out", type=Path, default=Path("out/profile"), help="folder of the trace")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, one step")
    arguments = parser.parse_args(command_line)
    device = torch.device(arguments.device)
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    run(arguments.what, device, dtype, arguments.out, arguments.smoke, console)
    return 0

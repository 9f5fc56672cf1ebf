"""python -m zinit_kernels.check: what this machine has, which backends it can run, and whether they are right.

Each usable backend runs a small forward, backward and decode on each device, judged against the float64 reference by
the rule of `zinit_kernels.testing`. The exit code is 0 if all that could run was right, else 1.

--gpu runs instead the trials that backend="auto" asks for on NVIDIA GPUs, whatever is known already, and keeps the
verdicts: later programs then start without them. Triton compiles its kernels meanwhile, which may take a minute.
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from . import __version__, dispatch, explain, proof
from .backends import extension, few_rows, fused
from .console import InputError, Parser, is_out_of_memory, run
from .testing import CacheCase, Case, check_cache_case, check_case, make_cache_arguments, make_inputs

CASE = Case("check", seqlens_q=(65,), heads_q=4, heads_kv=2, head_dim=64)
CACHE_CASE = CacheCase("check", heads_q=8, heads_kv=2, seqlens=(0, 37, 100), page_size=16, rotary_dim=32)
DTYPES = (torch.float32, torch.bfloat16)
# what --gpu tries unless it is told otherwise: what most models have; other calls are tried when they come
DTYPE_NAMES = ("bfloat16", "float16", "float32")
HEAD_DIMS = (64, 128)


def devices() -> list[str]:
    return ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]


def describe(device: str) -> str:
    if device == "cpu":
        return f"cpu      {platform.machine()}, {torch.get_num_threads()} threads"
    properties = torch.cuda.get_device_properties(device)
    return (
        f"{device}   {properties.name}, sm_{properties.major}{properties.minor}, "
        f"{properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} multiprocessors"
    )


def versions() -> str:
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return (
        f"zinit_kernels {__version__}, torch {torch.__version__} ({cuda}), Python {platform.python_version()}"
    )


Stage = tuple[str, str, Callable[[], None]]  # what is run, why it cannot be, how


def attention_stage(backend: str, device: str, dtype: torch.dtype) -> Stage:
    call = make_inputs(CASE, dtype, device=device).canonical()
    if not (reason := dispatch.why_not(backend, call, False)):
        return "forward and backward", "", lambda: check_case(CASE, dtype, backend, device=device)
    with torch.no_grad():  # a backend may have no backward
        reason_forward = dispatch.why_not(backend, call, False)
    stage = "forward and backward" if reason_forward else "forward"
    return stage, reason if reason_forward else "", lambda: check_forward(backend, device, dtype)


@torch.no_grad()
def check_forward(backend: str, device: str, dtype: torch.dtype) -> None:
    check_case(CASE, dtype, backend, backward=False, device=device)


def cache_stage(backend: str, device: str, dtype: torch.dtype) -> Stage:
    reason = explain(**make_cache_arguments(CACHE_CASE, dtype, device=device))[backend]
    said = "" if reason == "usable" else reason
    return "decode", said, lambda: check_cache_case(CACHE_CASE, dtype, backend, device=device)


def results(backend: str, device: str) -> Iterator[tuple[str, str]]:
    """(what was run, "right", or why it is not or cannot be); a reason that all dtypes share is said once."""
    for stage_of in (attention_stage, cache_stage):
        said = None
        for dtype in DTYPES:
            stage, reason, run = stage_of(backend, device, dtype)
            if reason and reason == said:
                continue
            if reason:
                said = reason
                yield stage, f"not usable: {reason}"
                continue
            try:
                run()
            except Exception as error:
                if is_out_of_memory(error):  # which says nothing of the backend
                    raise
                yield f"{stage}, {dtype}", f"WRONG: {type(error).__name__}: {error}"
            else:
                yield f"{stage}, {dtype}", "right"


def gpus() -> list[torch.device]:
    """One NVIDIA GPU of each kind: those of one kind share their verdicts."""
    kinds = {
        tuple(proof.store_of(torch.device("cuda", i)).facts.items()): torch.device("cuda", i)
        for i in reversed(range(torch.cuda.device_count()))
    }
    return list(reversed(kinds.values()))


def why_not_tried(subject: proof.Subject, device: torch.device) -> str:
    """The reason why a backend cannot run what its family is tried on; '' if it can."""
    if subject.family == proof.FEW_ROWS:
        return few_rows.why_not(device, subject.dtype)
    for call in proof.calls(subject, device):
        with torch.no_grad():
            if reason := dispatch.why_not(subject.backend, call, True):
                return reason
    return ""


def trials(
    device: torch.device, dtypes: Sequence[torch.dtype], head_dims: Sequence[int]
) -> Iterator[tuple[str, str]]:
    """(family, dtype and head dimension; "right" and the seconds that it took, or why not) of each trial."""
    for families in proof.FAMILIES.values():
        for family in families:
            said = None
            for dtype in dtypes:
                for head_dim in (None,) if family == proof.FEW_ROWS else head_dims:
                    subject = proof.Subject(family, dtype, head_dim)
                    if reason := why_not_tried(subject, device):
                        if reason != said:
                            yield str(subject), f"not usable: {reason}"
                        said = reason
                        continue
                    began = time.monotonic()
                    verdict = proof.prove(subject, device)
                    if verdict is None:
                        yield str(subject), "not tried: not enough memory on the device"
                    elif verdict.passed:
                        yield str(subject), f"right, {time.monotonic() - began:.1f} s"
                    else:
                        yield str(subject), f"WRONG: {verdict.said}"


def check_gpus(dtypes: Sequence[torch.dtype], head_dims: Sequence[int]) -> int:
    """The trials on one GPU of each kind; the exit status."""
    if not gpus():
        raise InputError(
            f"--gpu needs an NVIDIA GPU that torch can use; torch {torch.__version__} finds none "
            "(torch.cuda.is_available() is False). Without --gpu, the CPU is checked"
        )
    wrong = 0
    for device in gpus():
        kept = proof.store_of(device)
        print(f"\n{device}")
        for name, fact in kept.facts.items():
            print(f"  {name:<16} {fact}")
        for what, verdict in trials(device, dtypes, head_dims):
            wrong += verdict.startswith("WRONG")
            print(f"  {what:<44} {verdict}", flush=True)
        print(f"  kept in {kept.path}" if kept.is_kept() else f"  not kept: {kept.path} cannot be written")
    print(f"\n{wrong} wrong" if wrong else "\nall that could run was right")
    return 1 if wrong else 0


def forget() -> int:
    """Removes all that was kept of trials and times; the exit status."""
    removed = proof.forget_all()
    print(
        f"removed {removed} files of verdicts from {proof.folder()}" if removed else "no verdicts were kept"
    )
    return 0


def main(arguments: Sequence[str] = ()) -> int:
    """The program; the exit status."""
    parser = Parser.of_module("zinit_kernels.check", __doc__)
    parser.add_argument(
        "--gpu", action="store_true", help="try the kernels of NVIDIA GPUs, and keep the verdicts"
    )
    parser.add_argument(
        "--forget",
        action="store_true",
        help="remove the verdicts, and the times of zinit tune, that were kept",
    )
    parser.add_argument(
        "--head-dim",
        type=int,
        nargs="+",
        metavar="D",
        help=f"for --gpu (default: {' '.join(map(str, HEAD_DIMS))})",
    )
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPE_NAMES, help=f"for --gpu (default: {' '.join(DTYPE_NAMES[:2])})"
    )
    options = parser.parse_args(arguments)
    if not options.gpu and (options.head_dim or options.dtype):
        raise InputError("--head-dim and --dtype choose what --gpu tries: add --gpu")
    if options.forget and options.gpu:
        raise InputError("--forget and --gpu: run one after the other")
    if bad := [d for d in options.head_dim or () if not 1 <= d <= fused.MAX_HEAD_DIM]:
        raise InputError(f"--head-dim must be 1 to {fused.MAX_HEAD_DIM}, got {bad[0]}")
    if options.forget:
        return forget()
    print(versions())
    if options.gpu:
        dtypes = [getattr(torch, name) for name in options.dtype or DTYPE_NAMES[:2]]
        return check_gpus(dtypes, options.head_dim or HEAD_DIMS)
    print(extension.describe())
    wrong = 0
    for device in devices():
        print(f"\n{describe(device)}")
        for backend in dispatch.BACKENDS:
            for what, verdict in results(backend, device):
                wrong += verdict.startswith("WRONG")
                print(f"  {backend:<10} {what:<38} {verdict}")
    print(f"\n{wrong} wrong" if wrong else "\nall that could run was right")
    return 1 if wrong else 0


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))

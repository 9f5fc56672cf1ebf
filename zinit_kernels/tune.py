"""python -m zinit_kernels.tune: times the backends on an NVIDIA GPU, so that backend="auto" takes the fastest there.

For each class of shapes (short, medium and long sequences, forward and training; one, a few and many new tokens against
a short and a long cache) it times every backend that can run it, each by one call of the public function. A family of
kernels must have passed its trial on this chip, which is run here if it was not yet. The times are kept beside the
verdicts. auto then asks the fastest backend of the class first, if it is faster by 5 %. What belongs to no class keeps
the written order. `zinit check --forget` removes the times.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from . import dispatch, proof, zero_init_attention, zero_init_attention_with_kvcache
from .arguments import from_cache, from_sdpa
from .call import AnyCall, CacheCall, Call
from .check import DTYPE_NAMES, HEAD_DIMS, gpus, versions
from .console import InputError, Parser, is_out_of_memory, run
from .proof import ShapeClass, chip

_CANONICAL: dict[str, Callable[..., AnyCall]] = {
    "forward": from_sdpa,
    "training": from_sdpa,
    "cache": from_cache,
}
_FORM: dict[str, type] = {stage: CacheCall if stage == "cache" else Call for stage in _CANONICAL}


def call_of(shape_class: ShapeClass, given: dict[str, Any]) -> AnyCall:
    """The call that the public function makes of its arguments."""
    canonical = _CANONICAL[shape_class.stage]
    absent = dict.fromkeys(inspect.signature(canonical).parameters)
    if shape_class.stage == "cache":
        given = given | {"num_splits": 0}
    return canonical(**absent | {"gate_activation": "tanh"} | given)


def make_one_call(shape_class: ShapeClass, given: dict[str, Any], backend: str) -> None:
    """The public function, and for training its gradients."""
    if shape_class.stage == "cache":
        zero_init_attention_with_kvcache(**given, backend=backend)
        return
    out = zero_init_attention(**given, backend=backend)
    if shape_class.stage == "training":
        inputs = [tensor for tensor in given.values() if isinstance(tensor, torch.Tensor)]
        torch.autograd.grad(out, inputs, torch.ones_like(out))


def times(shape_class: ShapeClass, device: torch.device) -> Iterator[tuple[str, float | str]]:
    """(backend, its milliseconds or the reason why it has none) of the backends that auto may take."""
    given = proof.timed_arguments(shape_class, device)
    call = call_of(shape_class, given)
    form = _FORM[shape_class.stage]
    for backend in (*dispatch.CUDA_ORDER[form], *dispatch.IF_FASTER[form]):
        if backend == "reference":  # no calls take it that others can run
            continue
        if reason := dispatch.why_not(backend, call, False) or proof.why_not(backend, call):
            yield backend, reason
            continue
        try:
            yield (
                backend,
                chip.milliseconds(device, lambda name=backend: make_one_call(shape_class, given, name)),  # type: ignore[misc]
            )
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            yield backend, "not enough memory on the device"


def tune(device: torch.device, dtypes: Sequence[torch.dtype], head_dims: Sequence[int]) -> None:
    """Times all classes on a device, keeps the times, and prints them."""
    for dtype in dtypes:
        for head_dim in head_dims:
            for shape_class in proof.classes(dtype, head_dim):
                found = dict(times(shape_class, device))
                measured = {name: time for name, time in found.items() if isinstance(time, float)}
                if measured:
                    proof.keep_times(shape_class.key, device, measured)
                form = _FORM[shape_class.stage]
                order = proof.fastest_first(measured, dispatch.CUDA_ORDER[form], dispatch.IF_FASTER[form])
                listed = ", ".join(
                    f"{name} {time:.4g} ms" if isinstance(time, float) else f"{name}: {time}"
                    for name, time in found.items()
                )
                first = next((name for name in order if name in measured), "none")
                print(f"  {shape_class.key:<44} {first:<9} ({listed})", flush=True)


def main(arguments: Sequence[str] = ()) -> int:
    """The program; the exit status."""
    parser = Parser.of_module("zinit_kernels.tune", __doc__)
    parser.add_argument(
        "--head-dim", type=int, nargs="+", metavar="D", help=f"(default: {' '.join(map(str, HEAD_DIMS))})"
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPE_NAMES, help="(default: bfloat16)")
    options = parser.parse_args(arguments)
    if bad := [d for d in options.head_dim or () if not 1 <= d <= proof.MAX_HEAD_DIM]:
        raise InputError(f"--head-dim must be 1 to {proof.MAX_HEAD_DIM}, got {bad[0]}")
    if proof.MODE == "0":
        raise InputError(
            "ZINIT_PROOF=0 turns off the trials that a kernel must pass before it is timed: unset it"
        )
    if not (devices := gpus()):
        raise InputError(
            f"zinit tune needs an NVIDIA GPU that torch can use; torch {torch.__version__} finds none "
            "(torch.cuda.is_available() is False). On a CPU there is nothing to choose"
        )
    print(versions())
    for device in devices:
        kept = proof.store_of(device)
        print(f"\n{device}, {kept.facts.get('chip', '')}")
        try:
            tune(
                device,
                [getattr(torch, n) for n in options.dtype or ("bfloat16",)],
                options.head_dim or HEAD_DIMS,
            )
        except proof.Busy:
            raise InputError(
                "another process has tried kernels of this chip for two minutes: try again"
            ) from None
        print(f"  kept in {kept.path}" if kept.is_kept() else f"  not kept: {kept.path} cannot be written")
    return 0


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))

"""Launches that are kept: a call like an earlier one goes to its compiled kernels without Triton's binder.

Describing a call and binding the arguments of its kernels takes most of the host's time: 70 of a forward's 136 us,
where SDPA takes 7. Both follow from what `key_of` names, so the first call of a key is recorded: what it allocated, and
which kernels it launched with which arguments. The next one allocates the same, puts the addresses of its own tensors
in, and launches.

What a key names: stage and device; of each tensor dtype, shape, strides, and whether its address is a multiple of 16,
for which Triton compiles other code; which tensors have one address; and all numbers. A call is not kept where Triton
would do more than launch: hooks, profilers, `ZINIT_AUTOTUNE`, the interpreter, and versions of Triton whose launcher
was not looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from . import ranges, tuning

MOST = 1024  # keys; training on many lengths would collect them without end
VERSIONS = ((3, 6), (3, 7), (3, 9))  # of Triton: they launch a kernel by the same call
_KNOWN = tuple(int(n) for n in triton.__version__.split(".")[:2]) in VERSIONS
_plans: dict[tuple[Any, ...], Plan | None] = {}  # None: such a call cannot be kept


class Recorder:
    """What a stage allocates and launches, in order. inputs: the tensors of the call, None where one is absent."""

    def __init__(self, inputs: Sequence[Tensor | None]) -> None:
        self.inputs = inputs
        self.made: list[Tensor] = []
        self.zeroed: set[int] = set()
        self.kernels: list[Any] = []
        self.steps: list[
            tuple[Any, ...]
        ] = []  # (compiled kernel, programs, arguments), or (source, target) of a sum

    def _note(self, tensor: Tensor) -> Tensor:
        self.made.append(tensor)
        return tensor

    def empty(self, like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        return self._note(like.new_empty(shape, dtype=dtype or like.dtype))

    def token_major_like(self, tensor: Tensor) -> Tensor:
        """[B, H, T, D] stored as [B, T, H, D]."""
        batch, heads, seqlen, head_dim = tensor.shape
        return self._note(tensor.new_empty((batch, seqlen, heads, head_dim)).transpose(1, 2))

    def zeros_like(self, tensor: Tensor) -> Tensor:
        self.zeroed.add(len(self.made))
        return self._note(torch.zeros_like(tensor, memory_format=torch.contiguous_format))

    def launch(self, kernel: Any, programs: int, arguments: dict[str, Any], options: dict[str, Any]) -> None:
        compiled = kernel[(programs,)](**arguments, **options)
        self.kernels.append(kernel)
        self.steps.append((compiled, programs, tuple(arguments.values())))

    def add_up(self, source: Tensor, target: Tensor) -> None:
        """Sums [B, H, parts] over the sequences and the parts."""
        torch.sum(source, (0, 2), out=target)
        self.steps.append((source, target))

    def plan(self, results: Sequence[Tensor | None]) -> Plan | None:
        """The same again; None where a kernel took a tensor that is neither an input nor made here."""
        slots: dict[int, int] = {}
        for slot, tensor in enumerate((*self.inputs, *self.made)):
            if tensor is not None:
                slots.setdefault(tensor.data_ptr(), slot)
        try:
            return Plan(self, slots, results)
        except KeyError:
            return None


class Plan:
    """What a recorded call does, for tensors at other addresses."""

    def __init__(self, recorder: Recorder, slots: dict[int, int], results: Sequence[Tensor | None]) -> None:
        self.kernels = recorder.kernels
        made = {id(tensor): number for number, tensor in enumerate(recorder.made)}
        self.made = [
            (tuple(t.shape), t.stride(), t.dtype, number in recorder.zeroed)
            for number, t in enumerate(recorder.made)
        ]
        self.results = [None if tensor is None else made[id(tensor)] for tensor in results]
        self.steps: list[tuple[Any, ...]] = []
        for step in recorder.steps:
            if len(step) == 2:
                self.steps.append(tuple(made[id(tensor)] for tensor in step))
                continue
            compiled, programs, arguments = step
            if compiled is None:
                raise KeyError("nothing was compiled")
            self.steps.append((compiled, programs, _builder(arguments, slots)))

    def has_hooks(self) -> bool:
        """Whether somebody wants to be told before one of the kernels runs."""
        return any(kernel.pre_run_hooks for kernel in self.kernels)

    def run(self, query: Tensor, addresses: list[int]) -> tuple[Tensor, ...]:
        device = query.device
        made = []
        for shape, stride, dtype, is_zero in self.made:
            tensor = torch.empty_strided(shape, stride, dtype=dtype, device=device)
            made.append(tensor.zero_() if is_zero else tensor)
        addresses.extend([tensor.data_ptr() for tensor in made])
        stream = current_stream(device.index)
        for step in self.steps:
            if len(step) == 2:
                torch.sum(made[step[0]], (0, 2), out=made[step[1]])
                continue
            kernel, programs, build = step
            kernel.run(
                programs,
                1,
                1,
                stream,
                kernel.function,
                kernel.packed_metadata,
                None,
                None,
                None,
                *build(addresses),
            )
        return tuple(
            torch.empty(0, dtype=torch.float32, device=device) if slot is None else made[slot]
            for slot in self.results
        )


def _builder(arguments: tuple[Any, ...], slots: dict[int, int]) -> Callable[[list[int]], tuple[Any, ...]]:
    """A function of the addresses that returns a kernel's arguments: one expression, with the others as constants."""
    constants: dict[str, Any] = {}

    def text(value: Any) -> str:
        if isinstance(value, Tensor):
            return f"a[{slots[value.data_ptr()]}]"
        if isinstance(value, tuple):
            return f"({', '.join(text(one) for one in value)},)"
        name = f"c{len(constants)}"
        constants[name] = value
        return name

    parts = ", ".join(text(value) for value in arguments)
    return eval(f"lambda a: ({parts},)", constants)


def current_stream(index: int) -> int:
    return torch._C._cuda_getCurrentRawStream(index)


def is_current(index: int) -> bool:
    return torch._C._cuda_getDevice() == index


def _may_be_kept(query: Tensor) -> bool:
    """Whether this call would be launched by Triton without anything beside it, on the device that is current."""
    if (
        not (_KNOWN and query.is_cuda)
        or tuning.ENABLED
        or ranges.is_profiled()
        or not is_current(query.device.index)
    ):
        return False
    runtime = triton.knobs.runtime
    hooks = runtime.launch_enter_hook, runtime.launch_exit_hook
    if any(hook is not None and getattr(hook, "calls", True) for hook in hooks) or runtime.debug:
        return False
    return getattr(runtime, "add_stages_inspection_hook", None) is None


def key_of(stage: str, arguments: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[int]]:
    """(what a stage's launches follow from, the addresses of its tensors, 0 for what is no tensor)."""
    key: list[Any] = [stage]
    addresses = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            address = argument.data_ptr()
            addresses.append(address)
            key += (argument.dtype, argument.shape, argument.stride(), address % 16 == 0)
        else:
            addresses.append(0)
            # 1, 1.0 and True are equal, but not to a compiler
            key.append(argument if argument is None else (type(argument), argument))
    present = [address for address in addresses if address]
    if len(set(present)) < len(present):
        key.append(tuple(addresses.index(address) for address in addresses))
    return tuple(key), addresses


def run(
    stage: str,
    query: Tensor,
    arguments: tuple[Any, ...],
    describe: Callable[..., Sequence[Tensor | None]],
) -> tuple[Tensor, ...]:
    """The results of a stage, by its kept launches or by `describe(recorder, *arguments)`.

    `describe` allocates and launches by way of the recorder alone; a result of None comes back without elements.
    """
    key: tuple[Any, ...] | None = None
    if _may_be_kept(query):
        key, addresses = key_of(stage, arguments)
        key += (query.device.index,)
        plan = _plans.get(key)
        if plan is not None and not plan.has_hooks():
            return plan.run(query, addresses)
        if key in _plans:
            key = None
    recorder = Recorder([a if isinstance(a, Tensor) else None for a in arguments])
    results = describe(recorder, *arguments)
    if key is not None:
        if len(_plans) >= MOST:
            _plans.clear()
        _plans[key] = recorder.plan(results)
    return tuple(
        query.new_empty((0,), dtype=torch.float32) if tensor is None else tensor for tensor in results
    )

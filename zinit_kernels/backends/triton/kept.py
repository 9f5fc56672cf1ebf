"""Launches that are kept: a call like an earlier one goes to its compiled kernels without Triton's binder.

Describing a call and binding the arguments of its kernels takes most of the host's time: 70 of a forward's 136 us,
where SDPA takes 7. Both follow from the call's key (`call_keys.py`), so the first call of a key is recorded: what it
allocated, and which kernels it launched with which arguments. From the record a function is made that allocates the
same, puts the addresses of its own tensors in, and launches. It holds no tensor.

A call is not kept where Triton would do more than launch: hooks, profilers, `ZINIT_AUTOTUNE`, the interpreter, and
versions of Triton whose launcher was not looked at.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ...call import CACHE_CALL, CALL, SAVED
from ...call_keys import Key, is_plain_state, key_function
from . import ranges, tuning
from .launcher import IS_KNOWN, allocator, call_of

MOST = 1024  # keys; training on many lengths would collect them without end
_ALIGNMENT = (
    64  # elements of float32: pieces of one allocation start at multiples of 256 bytes, as allocations do
)
_KNOWN = IS_KNOWN
_plans: dict[Key, Plan | None] = {}  # None: such a call cannot be kept
key_of: dict[str, Callable[..., tuple[Key, list[int]] | None]] = {
    "forward": key_function((*CALL.specs,), CALL.optional, (*CALL.numbers,), False),
    "backward": key_function(
        (*SAVED.specs, *CALL.specs), SAVED.optional | CALL.optional, (*CALL.numbers, "needs"), False
    ),
    "decode": key_function((*CACHE_CALL.specs,), CACHE_CALL.optional, (*CACHE_CALL.numbers,), False),
}


class Recorder:
    """What a stage allocates and launches, in order. inputs: the tensors of the call, None where one is absent."""

    def __init__(self, inputs: Sequence[Tensor | None]) -> None:
        self.inputs = inputs
        self.made: list[Tensor] = []
        self.zeroed: set[int] = set()
        self.pieces: list[tuple[Tensor, int]] = []  # (a part of an allocation, the allocation's number)
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
        return self.empty_like(tensor).zero_()

    def empty_like(self, tensor: Tensor) -> Tensor:
        return self._note(torch.empty_like(tensor, memory_format=torch.contiguous_format))

    def scratch(self, like: Tensor, shapes: Sequence[Sequence[int] | None]) -> list[Tensor | None]:
        """A float32 tensor of each shape, None for None, all in one allocation: each would cost the host 1 us."""
        size = sum(_rounded(shape) for shape in shapes if shape is not None)
        if not size:
            return [None] * len(shapes)
        return self._pieces_of(self.empty(like, (size,), torch.float32), shapes)

    def scratch_in(
        self, result: Tensor | None, shapes: Sequence[Sequence[int] | None]
    ) -> list[Tensor | None] | None:
        """`scratch` in the memory of a result that no kernel has written yet; None where it is too small."""
        size = sum(_rounded(shape) for shape in shapes if shape is not None)
        if result is None or 4 * size > result.numel() * result.element_size():
            return None
        return self._pieces_of(result, shapes)

    def _pieces_of(self, memory: Tensor, shapes: Sequence[Sequence[int] | None]) -> list[Tensor | None]:
        (number,) = (i for i, tensor in enumerate(self.made) if tensor is memory)
        storage, first = memory.untyped_storage(), memory.storage_offset() * memory.element_size() // 4
        found: list[Tensor | None] = []
        for shape in shapes:
            piece = None
            if shape is not None:
                piece = memory.new_empty((0,), dtype=torch.float32)
                piece.set_(storage, first, tuple(shape), _contiguous_strides(shape))
                self.pieces.append((piece, number))
                first += _rounded(shape)
            found.append(piece)
        return found

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
        try:
            return Plan(self, results)
        except KeyError:
            return None


def _rounded(shape: Sequence[int]) -> int:
    elements = 1
    for size in shape:
        elements *= size
    return -(-elements // _ALIGNMENT) * _ALIGNMENT


def _contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return tuple(reversed(strides[: len(shape)]))


class Plan:
    """What a recorded call does, for tensors at other addresses.

    run: (addresses of the inputs) -> results; a result that is not wanted has no elements.
    """

    def __init__(self, recorder: Recorder, results: Sequence[Tensor | None]) -> None:
        self.kernels = recorder.kernels
        self._names: dict[str, Any] = {"current_stream": current_stream, "total": torch.sum}
        self._lines: list[str] = []
        where: dict[int, str] = {}  # address -> the source of an address
        for slot, tensor in enumerate(recorder.inputs):
            if tensor is not None:
                where.setdefault(tensor.data_ptr(), f"a[{slot}]")
        device = next(tensor.device for tensor in recorder.inputs if tensor is not None)
        self._names["empty"] = allocator(device)
        made = {id(tensor): f"m{number}" for number, tensor in enumerate(recorder.made)}
        self._made = [(tuple(tensor.shape), tensor.stride()) for tensor in recorder.made]
        self._zeroed = recorder.zeroed
        for number, tensor in enumerate(recorder.made):
            self._names[f"d{number}"] = tensor.dtype
            where.setdefault(tensor.data_ptr(), f"p{number}")
        for piece, number in recorder.pieces:
            offset = piece.data_ptr() - recorder.made[number].data_ptr()
            where.setdefault(piece.data_ptr(), f"p{number} + {offset}")
            if piece.dtype == recorder.made[number].dtype:  # else kernels alone take it, by its address
                at = offset // piece.element_size()
                made[id(piece)] = f"m{number}.as_strided({tuple(piece.shape)}, {piece.stride()}, {at})"
        self._lines.append(f" stream = current_stream({device.index})")
        for number, step in enumerate(recorder.steps):
            if len(step) == 2:
                source, target = (made[id(tensor)] for tensor in step)
                self._lines.append(f" total({source}, (0, 2), out={target})")
                continue
            compiled, programs, arguments = step
            if compiled is None:
                raise KeyError("nothing was compiled")
            text = self._source(arguments, where, f"k{number}_")
            self._lines.append(" " + call_of(compiled, programs, text, self._names, f"k{number}_"))
        self._names["none"] = torch.float32
        self._results = [None if t is None else made[id(t)] for t in results]
        self._absent = "empty((0,), (1,), none)"
        self._run: Callable[[list[int]], tuple[Any, ...]] | None = None

    def _source_of_run(self) -> str:
        """The function `run`, as Python."""
        lines = ["def run(a):"]
        for number, (shape, strides) in enumerate(self._made):
            lines.append(f" m{number} = empty({shape}, {strides}, d{number})")
            if number in self._zeroed:
                lines.append(f" m{number}.zero_()")
            lines.append(f" p{number} = m{number}.data_ptr()")
        lines += self._lines
        results = "".join(f"{name or self._absent}, " for name in self._results)
        lines.append(f" return ({results})")
        return "\n".join(lines)

    def for_public_tensors(self, without_rows: Collection[int]) -> Plan:
        """The same launches; a result that is not wanted is None, and those named lack their first dimension of 1.

        The operator takes a prompt table of one row with that dimension, and the public function without it.
        """
        plan = copy.copy(self)
        plan._run, plan._absent, plan._names = None, "None", dict(self._names)
        plan._made = list(self._made)
        for place in without_rows:
            if (name := self._results[place]) is not None:
                shape, strides = plan._made[int(name[1:])]
                plan._made[int(name[1:])] = shape[1:], strides[1:]
        return plan

    def _source(self, arguments: tuple[Any, ...], where: dict[int, str], prefix: str) -> str:
        """The source of a kernel's arguments: addresses, and all other values as constants."""

        def text(value: Any) -> str:
            if isinstance(value, Tensor):
                return where[value.data_ptr()]
            if isinstance(value, tuple):
                return f"({', '.join(text(one) for one in value)},)"
            if value is None or type(value) in (int, bool):
                return repr(value)
            name = f"{prefix}{len(self._names)}"
            self._names[name] = value
            return name

        return ", ".join(text(value) for value in arguments)

    def has_hooks(self) -> bool:
        """Whether somebody wants to be told before one of the kernels runs."""
        return any(kernel.pre_run_hooks for kernel in self.kernels)

    def run(self, addresses: list[int]) -> tuple[Any, ...]:
        if self._run is None:  # made at the second call: 0.5 ms, and many lengths come once
            exec(self._source_of_run(), self._names)
            self._run = self._names["run"]
        return self._run(addresses)


def current_stream(index: int) -> int:
    return torch._C._cuda_getCurrentRawStream(index)


def is_current(index: int) -> bool:
    return torch._C._cuda_getDevice() == index


def may_be_kept(query: Tensor) -> bool:
    """Whether this call would be launched by Triton without anything beside it, on the device that is current."""
    if (
        not (_KNOWN and query.is_cuda)
        or tuning.ENABLED
        or ranges.is_profiled()
        or not is_current(query.get_device())
    ):
        return False
    runtime = triton.knobs.runtime
    if runtime.debug or _wants_calls(runtime.launch_enter_hook) or _wants_calls(runtime.launch_exit_hook):
        return False
    return getattr(runtime, "add_stages_inspection_hook", None) is None


def _wants_calls(hook: Any) -> bool:
    """Whether a launch hook of Triton is there: a function, or in later versions a chain with functions in it."""
    return hook is not None and bool(getattr(hook, "calls", True))


def run(
    stage: str,
    query: Tensor,
    arguments: tuple[Any, ...],
    describe: Callable[..., Sequence[Tensor | None]],
) -> tuple[Tensor, ...]:
    """The results of a stage, by its kept launches or by `describe(recorder, *arguments)`.

    `describe` allocates and launches by way of the recorder alone; a result of None comes back without elements.
    """
    key: Key | None = None
    if may_be_kept(query) and (found := key_of[stage](*arguments)):
        key, addresses = (stage, *found[0]), found[1]
        plan = _plans.get(key)
        if plan is not None and not plan.has_hooks():
            return plan.run(addresses)
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


def plan_of(stage: str, arguments: tuple[Any, ...]) -> Plan | None:
    """What is kept of a stage's call; None where nothing is."""
    found = key_of[stage](*arguments)
    return None if found is None else _plans.get((stage, *found[0]))


def direct(stage: str, query: Tensor, arguments: tuple[Any, ...]) -> tuple[Tensor, ...] | None:
    """The results of a kept call without torch's dispatcher, which takes 15 us; None where it has to be asked."""
    if not (_plans and is_plain_state() and may_be_kept(query)):
        return None
    found = key_of[stage](*arguments)
    plan = None if found is None else _plans.get((stage, *found[0]))
    if found is None or plan is None or plan.has_hooks():
        return None
    return plan.run(found[1])

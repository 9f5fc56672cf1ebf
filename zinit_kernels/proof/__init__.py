"""Proof at first use: `backend="auto"` takes a family of GPU kernels once it was right on this chip.

No GPU was at hand when the kernels were written. So each chip tries a family before it is used: small calls against the
float64 reference, at the family's first eager call or by `zinit check --gpu`. The verdict is kept in the user's cache
folder. It holds for the chip, driver, libraries and kernels that it names. A family that was wrong is left out, with
one warning. A backend that the caller names is never asked for a proof.

`zinit tune` times the backends for classes of shapes on the chip and keeps the times beside the verdicts. auto then
asks the fastest one first (`ordered`).

ZINIT_PROOF=0: no trial is run and no verdict is read, so auto leaves these families out. ZINIT_PROOF=force: families
are tried again, whatever is kept.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
import threading
import time
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from ..backends.fused import MAX_HEAD_DIM
from ..call import AnyCall
from ..values import has_values
from . import calls as small_calls
from . import chip, store
from .families import FAMILIES, FEW_ROWS, Subject, needed
from .shape_classes import ShapeClass, class_of, classes, timed_arguments
from .store import Busy, Store, Verdict, folder

__all__ = [
    "FAMILIES",
    "FEW_ROWS",
    "MAX_HEAD_DIM",
    "Busy",
    "ShapeClass",
    "Subject",
    "Verdict",
    "class_of",
    "classes",
    "folder",
    "timed_arguments",
]
MODES = ("1", "0", "force")
MODE = os.environ.get("ZINIT_PROOF") or "1"
LEAST_GAIN = 0.05  # of the time: a backend that is faster by less stays behind the written order
MOST_ATTEMPTS = 2  # trials that did not end, before a family counts as one that kills its process
SECONDS_TO_RETRY = 30.0  # after a trial that proved nothing
_PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep
_REPORT = "Please report this with the output of `zinit check --gpu`"

_lock = threading.RLock()
_stores: dict[str, Store] = {}  # device -> its store
_answers: dict[tuple[str, Subject], str] = {}  # what this process will not ask again; '' = taken
_taken: set[tuple[Any, ...]] = set()  # what a call is made of, where all its families were taken
_retry_at: dict[tuple[str, Subject], float] = {}
_warned: set[str] = set()
_is_forked = False
generation = 0  # another number whenever `why_not` may say something else than before


def why_not(backend: str, call: AnyCall) -> str:
    """The reason why auto leaves a backend out for want of a proof; '' where it takes it. May run the trial."""
    if backend not in FAMILIES:
        return ""
    query = call.query
    families = needed(backend, call)
    if torch.compiler.is_compiling():
        return _read_while_compiling(families, str(query.device), str(query.dtype), query.shape[-1])
    known = (families, query.device, query.dtype, query.shape[-1])
    if known in _taken:
        return ""
    for family in families:
        subject = Subject(family, query.dtype, query.shape[-1])
        if reason := _answers.get((str(query.device), subject)):
            return reason
        if reason := _answer(
            subject, query.device, "" if has_values(query) else "the tensors hold no values"
        ):
            return reason
    _taken.add(known)
    return ""


def why_not_few_rows(device: torch.device, dtype: torch.dtype) -> str:
    """`why_not` of the linear layers of a decoding step, which no call of attention asks for."""
    return _answer(Subject(FEW_ROWS, dtype, None), device)


def is_settled(backend: str, call: AnyCall) -> bool:
    """Whether the reason of `why_not` to leave a backend out holds until there is a new verdict."""
    subjects = () if MODE == "0" else _subjects(backend, call)
    return not subjects or any(_answers.get((str(call.query.device), subject)) for subject in subjects)


def _subjects(backend: str, call: AnyCall) -> tuple[Subject, ...]:
    """What has to be proven of a backend for a call: each family that it takes. () where none needs a proof."""
    query = call.query
    return tuple(Subject(family, query.dtype, query.shape[-1]) for family in needed(backend, call))


def _is_off() -> bool:
    """Whether nothing is tried; raises for a ZINIT_PROOF that means nothing."""
    _check_mode()
    return MODE == "0"


def describe(backend: str, call: AnyCall) -> str:
    """What is known of the families that a call takes of a backend, for `explain`; '' where none needs a proof."""
    subjects = _subjects(backend, call)
    if subjects and _is_off():
        return "not tried: ZINIT_PROOF=0"
    said = []
    for subject in subjects:
        family = subject.family
        with _lock:
            kept = _store_of(call.query.device)
            verdict = kept.verdicts.get(subject.key)
            reason = _answers.get((str(call.query.device), subject))
        where = f"on {kept.facts.get('chip', call.query.device)}"
        if verdict is not None:
            passed = "proven" if verdict.passed else "failed its trial"
            said.append(
                f"{family} {passed} {where}, {verdict.date}{'' if verdict.passed else ': ' + verdict.said}"
            )
        else:
            said.append(f"{family} {reason or 'not tried yet ' + where + ': the first call tries it'}")
    return "; ".join(said)


def ordered(call: AnyCall, written: tuple[str, ...], if_faster: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The backends in the order that auto asks them for a call: the written one, but the fastest first.

    Only where `zinit tune` has timed the call's class on this chip. torch.compile keeps the written order.
    """
    if MODE == "0" or torch.compiler.is_compiling():
        return written
    return fastest_first(_times_of(call), written, if_faster)


def fastest_first(
    milliseconds: Mapping[str, float], written: tuple[str, ...], if_faster: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """The backends by their times, those without one behind; the written order where little would be gained.

    if_faster: backends that are asked only where they are faster than the first of the written order that has a time.
    """
    timed = [name for name in written if name in milliseconds]
    if not timed:
        return written
    bound = (1.0 - LEAST_GAIN) * milliseconds[timed[0]]
    faster = [name for name in if_faster if milliseconds.get(name, bound + 1.0) <= bound]
    ranked = sorted((*timed, *faster), key=milliseconds.__getitem__)
    if milliseconds[ranked[0]] > bound:
        return written
    return (*ranked, *(name for name in written if name not in milliseconds))


def describe_time(backend: str, call: AnyCall) -> str:
    """What `zinit tune` has measured of a backend for calls like this one, for `explain`; '' where nothing is kept."""
    milliseconds = {} if MODE == "0" else _times_of(call)
    return f"{milliseconds[backend]:.3g} ms in zinit tune" if backend in milliseconds else ""


def keep_times(shape_class: str, device: torch.device, milliseconds: Mapping[str, float]) -> None:
    """Keeps what was measured of a class, under its key; calls from now on follow it. Raises `store.Busy`."""
    with _lock:
        _store_of(device).keep_times(shape_class, milliseconds)
        _forget_taken()


def times_of(shape_class: str, device: torch.device) -> Mapping[str, float]:
    """Backend -> milliseconds, of a class by its key; empty where nothing was measured."""
    with _lock:
        return _store_of(device).times.get(shape_class, {})


def _times_of(call: AnyCall) -> Mapping[str, float]:
    """Backend -> milliseconds, for the call's class on its chip."""
    if not has_values(call.query):  # fake tensors may be on a device that is not there
        return {}
    with _lock:
        times = _store_of(call.query.device).times
    if not times or (shape_class := class_of(call)) is None:
        return {}
    return times.get(shape_class.key, {})


def known_why_not(backend: str, call: AnyCall) -> str:
    """`why_not` by what is known, without a trial: '' also for a family that was not tried yet."""
    subjects = _subjects(backend, call)
    if not subjects or _is_off():
        return "ZINIT_PROOF=0" if subjects else ""
    with _lock:
        kept = _store_of(call.query.device)
        for subject in subjects:
            verdict = kept.verdicts.get(subject.key)
            if verdict is not None and not verdict.passed:
                return verdict.said
            if reason := _answers.get((str(call.query.device), subject)):
                return reason
    return ""


def prove(subject: Subject, device: torch.device) -> Verdict | None:
    """Tries a family now, whatever is kept, and keeps the verdict. None: nothing was proven, for want of memory.

    Raises RuntimeError where the trial has broken the CUDA context of this process, and `store.Busy`.
    """
    with _lock:
        kept = _store_of(device)
        with kept.locked():
            verdict = _tried(subject, device, kept)
    _answers.pop((str(device), subject), None)
    _forget_taken()
    return verdict


def calls(subject: Subject, device: torch.device) -> list[AnyCall]:
    """What a family is tried on, on a device; none for `FEW_ROWS`, which takes no calls."""
    from . import trial

    if subject.head_dim is None:
        return []
    made = small_calls.calls(subject.family, subject.dtype, subject.head_dim, 0)
    return [trial.converted(call, None, device) for call in made]


def forget_all() -> int:
    """Removes the files of all chips and installations; how many there were."""
    with _lock:
        _stores.clear()
        _answers.clear()
        _forget_taken()
        return store.remove_all()


def _forget_taken() -> None:
    global generation
    generation += 1
    _taken.clear()


def store_of(device: torch.device) -> Store:
    """The verdicts of a device's chip."""
    with _lock:
        return _store_of(device)


def _check_mode() -> None:
    if MODE not in MODES:
        raise ValueError(f"ZINIT_PROOF must be one of {', '.join(MODES)}, got {MODE!r}")


def _store_of(device: torch.device) -> Store:
    """Devices of one kind share a store; the file is read once."""
    name = str(device)
    if name not in _stores:
        found = Store(chip.facts(device))
        same = (other for other in _stores.values() if other.facts == found.facts)
        _stores[name] = next(same, found)
    return _stores[name]


def _answer(subject: Subject, device: torch.device, why_not_now: str = "") -> str:
    """The reason why a family is left out, '' where it is taken; after a trial where there was none.

    why_not_now: why no trial can be run at this call.
    """
    _check_mode()
    if MODE == "0":
        return "ZINIT_PROOF=0: it is not tried on this chip"
    key = (str(device), subject)
    with _lock:
        if key in _answers:
            return _answers[key]
        kept = _store_of(device)
        verdict = None if MODE == "force" else kept.verdicts.get(subject.key)
        if verdict is None:
            if reason := why_not_now or _why_not_now(subject, device):
                return f"{subject.family} is not proven on this chip yet, and not tried now: {reason}"
            try:
                with kept.locked():
                    # another process may have tried it while this one waited
                    verdict = None if MODE == "force" else kept.verdicts.get(subject.key)
                    verdict = verdict or _tried(subject, device, kept)
            except store.Busy:
                verdict = None
        if verdict is None:
            _retry_at[key] = time.monotonic() + SECONDS_TO_RETRY
            return f"the trial of {subject.family} proved nothing; it is tried again later"
        _forget_taken()
        if verdict.passed:
            _answers[key] = ""
        else:
            _answers[key] = f"{subject.family} failed its trial on this chip: {verdict.said}"
            _warn(
                f"zinit_kernels: the kernels {subject} failed their trial on {kept.facts.get('chip', device)} "
                f"({verdict.date}): {verdict.said}. backend='auto' leaves them out and takes PyTorch's "
                f"{_instead(subject)} where nothing else is proven. {_REPORT}; ZINIT_PROOF=force tries them again"
            )
        return _answers[key]


def _why_not_now(subject: Subject, device: torch.device) -> str:
    """Why this is no moment for a trial; '' if it is one."""
    if _is_forked:
        return "this process was forked; run `zinit check --gpu` before"
    if _retry_at.get((str(device), subject), 0.0) > time.monotonic():
        return "a trial a few seconds ago proved nothing"
    if chip.is_capturing(device):
        _warn(
            f"zinit_kernels: a CUDA graph is captured, and {subject} was not tried on this chip yet: the graph holds "
            f"PyTorch's {_instead(subject)}. Make the call once before the capture, or run `zinit check --gpu`"
        )
        return "a CUDA graph is being captured; make the call once before the capture"
    return ""


def _instead(subject: Subject) -> str:
    return "linear layers" if subject.family == FEW_ROWS else "attention"


def _read_while_compiling(families: tuple[str, ...], device: str, dtype: str, head_dim: int) -> str:
    """`why_not` for torch.compile: reads what is kept, and never runs a trial. The graph keeps the answer."""
    return read(families, device, dtype, head_dim)


# what torch.compiler.assume_constant_result does; that imports dynamo, which takes seconds
_read_while_compiling._dynamo_marked_constant = True  # type: ignore[attr-defined]


def read(families: tuple[str, ...], device: str, dtype: str, head_dim: int) -> str:
    """`why_not` of families by what is known, without a trial."""
    kind = getattr(torch, dtype.removeprefix("torch."))
    where = torch.device(device)
    for family in families:
        subject = Subject(family, kind, head_dim)
        if reason := _answer(subject, where, "torch.compile is tracing; make the call once before"):
            _warn(
                f"zinit_kernels: torch.compile takes PyTorch's attention, since {reason}; or run `zinit check --gpu`"
            )
            return reason
    return ""


def _tried(subject: Subject, device: torch.device, kept: Store) -> Verdict | None:
    """The verdict of a trial in a thread of its own; None where memory was short.

    A new thread has torch's defaults for all that belongs to threads: autocast, grad mode, inference mode, dispatch
    modes, hooks on saved tensors, the current stream.
    """
    if kept.begin(subject.key) >= MOST_ATTEMPTS and MODE != "force":
        verdict = Verdict(False, "two processes did not survive its trial", _today())
        kept.end(subject.key, verdict)
        return verdict
    raised: list[BaseException] = []
    thread = threading.Thread(target=_run, args=(subject, device, raised), name="zinit proof", daemon=True)
    thread.start()
    thread.join()
    error = raised[0] if raised else None
    if error is None:
        verdict = Verdict(True, "", _today())
        kept.end(subject.key, verdict)
        return verdict
    if isinstance(error, torch.OutOfMemoryError):
        kept.end(subject.key, None)
        return None
    verdict = Verdict(False, _told(error), _today())
    if isinstance(error, AssertionError):
        kept.end(subject.key, verdict)
        return verdict
    try:
        chip.synchronize(device)
    except Exception as broken:
        kept.end(subject.key, verdict)
        raise RuntimeError(
            f"the trial of {subject} broke this process's CUDA context ({verdict.said}). Start the program again: "
            f"the verdict is kept, and backend='auto' will leave these kernels out. {_REPORT}"
        ) from broken
    kept.end(
        subject.key, None
    )  # a missing compiler, an older driver: the next process may have what this one lacks
    return verdict


def _run(subject: Subject, device: torch.device, raised: list[BaseException]) -> None:
    from . import trial  # the reference and the rule, which only a trial needs

    try:
        chip.make_current(device)
        trial.run(subject, device)
    except BaseException as error:  # handed to the thread that waits
        raised.append(error)


def _told(error: BaseException) -> str:
    """An exception in a few lines: a compiler quotes the source first, and says at the end what is wrong."""
    words = " ".join(str(error).split())
    text = f"{type(error).__name__}: {words if len(words) <= 400 else f'{words[:150]} ... {words[-250:]}'}"
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return text if cause is error else f"{text} (because of {repr(cause)[-250:]})"


def _today() -> str:
    return datetime.date.today().isoformat()


def _warn(text: str) -> None:
    """Once a process."""
    if text not in _warned:
        _warned.add(text)
        level, frame = 1, sys._getframe()
        while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
            level, frame = level + 1, frame.f_back
        warnings.warn(text, RuntimeWarning, stacklevel=level)  # of the line that calls this package


def _after_fork() -> None:
    """A forked child cannot use its parent's CUDA context, and the thread that holds the lock may not exist there."""
    global _is_forked, _lock
    _is_forked = True
    _lock = threading.RLock()


with contextlib.suppress(AttributeError):  # where there is no fork
    os.register_at_fork(after_in_child=_after_fork)

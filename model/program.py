"""What the programs share: they run in one process, and end in a sentence where memory ends."""

from __future__ import annotations

import functools
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, current_thread, main_thread
from types import FrameType

from zinit_kernels.console import is_out_of_memory, silence

from .errors import UserError

_ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# How launchers tell a process how many there are, and which one it is
_LAUNCHERS = {
    "WORLD_SIZE": "RANK",  # torchrun, accelerate, deepspeed
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
    "MV2_COMM_WORLD_SIZE": "MV2_COMM_WORLD_RANK",  # MVAPICH's mpirun
    "JSM_NAMESPACE_SIZE": "JSM_NAMESPACE_RANK",  # jsrun
    "PMI_SIZE": "PMI_RANK",
    "SLURM_STEP_NUM_TASKS": "SLURM_PROCID",  # srun
}
_AMOUNT = re.compile(r"(?:tried to allocate|needs) ([\d.]+ ?[kmgt]?i?b(?:ytes)?)", re.IGNORECASE)
# What torch's gloo and NCCL say where a process has gone
_LOST = re.compile(r"connection (closed|reset) by peer|gloo/transport|broken pipe|NCCL", re.IGNORECASE)
_WAIT = 5.0  # seconds that the other processes give the first one to say why all end


def program(advice: str, several: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorates a program's main. advice: what the user can change where there is not enough memory. several: torchrun
    may start many processes of it, of which the first speaks.
    """

    def decorate(main: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(main)
        def run(arguments: list[str] | None = None) -> None:
            if not (several and _is_of_torchrun()):
                refuse_several_processes(several)
            try:
                _as_one_of_many(main, arguments)
            except (MemoryError, RuntimeError) as error:
                if _LOST.search(str(error)):
                    raise UserError(
                        "another process of this run has ended: --resume goes on from the last checkpoint, which "
                        "torchrun --max-restarts and --auto-resume do by themselves"
                    ) from error
                if not is_out_of_memory(error):
                    raise
                amount = _AMOUNT.search(str(error))
                wanted = f" ({_size(amount[1])} more were asked for)" if amount else ""
                raise UserError(f"there is not enough memory{wanted}: {advice}.") from error

        return run

    return decorate


def _is_of_torchrun() -> bool:
    numbers = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    return "MASTER_ADDR" in os.environ and all(map(str.isdecimal, numbers))


def _as_one_of_many(main: Callable[..., None], arguments: list[str] | None) -> None:
    """Runs main. All processes of torchrun but the first are silent, and a fault that all of them have is said once:
    the others wait for the first one, because torchrun ends all as soon as one has ended.
    """
    rank = int(os.environ.get("RANK", 0)) if _is_of_torchrun() else 0
    if rank == 0:
        main(arguments)
        return
    silence(True)
    try:
        main(arguments)
    except (UserError, OSError, SystemExit) as error:
        if isinstance(error, SystemExit) and error.code != 2:
            raise
        signal.signal(signal.SIGTERM, lambda *_: os._exit(2))
        time.sleep(_WAIT)
        silence(False)  # the first process has no such fault
        raise UserError(f"process {rank}: {error}") from error
    finally:
        silence(False)


def _size(amount: str) -> str:
    """An amount of memory as an error has it; a number of bytes is made readable."""
    number, _, unit = amount.partition(" ")
    if unit != "bytes" or int(number) < 1 << 20:
        return amount
    return f"{int(number) / (1 << 20):,.0f} MiB"


def refuse_several_processes(torchrun: bool = False) -> None:
    """Ends all processes of a launcher with status 2, the first one with a sentence. torchrun: it could start them.

    Each would do the whole work, and write into the same folder. The others wait for the first one, because launchers
    kill all processes as soon as one has ended.
    """
    for size, rank in _LAUNCHERS.items():
        count = os.environ.get(size, "")
        if not count.isdecimal() or int(count) < 2:
            continue
        if os.environ.get(rank, "0") == "0":
            if torchrun:
                raise UserError(
                    f"this was started as {count} processes ({size}={count}) without what torchrun tells them: start "
                    f"them by torchrun (docs/scaling.md), or unset {size} for one process, which uses all cores"
                )
            raise UserError(
                f"this was started as {count} processes ({size}={count}) and runs in one: start it without the "
                f"launcher (torchrun, srun, ...), or unset {size}; one process uses all cores of the machine"
            )
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))
        time.sleep(_WAIT)
        sys.exit(2)


@contextmanager
def interruptible(*numbers: signal.Signals) -> Iterator[Event]:
    """An event that the first of these signals sets: unless told Ctrl-C, SIGTERM, or SIGHUP when the terminal goes. A
    second one ends the program as usual. What is ignored stays so: SIGHUP under nohup, Ctrl-C in the background of a
    shell script.

    Only the main thread can take signals; in another one the event is never set.
    """
    event = Event()
    taken = (numbers or _ENDINGS) if current_thread() is main_thread() else ()
    handlers = {number: signal.getsignal(number) for number in taken}
    previous = {n: handler for n, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}

    def ask(number: int, frame: FrameType | None) -> None:
        event.set()
        restore()

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    for number in previous:
        signal.signal(number, ask)
    try:
        yield event
    finally:
        restore()

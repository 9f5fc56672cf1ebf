"""The emulator itself: what works computes the plain result, what is wrong is reported and where."""

import pytest

SCHEDULES = ("forward", "reverse", "random1", "random2")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["mma", "shuffles", "barriers", "shared_poison", "divider", "byte_perm"])
def test_computes_what_a_gpu_would(emulator, monkeypatch, name, schedule):
    monkeypatch.setenv("SIMT_SCHEDULE", schedule)
    emulator.selftest(name)


ERRORS = {
    "two_barriers": r"divergent barrier: here .*selftest.cu:\d+, thread \d+ at .*selftest.cu:\d+",
    "shuffle_with_exited_lane": r"names lanes that have exited|exits while lanes wait for it at __shfl_xor_sync",
    "shuffle_from_outside_the_mask": r"lane 0 reads lane 20, which is not in mask 0000ffff",
    "call_from_outside_the_mask": r"calling lane \d+ is not in mask 0000ffff",
    "diverged_warp": r"diverged warp: lane \d+ at \w+ mask ffffffff .*others at \w+",
    "wait_for_each_other": r"(?s)deadlock:.*waits at __syncthreads.*thread 40 waits at __syncwarp",
    "exit_while_awaited": r"names lanes that have exited|exits while lanes wait for it at __syncwarp",
    "too_many_threads": r"2048 threads per block",
    "without_a_wait": r"64 of 128 threads waited for the launch before",
    "bad_grid": r"bad grid \(1, 65536, 1\)",
    "too_much_shared": r"65536 bytes of shared memory, 49152 allowed",
    "too_much_asked_for": r"300000 bytes of shared memory asked for",
    "no_shared": r"uses shared memory, it was launched with 0 bytes \[block \(0, 0, 0\) thread 0\]",
    "misaligned": r"16-byte load from 0x\w+, which is misaligned",
}


@pytest.mark.parametrize("schedule", ["forward", "reverse"])
@pytest.mark.parametrize("name", ERRORS)
def test_reports(emulator, monkeypatch, name, schedule):
    monkeypatch.setenv("SIMT_SCHEDULE", schedule)
    with pytest.raises(RuntimeError, match=ERRORS[name]):
        emulator.selftest(name)
    emulator.selftest("barriers")  # the next launch is none the worse


def test_an_unknown_schedule_is_an_error(emulator, monkeypatch):
    monkeypatch.setenv("SIMT_SCHEDULE", "sideways")
    with pytest.raises(
        RuntimeError, match="SIMT_SCHEDULE must be forward, reverse or random<seed>, got sideways"
    ):
        emulator.selftest("barriers")

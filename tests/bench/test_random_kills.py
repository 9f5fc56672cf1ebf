"""What compares a disturbed run with an undisturbed one finds every difference but that of times."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from bench import random_kills


def write_run(folder, losses, adapter=b"adapter", seconds=1.0):
    folder.mkdir()
    entries = [{"step": step, "loss": loss, "seconds": seconds} for step, loss in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    (folder / "adapter.safetensors").write_bytes(adapter)
    return folder


@pytest.mark.parametrize(
    ("losses", "adapter", "said"),
    [
        ([3.0, 2.0], b"adapter", ""),
        ([3.0, 2.0000001], b"adapter", "metrics.jsonl says"),
        ([3.0], b"adapter", "1 entries in metrics.jsonl, not 2"),
        ([3.0, 2.0], b"adapteR", "the adapters differ"),
    ],
)
def test_every_difference_is_found(tmp_path, losses, adapter, said):
    whole = write_run(tmp_path / "whole", [3.0, 2.0])
    ours = write_run(tmp_path / "ours", losses, adapter, seconds=2.0)
    found = random_kills.difference(ours, whole)
    assert found.startswith(said) and bool(found) == bool(said)


LAUNCHER = """
import os, subprocess, sys, time
child = [sys.executable, "-c", "import time; time.sleep(60)"]
killed = 0
while killed < 3:
    workers = [subprocess.Popen(child, env=os.environ | {"RANK": str(rank)}) for rank in range(2)]
    while all(worker.poll() is None for worker in workers):
        time.sleep(0.01)
    killed += 1
    open(sys.argv[1], "a").write("a step")
    for worker in workers:
        worker.kill()
        worker.wait()
"""


def test_a_worker_is_killed_again_and_again_until_the_run_is_over(tmp_path):
    """A launcher that starts two workers anew, three times."""
    metrics = tmp_path / "metrics.jsonl"
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, metrics])
    killed = random_kills.disturb(launcher, metrics, 0.1, time.monotonic() + 600, random.Random(1))
    # a slow launcher may lose both workers before it starts them anew
    assert 3 <= len(killed) <= 6, killed
    assert set(killed) <= {0, 1}


def test_a_run_that_fails_is_said(tmp_path):
    launcher = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(SystemExit, match="the run ended with 3"):
        random_kills.disturb(launcher, tmp_path / "none", 60.0, math.inf, random.Random(0))


def test_only_the_launchers_own_workers_are_found():
    environment = os.environ | {"RANK": "7"}
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env=environment)
    try:
        deadline = time.monotonic() + 60
        while random_kills.workers_of(os.getpid()).get(7) != child.pid:
            assert time.monotonic() < deadline
        assert random_kills.workers_of(child.pid) == {}
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()

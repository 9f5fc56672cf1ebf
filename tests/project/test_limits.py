"""No wait of a test is without a limit."""

import subprocess
import sys
import threading
import time

import forked
import limits
import pytest

ENDLESS = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]


def test_processes_and_threads_are_waited_for_within_a_limit(monkeypatch):
    monkeypatch.setattr(limits, "SECONDS", 0.05)
    for wait in (subprocess.Popen.wait, subprocess.Popen.communicate):
        with pytest.raises(subprocess.TimeoutExpired), subprocess.Popen(ENDLESS) as process:
            wait(process)
        assert process.returncode == -9
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run(ENDLESS, capture_output=True)
    end = threading.Event()
    thread = threading.Thread(target=end.wait, daemon=True)
    thread.start()
    with pytest.raises(TimeoutError, match="did not end within"):
        thread.join()
    end.set()
    thread.join(10)


def test_a_failed_test_does_not_wait_for_its_process():
    began = time.monotonic()
    with pytest.raises(ZeroDivisionError), subprocess.Popen(ENDLESS) as process:
        raise ZeroDivisionError
    assert process.returncode == -9 and time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("work", "told"), [(lambda: time.sleep(60), "ended with -14"), (lambda: 1 // 0, "ZeroDivisionError")]
)
def test_a_child_that_hangs_or_raises_is_a_failure(monkeypatch, work, told):
    monkeypatch.setattr(forked, "SECONDS", 1)
    with pytest.raises(AssertionError, match=told):
        forked.in_a_child(work)
    assert forked.in_a_child(lambda: 5) == "5"

"""The fixture `backend`, and Triton's interpreter for the tests that are marked `interpreted`.

The interpreter replaces Triton's functions for the whole process. Its tests therefore run in a process of their own
(`support/interpreter_process.py`), each as a test of this session. The first of them starts that process, which is told
which test to run, and sends back the reports. With TRITON_INTERPRET=1 in the environment, pytest itself is such a
process and runs them directly.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile

import pytest
import torch
from emulated import cuda, emulator, register  # noqa: F401 (fixtures)
from repository import ROOT, search_path


@pytest.fixture
def backend(request):
    """A backend by its name: "cuda" is emulated and has no backward, "triton" runs in the interpreter."""
    if request.param != "cuda":
        yield request.param
        return
    request.getfixturevalue("cuda")
    with torch.no_grad():
        yield "cuda"


def why_not_interpreted():
    """The reason why the interpreter cannot run here; '' where it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    numpy, triton = (
        tuple(int(n) for n in importlib.metadata.version(name).split(".")[:2]) for name in ("numpy", "triton")
    )
    if numpy >= (2, 4) and triton < (3, 7):
        return "the interpreter of triton 3.6 makes integers of one-element arrays, which numpy 2.4 refuses"
    return ""


def is_interpreted(item):
    return item.get_closest_marker("interpreted") is not None


class InterpreterProcess:
    """A pytest under the interpreter, which runs the tests that it is told to."""

    def __init__(self, files):
        ours, theirs = socket.socketpair()
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
        self.printed = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed with the process
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-p", "interpreter_process", "-p", "no:cacheprovider", *files],
            cwd=ROOT,
            env=inherited
            | {
                "TRITON_INTERPRET": "1",
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": search_path(ROOT / "tests" / "support", ROOT),
                "ZINIT_INTERPRETER_SOCKET": str(theirs.fileno()),
            },
            pass_fds=(theirs.fileno(),),
            stdout=self.printed,
            stderr=self.printed,
        )
        theirs.close()
        self.stream = ours.makefile("rw")
        ours.close()

    def run(self, nodeid):
        """Yields the reports of one test, as pytest serialises them; OSError if the process has ended."""
        print(json.dumps(nodeid), file=self.stream, flush=True)
        for line in self.stream:
            if (report := json.loads(line)) is None:
                return
            if report["outcome"] == "skipped" and isinstance(report["longrepr"], list):
                report["longrepr"] = tuple(report["longrepr"])  # JSON has no tuples
            yield report
        raise ConnectionResetError

    def stop(self):
        """Ends the process and returns what it has printed."""
        with contextlib.suppress(OSError):  # a request that the process did not read
            self.stream.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        with self.printed:
            self.printed.seek(0)
            return self.printed.read()


_process = pytest.StashKey[InterpreterProcess]()


def pytest_collection_modifyitems(items):
    if reason := why_not_interpreted():
        for item in filter(is_interpreted, items):
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_runtest_protocol(item, nextitem):
    """Reports an interpreted test from the other process in place of running it here."""
    if not is_interpreted(item) or os.environ.get("TRITON_INTERPRET") == "1" or why_not_interpreted():
        return None
    config = item.config
    if _process not in config.stash:
        files = sorted({str(other.path) for other in item.session.items if is_interpreted(other)})
        config.stash[_process] = InterpreterProcess(files)
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    try:
        for data in config.stash[_process].run(item.nodeid):
            report = config.hook.pytest_report_from_serializable(config=config, data=data)
            item.ihook.pytest_runtest_logreport(report=report)
    except OSError:
        process = config.stash[_process]
        del config.stash[_process]  # the next test starts another
        printed = process.stop()[-8000:]
        text = f"the interpreter's process ended with exit code {process.process.returncode}\n{printed}"
        for when, outcome in (("setup", "passed"), ("call", "failed"), ("teardown", "passed")):
            report = pytest.TestReport(
                item.nodeid, item.location, {}, outcome, text if outcome == "failed" else None, when
            )
            item.ihook.pytest_runtest_logreport(report=report)
    # the test before left what it shares with this one, its module's fixtures, for this one to take down
    item.session._setupstate.teardown_exact(nextitem)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def pytest_sessionfinish(session):
    if _process in session.config.stash:
        session.config.stash[_process].stop()

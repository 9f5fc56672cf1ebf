"""What a process does that fork() made of a test."""

import os
import signal
import tempfile
import time
import traceback

SECONDS = 20  # for the child; it may hang on a lock that a thread of its parent held


def in_a_child(work):
    """The text of what `work()` returns in a child. AssertionError where it raises, dies or does not end."""
    with tempfile.TemporaryFile() as said:  # a pipe would stay open for as long as any other child holds it
        child = os.fork()
        if child == 0:
            status = 1
            try:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(SECONDS)  # ends a child that waits for ever
                os.write(said.fileno(), str(work()).encode())
                status = 0
            except BaseException:
                os.write(said.fileno(), traceback.format_exc().encode())
            finally:
                os._exit(status)
        status = _status(child)
        said.seek(0)
        text = said.read().decode()
    assert status == 0, f"the child ended with {status}: {text}"
    return text


def _status(child):
    """The exit code of a child, -9 if it had to be killed."""
    deadline = time.monotonic() + 2 * SECONDS  # an alarm does not end a child that is stopped
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        time.sleep(0.002)

"""Limits for what tests wait for: a wait that never ends would stop the whole run, and name no test."""

import subprocess
import threading

SECONDS = 500.0  # of the slowest build on a busy machine there are some 200

_wait, _communicate, _leave = subprocess.Popen.wait, subprocess.Popen.communicate, subprocess.Popen.__exit__
_join = threading.Thread.join


def wait(self, timeout=None):
    """Popen.wait. A process without a limit of its own is killed after SECONDS, and TimeoutExpired is raised."""
    try:
        return _wait(self, SECONDS if timeout is None else timeout)
    except subprocess.TimeoutExpired:
        if timeout is None:
            self.kill()
        raise


def communicate(self, input=None, timeout=None):
    """Popen.communicate, which subprocess.run calls too, with the limit of `wait`."""
    try:
        return _communicate(self, input, SECONDS if timeout is None else timeout)
    except subprocess.TimeoutExpired:
        if timeout is None:
            self.kill()
        raise


def leave(self, kind, error, trace):
    """The end of `with Popen(...)`, which waits: a failed assertion must not wait for what nobody will end."""
    if kind is not None:
        self.kill()
    _leave(self, kind, error, trace)


def join(self, timeout=None):
    """Thread.join; without a limit of its own it raises TimeoutError after SECONDS."""
    _join(self, SECONDS if timeout is None else timeout)
    if timeout is None and self.is_alive():
        raise TimeoutError(f"{self.name} did not end within {SECONDS} s")


def install():
    """For this process, from here on."""
    subprocess.Popen.wait, subprocess.Popen.communicate = wait, communicate
    subprocess.Popen.__exit__, threading.Thread.join = leave, join

"""A limit on the size of files, which stands for a full disk: the same failure in the middle of a write."""

import contextlib
import errno
import os
import resource
import signal


@contextlib.contextmanager
def files_of_at_most(size):
    """No file of this process grows beyond `size` bytes; OSError: File too large."""
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)


def fill_at(monkeypatch, number):
    """The disk is full when the `number`-th file of this process is flushed, and from then on."""
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) >= number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)

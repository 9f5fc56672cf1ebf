"""torch's threads, for tests that are about something else."""

from contextlib import contextmanager

import torch


@contextmanager
def one_thread():
    """torch's small operations on several threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

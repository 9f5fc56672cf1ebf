"""Threads in tests: torch's own, and those that a test starts."""

import threading
from contextlib import contextmanager

import torch


@contextmanager
def one_thread():
    """torch's small operations on several threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def on_threads(work, count=4):
    """Runs `work()` on several threads at once, and waits for all of them."""
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

"""A chip that is not there: CPU tensors take the ways of tensors on an NVIDIA GPU, and rooms stand for its kernels.

The rooms compute by the reference, so they are right until a test says otherwise. Everything between the public
function and the rooms is the package's own: the order of the backends, the proof, its trials, its files.
"""

import pytest
import torch

from zinit_kernels import dispatch, proof
from zinit_kernels.backends import few_rows, reference
from zinit_kernels.proof import chip, trial

CHIP = {"chip": "Imagined H200", "capability": "9.0", "driver": "580.1", "torch": "2.13", "build": "abc"}


class Room:
    """A backend that counts its calls; `error` is added to its results, or raised if it is an exception."""

    CHECKS_VALUES = False

    def __init__(self):
        self.calls, self.error, self.refused = [], 0.0, ""

    def why_not(self, call, return_lse):
        return self.refused

    def _spoilt(self, result, call):
        self.calls.append(call)
        if callable(self.error):
            self.error()
        elif isinstance(self.error, BaseException):
            raise self.error
        return result[0] + (0.0 if callable(self.error) else self.error), result[1]

    def attention(self, call):
        return self._spoilt(reference.attention(call), call)

    @torch.no_grad()
    def attention_with_cache(self, call):
        return self._spoilt(reference.attention_with_cache(call), call)

    @torch.no_grad()
    def add_prompt_branch(self, call):
        call.out.add_(self._spoilt(reference.attention(call.attention()), call)[0])


class FewRows:
    """Stands for the kernel of `few_rows`, as a `Room` does for those of attention."""

    def __init__(self):
        self.products, self.error, self.refused = [], 0.0, ""

    def launched(self, product):
        self.products.append(product)
        return tuple(one + self.error for one in few_rows.composed(product))


class Gpu:
    """The imagined machine: what the proof asks of it, and its rooms."""

    def __init__(self):
        self.facts, self.capturing, self.broken = dict(CHIP), False, False
        self.triton, self.cuda, self.hybrid = Room(), Room(), Room()
        self.few_rows = FewRows()

    def synchronize(self, device):
        if self.broken:
            raise RuntimeError("an illegal memory access was encountered")

    @staticmethod
    def new_process():
        """Forgets what a process keeps in memory."""
        proof._stores.clear()
        proof._answers.clear()
        proof._taken.clear()
        proof._retry_at.clear()
        proof._warned.clear()
        proof._is_forked = False


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    machine = Gpu()
    monkeypatch.setenv("ZINIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(proof, "MODE", "1")
    monkeypatch.setattr(chip, "facts", lambda device: dict(machine.facts))
    monkeypatch.setattr(chip, "is_capturing", lambda device: machine.capturing)
    monkeypatch.setattr(chip, "make_current", lambda device: None)
    monkeypatch.setattr(chip, "synchronize", machine.synchronize)
    monkeypatch.setattr(dispatch, "PROVED", {"cpu"})
    monkeypatch.setattr(dispatch, "CPU_IS_FIRST", False)
    for name in ("triton", "cuda", "hybrid"):
        monkeypatch.setitem(dispatch.BACKENDS, name, getattr(machine, name))
        monkeypatch.setitem(trial.ROOMS, name, getattr(machine, name))
    monkeypatch.setattr(few_rows, "why_not", lambda device, dtype: machine.few_rows.refused)
    monkeypatch.setattr(few_rows, "launched", machine.few_rows.launched)
    machine.new_process()
    yield machine
    machine.new_process()

"""Weights in huge pages: the same numbers in another place, or nothing done."""

import copy
import mmap
from pathlib import Path

import pytest
import torch
from tiny_runs import make_base

from model import huge_pages
from model.huge_pages import use_huge_pages
from model.quantised import quantise

TOKENS = torch.tensor([[5, 9, 30]])
HUGE = 2 << 20
needs_linux = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no huge pages to ask for")


def weights(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def flags_at(address: int) -> str:
    """The flags of the mapping with this address, as the kernel says."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            inside = begin <= address < end
        elif inside and first == "VmFlags:":
            return line
    raise AssertionError("no such mapping")


@needs_linux
@pytest.mark.parametrize("format", [None, "int4"])
def test_the_numbers_are_the_same_in_one_block(format):
    base = quantise(make_base(), format)
    before = copy.deepcopy(weights(base))
    with torch.no_grad():
        logits = base(TOKENS)
        assert use_huge_pages(base)
        assert torch.equal(base(TOKENS), logits)
    after = weights(base)
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert not any(parameter.requires_grad for parameter in base.parameters())
    places = sorted((tensor.data_ptr(), tensor.nbytes) for tensor in after.values())
    assert places[0][0] % HUGE == 0 and all(place % 64 == 0 for place, _ in places)
    for (place, size), (following, _) in zip(places, places[1:], strict=False):
        assert 0 <= following - place - size < 64
    assert " hg" in flags_at(places[0][0])


@needs_linux
def test_decoding_takes_the_new_place():
    from model.sampling import generate

    base = make_base()
    options = {"max_new_tokens": 4, "temperature": 0, "eos_ids": []}
    expected = generate(base, [[5, 9]], **options)
    assert use_huge_pages(base) and generate(base, [[5, 9]], **options) == expected


def test_nothing_is_done(monkeypatch, tmp_path):
    trained = make_base()
    trained.norm.weight.requires_grad_(True)
    assert not use_huge_pages(trained)
    base = make_base()
    before = weights(base)
    little = tmp_path / "meminfo"
    little.write_text("MemTotal: 9 kB\nMemAvailable:     200 kB\n")
    for memory in (little, tmp_path / "missing"):
        with monkeypatch.context() as patched:
            patched.setattr(huge_pages, "_MEMORY", memory)
            assert not use_huge_pages(base)
    with monkeypatch.context() as patched:
        patched.setattr(huge_pages, "_block", lambda size: None)
        assert not use_huge_pages(base)
    assert all(weights(base)[name] is tensor for name, tensor in before.items())
    assert not use_huge_pages(torch.nn.Module())

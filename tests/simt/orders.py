"""Every order that a GPU may take, of threads and of copies: a correct kernel gives the same bits in all of them."""

import torch

ORDERS = [(s, c) for s in ("forward", "reverse", "random1") for c in ("late", "early")]


def in_all_orders(monkeypatch, run):
    """Whether the results have the same bits whatever runs first and whenever copies land."""
    results = []
    for schedule, copies in ORDERS:
        monkeypatch.setenv("SIMT_SCHEDULE", schedule)
        monkeypatch.setenv("SIMT_COPIES", copies)
        results.append([t.nan_to_num(7.0) for t in run()])
    return all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))

"""The tokens of one step as rows of equal width, for one pass of the base.

A sequence's tokens are divided into rows of W tokens, where W is the greatest common divisor of all their counts. So a
sequence that decodes makes every row one token wide, a prompt that is computed alone is one row, and no row is padded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..llama import PagedCache, PagedRows
from .pages import PAGE_SIZE
from .request import SequenceState


class Batch:
    """The next `count` tokens of each sequence. Their pages have been taken."""

    def __init__(self, work: Sequence[tuple[SequenceState, int]], device: torch.device):
        self.width = math.gcd(*(count for _, count in work))
        self.sequences: list[SequenceState] = []  # of each row
        self.wanted: list[SequenceState] = []  # those whose next token is to be chosen
        last_rows: list[int] = []
        tokens: list[list[int]] = []
        lengths: list[int] = []
        for sequence, count in work:
            end = sequence.cached + count
            for first in range(sequence.cached, end, self.width):
                self.sequences.append(sequence)
                tokens.append(sequence.tokens[first : first + self.width])
                lengths.append(first)
            if end == len(sequence.tokens):
                self.wanted.append(sequence)
                last_rows.append(len(tokens) - 1)
        longest = max(len(sequence.pages) for sequence, _ in work)
        pages = [sequence.pages + [0] * (longest - len(sequence.pages)) for sequence, _ in work]
        table = torch.tensor(pages, dtype=torch.int32)
        self.one_row_each = len(tokens) == len(work)
        # whether each sequence has one token, behind which the next one is to be chosen
        self.decodes = self.width == 1 and len(tokens) == len(work) == len(last_rows)
        if not self.one_row_each:
            table = table.repeat_interleave(torch.tensor([count // self.width for _, count in work]), 0)
        self.tokens = torch.tensor(tokens, device=device)  # int64 [R, W]
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
        self.block_table = table.to(device)
        self.last_rows = torch.tensor(last_rows, dtype=torch.int64, device=device)  # of the wanted

    def rows(self, cache: PagedCache) -> PagedRows:
        """The rows in a cache of pages."""
        slots = None
        if not self.one_row_each:
            positions = self.lengths[:, None].long() + torch.arange(self.width, device=self.lengths.device)
            pages = self.block_table.long().gather(1, positions // PAGE_SIZE)
            slots = pages, positions % PAGE_SIZE
        return PagedRows(cache, self.lengths, self.block_table, slots)

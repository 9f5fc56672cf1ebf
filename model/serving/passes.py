"""The passes of the base over the rows of a step.

On a CPU the kernels keep the base, the prompt table and the pages as long as the engine lives (`kept_layers`). Where
every sequence decodes a token, a step is then one call, from the tokens to the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakSet

from torch import Tensor

from ..kept_layers import KeptLayers, keep
from ..layer_weights import MOST_TOKENS
from ..llama import Llama, PagedCache
from .batch import Batch
from .prompt_table import PromptTable
from .request import SequenceState


class Passes:
    """The logits of a base, with the prompts of a table and the keys and values in a cache of pages."""

    def __init__(self, model: Llama, table: PromptTable, cache: PagedCache):
        self.model, self.table, self.cache = model, table, cache
        self._kept: KeptLayers | None = None
        self._version = -1  # of the table that is kept
        # those that were there when the base was looked at
        self._seen: WeakSet[SequenceState] = WeakSet()

    def logits(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """The logits [B, vocab_size] behind the last tokens of `batch.wanted`, and the likeliest tokens where they are
        known, as `KeptLayers.read` returns them.
        """
        indices = [sequence.request.row.index for sequence in batch.sequences]
        rows = batch.rows(self.cache)
        kept = self._keep(batch.sequences) if batch.decodes else None
        if kept is not None:
            return kept.read(batch.tokens, rows, self.table.index_of(indices))
        hidden = self.model.hidden_states(batch.tokens, self.table.adapter_of(indices), cache=rows)
        return self.model.logits(hidden[batch.last_rows, -1]), None

    def _keep(self, sequences: Sequence[SequenceState]) -> KeptLayers | None:
        """The base as the kernels hold it; None where they cannot.

        As in `generate`, nobody replaces a weight or adds a hook while the same sequences decode: to ask 30 layers
        takes 0.9 ms between two tokens. With the next sequence that comes, all of it is looked at.
        """
        if len(sequences) > MOST_TOKENS:
            return None
        grown = self._version != self.table.version
        moved = self._kept is not None and not self._kept.is_in_place()
        if grown or moved or any(sequence not in self._seen for sequence in sequences):
            before = None if grown else self._kept
            self._kept = keep(self.model, self.table.adapter_of_all(), self.cache, before)
            self._version = self.table.version
            self._seen.update(sequences)
        return self._kept

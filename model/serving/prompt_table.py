"""The prompts of all adapters in one table for each layer, so that one attention call serves any mix of them.

A layer's table has a row for each adapter, and for each set of images that requests are about. Each sequence takes its
row by `prompt_index`; -1 is the base alone. Adapters may differ in all that one call has only one of:

- the number of prompts: the rows are as long as the least common multiple of all, and a shorter adapter's prompts are
  repeated in its row, which leaves their softmax as it is;
- the gates' activation: the table holds activated gates;
- the layers: where an adapter adds nothing, its gates are 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..config import MAX_PROMPT_LENGTH
from ..errors import UserError
from ..llama import Adapter, Attention, Llama, Prompt


class PromptTable:
    """The prompts of many adapters for one base. All methods are for the thread that runs the engine."""

    def __init__(self, model: Llama):
        self.model = model
        self.length = 1  # prompts in a row
        self.rows = 0  # that the tensors have
        self.version = 0  # changes where tensors are made anew, and not where a row is written
        self._free: list[int] = []
        self._layers: list[tuple[Tensor, Tensor, Tensor] | None] = [None] * len(
            model.layers
        )  # keys, values, gates

    @property
    def used(self) -> int:
        """Rows that hold prompts."""
        return self.rows - len(self._free)

    @torch.no_grad()
    def add(self, adapter: Adapter) -> int:
        """Puts the prompts that the adapter gives its first sequence into a row, and returns its number.

        Raises UserError for an adapter without gates, and for one whose number of prompts fits with no common multiple.
        """
        prompts = [adapter(layer.self_attn) for layer in self.model.layers]
        self._make_room(prompts)
        row = self._free.pop()
        for place, prompt in enumerate(prompts):
            self._put(place, row, prompt)
        return row

    @torch.no_grad()
    def remove(self, row: int) -> None:
        """Frees a row that no sequence takes any more."""
        for tables in self._layers:
            if tables is not None:
                for tensor in tables:
                    tensor[row] = 0
        self._free.append(row)

    def adapter_of(self, rows: Sequence[int]) -> Adapter | None:
        """The adapter of a batch whose sequences take these rows."""
        index = None if all(row < 0 for row in rows) else self.index_of(rows)
        return None if index is None else _RowsOfTable(self, index)

    def adapter_of_all(self) -> Adapter | None:
        """The adapter of all batches: who calls the model with its prompts says which rows its sequences take."""
        index = self.index_of([])
        return None if index is None else _RowsOfTable(self, index)

    def index_of(self, rows: Sequence[int]) -> Tensor | None:
        """The rows of a batch's sequences, int32; None where the table has no tensors."""
        if all(tables is None for tables in self._layers):
            return None
        return torch.tensor(rows, dtype=torch.int32, device=self.model.device)

    def prompt_of(self, attention: Attention, index: Tensor) -> Prompt | None:
        """The prompts of a layer, for sequences that take these rows."""
        tables = self._layers[attention.layer_index]
        return None if tables is None else Prompt(*tables, "identity", index)

    def _make_room(self, prompts: Sequence[Prompt | None]) -> None:
        length = self.length
        for prompt in prompts:
            if prompt is None:
                continue
            if prompt.gate is None:
                raise UserError("an adapter without gates is only for comparison, and cannot be served.")
            length = math.lcm(length, prompt.key.shape[-3])
        if length > MAX_PROMPT_LENGTH:
            raise UserError(
                f"the adapter's number of prompts and those of the others, {self.length} in a row, have no common "
                f"multiple up to {MAX_PROMPT_LENGTH}: serve it by a server of its own."
            )
        rows = self.rows if self._free else max(2 * self.rows, 1)
        if (rows, length) != (self.rows, self.length):
            for place, tables in enumerate(self._layers):
                if tables is not None:
                    self._replace(place, self._grown(tables, rows, length))
            self._free += range(rows - 1, self.rows - 1, -1)
            self.rows, self.length = rows, length

    def _replace(self, place: int, tables: tuple[Tensor, Tensor, Tensor]) -> None:
        self._layers[place] = tables
        self.version += 1

    def _grown(
        self, tables: tuple[Tensor, Tensor, Tensor], rows: int, length: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tables of more rows and longer ones; the new rows are 0."""
        keys, values, gates = tables
        times = (1, length // self.length, 1, 1)
        new = rows - self.rows
        return (
            torch.cat([keys.repeat(times), keys.new_zeros(new, length, *keys.shape[2:])]),
            torch.cat([values.repeat(times), values.new_zeros(new, length, *values.shape[2:])]),
            torch.cat([gates, gates.new_zeros(new, gates.shape[1])]),
        )

    def _put(self, place: int, row: int, prompt: Prompt | None) -> None:
        if prompt is None:
            return
        key, value, gate = prompt.key, prompt.value, prompt.gate
        assert gate is not None  # _make_room refused it
        if prompt.index is not None:  # a table of its own: the row of the first sequence
            first = int(prompt.index[0])
            key, value = key[first], value[first]
        tables = self._layers[place]
        if tables is None:
            shape = (self.rows, self.length, *key.shape[-2:])
            tables = (
                key.new_zeros(shape),
                value.new_zeros(shape),
                torch.zeros(self.rows, self.model.config.num_heads_q, device=key.device),
            )
            self._replace(place, tables)
        keys, values, gates = tables
        times = (self.length // key.shape[-3], 1, 1)
        keys[row], values[row] = key.repeat(times), value.repeat(times)
        gates[row] = gate.float().tanh() if prompt.gate_activation == "tanh" else gate.float()


class _RowsOfTable:
    """The adapter of a batch: each sequence's row of the table. For one pass, or for one generation."""

    keeps_prompts = True

    def __init__(self, table: PromptTable, index: Tensor):
        self.table, self.index = table, index

    def __call__(self, attention: Attention) -> Prompt | None:
        return self.table.prompt_of(attention, self.index)

    def select(self, sequences: list[int]) -> _RowsOfTable:
        """The adapter of these sequences of the batch."""
        return _RowsOfTable(self.table, self.index[sequences])

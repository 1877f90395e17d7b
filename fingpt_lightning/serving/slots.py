"""Keys and values of texts that begin and end at different times, decoded in one batch.

Axes: B rows in use, H heads of keys and values, T tokens of a prompt, S columns that the longest
row fills, and the new one, F features of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin
from typing_extensions import override

_SLACK = 64
"""Columns that are free after memory has been taken."""


@dataclass
class _Columns:
    """What is filled: each row's tokens are the ``lengths[row]`` columns before ``end``."""

    lengths: list[int] = field(default_factory=list)
    end: int = 0

    @property
    def first(self) -> int:
        return self.end - max(self.lengths, default=0)


class _SlotLayer(CacheLayerMixin):
    """One layer's keys and values, in memory that all rows share."""

    def __init__(self, columns: _Columns) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.columns = columns

    @override
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        _, heads, _, features = key_states.shape
        self.keys = key_states.new_empty(0, heads, 0, features)
        self.values = value_states.new_empty(0, heads, 0, value_states.shape[-1])
        self.is_initialized = True

    @override
    def update(
        self,
        key_states: Float[Tensor, "B H 1 F"],
        value_states: Float[Tensor, "B H 1 F"],
        *args: object,
        **kwargs: object,
    ) -> tuple[Float[Tensor, "B H S F"], Float[Tensor, "B H S F"]]:
        rows, (first, end) = len(key_states), (self.columns.first, self.columns.end)
        found = []
        for memory, new in zip(self._memory(), (key_states, value_states), strict=True):
            memory[:rows, :, end] = new[:, :, 0]
            found.append(memory[:rows, :, first : end + 1])
        return found[0], found[1]

    def move(self, rows: int, capacity: int, num_rows: int, before: int) -> None:
        """Moves what is filled into memory of another size, ``before`` columns from its start."""
        first, end = self.columns.first, self.columns.end
        moved = []
        for memory in self._memory():
            shape = (rows, memory.shape[1], capacity, memory.shape[3])
            made = memory if shape == memory.shape else memory.new_zeros(shape)
            filled = memory[:num_rows, :, first:end]
            if made is memory:  # the parts may overlap
                filled = filled.clone()
            made[:num_rows, :, :before] = 0
            made[:num_rows, :, before : before + end - first] = filled
            moved.append(made)
        self.keys, self.values = moved

    def fill(self, row: int, keys: Tensor, values: Tensor) -> None:
        """Puts a row's tokens before the end, and zeros before them.

        What is masked is multiplied all the same: a NaN of the row that was there would spread.
        """
        end = self.columns.end
        for memory, new in zip(self._memory(), (keys, values), strict=True):
            memory[row, :, : end - new.shape[1]] = 0
            memory[row, :, end - new.shape[1] : end] = new

    def copy_row(self, source: int, target: int) -> None:
        """Copies a row to the place of another."""
        end = self.columns.end
        first = end - self.columns.lengths[source]
        for memory in self._memory():
            memory[target, :, :first] = 0
            memory[target, :, first:end] = memory[source, :, first:end]

    def _memory(self) -> tuple[Tensor, Tensor]:
        return cast("Tensor", self.keys), cast("Tensor", self.values)

    @override
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    @override
    def get_seq_length(self) -> int:
        return self.columns.end - self.columns.first

    @override
    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):
    """Keys and values of rows that join and leave while others are being written.

    All rows get their next token at the same column, so that a row's tokens are the last columns
    before it: a batch padded on the left. Only columns that the longest row fills are attended to.
    Memory is taken as it is needed, at most twice what the rows' longest text fills.

    Args:
        config: Config of the network.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        self._columns = _Columns()
        layers = [_SlotLayer(self._columns) for _ in range(config.num_hidden_layers)]
        super().__init__(layers)  # type: ignore[arg-type]
        self._slots, self._rows, self._capacity = layers, 0, 0

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each row."""
        return list(self._columns.lengths)

    def num_bytes(self) -> int:
        """Bytes of the memory that is taken."""
        return sum(
            part.nbytes for slot in self._slots if slot.is_initialized for part in slot._memory()
        )

    def add(self, layers: Sequence[tuple[Float[Tensor, "H T F"], Float[Tensor, "H T F"]]]) -> None:
        """Adds a row after the others.

        Args:
            layers: Each layer's keys and values of the row's tokens.
        """
        for slot, (keys, values) in zip(self._slots, layers, strict=True):
            if not slot.is_initialized:
                slot.lazy_initialization(keys[None], values[None])
        place, num_tokens = len(self._columns.lengths), layers[0][0].shape[1]
        self._make_room(place + 1, num_tokens)
        for slot, (keys, values) in zip(self._slots, layers, strict=True):
            slot.fill(place, keys, values)
        self._columns.lengths.append(num_tokens)

    def remove(self, row: int) -> None:
        """Removes a row; the last one takes its place."""
        lengths = self._columns.lengths
        last = len(lengths) - 1
        if row != last:
            for slot in self._slots:
                slot.copy_row(last, row)
            lengths[row] = lengths[last]
        lengths.pop()
        if not lengths:
            self._columns.end = 0

    def begin_step(self) -> tuple[Int[Tensor, "B"], Bool[Tensor, "B S"] | None]:
        """Takes memory for one token more of each row.

        Returns:
            The position of each row's token, and the columns it attends to, its own the last; None
            is all.
        """
        self._make_room(len(self._columns.lengths), 0)
        device = self._slots[0].device
        lengths_B = torch.tensor(self._columns.lengths, device=device)
        longest = max(self._columns.lengths)
        if min(self._columns.lengths) == longest:
            return lengths_B, None
        columns_S = torch.arange(longest + 1, device=device)
        return lengths_B, columns_S >= (longest - lengths_B)[:, None]

    def end_step(self) -> None:
        """Counts the token that each row has got."""
        self._columns.end += 1
        self._columns.lengths[:] = [length + 1 for length in self._columns.lengths]

    def _make_room(self, num_rows: int, num_before: int) -> None:
        """Sees to so many rows, columns before the end, and one column after it."""
        columns = self._columns
        filled = columns.end - columns.first
        needed = max(num_before, filled)
        if num_rows <= self._rows and needed <= columns.end < self._capacity:
            return
        rows = max(self._rows, num_rows)
        if num_rows > self._rows:
            rows = max(num_rows, 2 * self._rows)
        capacity = self._capacity
        if 2 * needed >= capacity:
            capacity = max(capacity, 2 * needed + _SLACK)
        for slot in self._slots:
            slot.move(rows, capacity, len(columns.lengths), needed - filled)
        self._rows, self._capacity, columns.end = rows, capacity, needed

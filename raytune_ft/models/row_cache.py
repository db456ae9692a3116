"""Keys and values of a batch whose rows come and go: rows end at the same column, padding stands before them.

The buffers have room to the right, so that a decoding step writes one column, and below, so that a row that joins
writes itself; a row that leaves gives its place to another. Whatever needs more room copies everything, once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

_ROOM = 64
"""Columns by which a full buffer grows."""


class _Layer(DynamicLayer):  # type: ignore[misc]
    """One layer: ``keys`` and ``values`` are views [rows, heads, columns, head size] into larger buffers."""

    def __init__(self) -> None:
        super().__init__()
        self._buffers: tuple[Tensor, Tensor] | None = None
        self._first = 0
        """Column of the buffers that the views begin at."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **others: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, had = key_states.shape[0], self.get_seq_length()
        wanted = had + key_states.shape[-2]
        if self._buffers is None or self._buffers[0].shape[-2] < self._first + wanted:
            old = (self.keys, self.values) if had else None
            # As many rows as there were room for, unless most of them left.
            room = self._buffers[0].shape[0] if self._buffers is not None else rows
            self._allocate(key_states, value_states, rows if 2 * rows < room else room, wanted)
            if old is not None:
                self._write(old, 0, had)
        self._show(rows, wanted)
        for shown, states in ((self.keys, key_states), (self.values, value_states)):
            shown[:, :, had:] = states
        return self.keys, self.values

    def put(self, keys: Tensor, values: Tensor) -> None:
        """Takes these as all that the layer holds; they are never written to."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        self._buffers, self._first, self.keys, self.values = None, 0, keys, values

    def join(self, other: _Layer) -> None:
        """Takes the other's rows behind its own."""
        own, theirs = (self.keys, self.values), (other.keys, other.values)
        (rows, _, columns, _), (more, _, other_columns, _) = own[0].shape, theirs[0].shape
        widest = max(columns, other_columns)
        if self._buffers is None or self._buffers[0].shape[0] < rows + more or widest > columns:
            self._allocate(*own, rows + more + (rows + more) // 4, widest)
            self._write(own, 0, widest)
        self._write(theirs, rows, widest)
        self._show(rows + more, widest)

    def keep(self, moves: Sequence[tuple[int, int]], rows: Sequence[int], columns: int) -> None:
        """Leaves the first rows, after `moves` (from, to), which makes them `rows`; with their last columns."""
        dropped = self.get_seq_length() - columns
        if self._buffers is None:
            places = torch.tensor(rows, device=self.keys.device)
            kept = (states[:, :, dropped:].index_select(0, places) for states in (self.keys, self.values))
            return self.put(*kept)
        for buffer in self._buffers:
            for origin, target in moves:
                buffer[target] = buffer[origin]
        self._first += dropped
        return self._show(len(rows), columns)

    def _allocate(self, keys: Tensor, values: Tensor, rows: int, columns: int) -> None:
        made = (t.new_empty(rows, t.shape[1], columns + _ROOM, t.shape[3]) for t in (keys, values))
        self._buffers, self._first = tuple(made), 0  # type: ignore[assignment]

    def _write(self, states: tuple[Tensor, Tensor], row: int, end: int) -> None:
        """Puts keys and values of whole rows from `row` on, so that they end at column `end`, behind zeros."""
        assert self._buffers is not None
        for buffer, given in zip(self._buffers, states, strict=True):
            shown = buffer[row : row + given.shape[0], :, self._first : self._first + end]
            shown[:, :, : end - given.shape[2]] = 0
            shown[:, :, end - given.shape[2] :] = given

    def _show(self, rows: int, columns: int) -> None:
        assert self._buffers is not None
        shown = slice(self._first, self._first + columns)
        self.keys, self.values = (buffer[:rows, :, shown] for buffer in self._buffers)


class RowCache(Cache):  # type: ignore[misc]
    """A transformers cache that rows can be added to and taken out of, at one length for all layers.

    Layers with a sliding window keep every key, too: the model's mask hides those out of reach.
    """

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=_Layer)

    @classmethod
    def of(cls, layers: Sequence[tuple[Tensor, Tensor]]) -> RowCache:
        """A cache that holds these keys and values, [rows, heads, columns, head size] each."""
        cache = cls()
        for keys, values in layers:
            layer = _Layer()
            layer.put(keys, values)
            cache.layers.append(layer)
        return cache

    @property
    def columns(self) -> int:
        """Tokens of the longest row."""
        return int(self.get_seq_length())

    def join(self, other: RowCache) -> None:
        """Takes the other's rows behind its own; the shorter ones are padded before their first token."""
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            mine.join(theirs)

    def keep(self, rows: Sequence[int], columns: int) -> list[int]:
        """Leaves these rows, with their last `columns` tokens; returns them in the order in which they lie then."""
        wanted = set(rows)
        holes = [place for place in range(len(wanted)) if place not in wanted]
        moves = list(zip(sorted(place for place in wanted if place >= len(wanted)), holes, strict=True))
        order = list(range(len(wanted)))
        for origin, target in moves:
            order[target] = origin
        for layer in self.layers:
            layer.keep(moves, order, columns)
        return order

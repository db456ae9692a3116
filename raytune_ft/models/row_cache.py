"""Keys and values of a batch whose rows come and go: rows end at the same column, padding stands before them.

The buffers have room to the right, so that a decoding step writes one column instead of copying all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own convention
from transformers.cache_utils import Cache, DynamicLayer

_ROOM = 64
"""Columns by which a full buffer grows."""


class _Layer(DynamicLayer):  # type: ignore[misc]
    """One layer: ``keys`` and ``values`` are views [rows, heads, columns, head size] into larger buffers."""

    def __init__(self) -> None:
        super().__init__()
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **others: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        had, wanted = self.get_seq_length(), self.get_seq_length() + key_states.shape[-2]
        if self._buffers is None or self._buffers[0].shape[-2] < wanted:
            self._grow(key_states, value_states, had, wanted + _ROOM)
        assert self._buffers is not None
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, had:wanted] = states
        self.keys, self.values = (buffer[:, :, :wanted] for buffer in self._buffers)
        return self.keys, self.values

    def put(self, keys: Tensor, values: Tensor) -> None:
        """Takes these as all that the layer holds."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        self._buffers, self.keys, self.values = None, keys, values

    def _grow(self, keys: Tensor, values: Tensor, had: int, columns: int) -> None:
        grown = []
        for states, old in ((keys, self.keys), (values, self.values)):
            buffer = states.new_empty(*states.shape[:2], columns, states.shape[3])
            if had:
                buffer[:, :, :had] = old
            grown.append(buffer)
        self._buffers = (grown[0], grown[1])


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

    def joined(self, other: RowCache) -> RowCache:
        """The rows of both, the shorter ones padded before their first token."""
        columns = max(self.columns, other.columns)
        return RowCache.of(
            [
                (_stacked(mine.keys, theirs.keys, columns), _stacked(mine.values, theirs.values, columns))
                for mine, theirs in zip(self.layers, other.layers, strict=True)
            ]
        )

    def kept(self, rows: Sequence[int], columns: int) -> RowCache:
        """These rows, with their last `columns` tokens."""
        places = torch.tensor(rows, device=self.layers[0].keys.device)
        first = self.columns - columns
        return RowCache.of(
            [
                (layer.keys[:, :, first:].index_select(0, places), layer.values[:, :, first:].index_select(0, places))
                for layer in self.layers
            ]
        )


def _stacked(one: Tensor, other: Tensor, columns: int) -> Tensor:
    return torch.cat([F.pad(part, (0, 0, columns - part.shape[2], 0)) for part in (one, other)])

"""Rows that join and leave keep their own keys and values, each ending at the last column."""

from __future__ import annotations

import torch

from raytune_ft.models.row_cache import RowCache


def filled(rows: int, columns: int, first: int) -> RowCache:
    """Two layers of one head of size 2; the value of row r at column c of layer n is 1000 n + 100 r + c."""
    cache = RowCache()
    for layer in range(2):
        numbers = torch.arange(columns)[None, :] + 100 * (first + torch.arange(rows))[:, None] + 1000 * layer
        states = numbers[:, None, :, None].expand(rows, 1, columns, 2).float()
        cache.update(states, -states, layer)
    return cache


def content(cache: RowCache, layer: int) -> list[list[int]]:
    keys, values = cache.layers[layer].keys, cache.layers[layer].values
    assert torch.equal(keys, -values)
    return keys[:, 0, :, 0].int().tolist()


def test_a_step_adds_a_column_without_copying_the_others():
    cache = filled(2, 3, 1)
    for layer in range(2):
        state = torch.full((2, 1, 1, 2), 7.0)
        cache.update(state, -state, layer)
    assert cache.columns == 4
    assert content(cache, 1) == [[1100, 1101, 1102, 7], [1200, 1201, 1202, 7]]
    before = cache.layers[0].keys.data_ptr()
    cache.update(torch.ones(2, 1, 1, 2), -torch.ones(2, 1, 1, 2), 0)
    assert cache.layers[0].keys.data_ptr() == before


def test_many_steps_outgrow_the_room_and_keep_everything():
    cache = filled(1, 2, 0)
    for number in range(200):
        state = torch.full((1, 1, 1, 2), float(number))
        cache.update(state, -state, 0)
    assert content(cache, 0) == [[0, 1, *range(200)]]


def test_joined_rows_end_together():
    joined = filled(1, 4, 1).joined(filled(2, 2, 5))
    assert content(joined, 0) == [[100, 101, 102, 103], [0, 0, 500, 501], [0, 0, 600, 601]]
    assert content(filled(1, 1, 3).joined(filled(1, 2, 1)), 1) == [[0, 1300], [1100, 1101]]


def test_kept_rows_lose_the_columns_that_were_padding():
    kept = filled(1, 4, 1).joined(filled(2, 2, 5)).kept([2, 1], 2)
    assert content(kept, 0) == [[600, 601], [500, 501]]
    assert kept.columns == 2

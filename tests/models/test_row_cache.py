"""Rows that join and leave keep their own keys and values, each ending at the last column."""

from __future__ import annotations

import random

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


def joined(*caches: RowCache) -> RowCache:
    for other in caches[1:]:
        caches[0].join(other)
    return caches[0]


def test_joined_rows_end_together():
    assert content(joined(filled(1, 4, 1), filled(2, 2, 5)), 0) == [
        [100, 101, 102, 103],
        [0, 0, 500, 501],
        [0, 0, 600, 601],
    ]
    assert content(joined(filled(1, 1, 3), filled(1, 2, 1)), 1) == [[0, 1300], [1100, 1101]]


def test_kept_rows_lose_the_columns_that_were_padding():
    cache = joined(filled(1, 4, 1), filled(2, 2, 5))
    assert cache.keep([2, 1], 2) == [2, 1]
    assert content(cache, 0) == [[600, 601], [500, 501]]
    assert cache.columns == 2


def test_a_row_that_leaves_gives_its_place_to_another_and_one_that_joins_finds_room():
    """Five rows have room for one more (a quarter); the last takes the second's place, and nothing else moves."""
    cache = joined(filled(4, 3, 1), filled(1, 3, 5))
    before = cache.layers[0].keys.data_ptr()
    assert cache.keep([0, 2, 3, 4], 3) == [0, 4, 2, 3]
    cache.join(filled(2, 1, 8))
    assert cache.layers[0].keys.data_ptr() == before
    assert content(cache, 0) == [
        [100, 101, 102], [500, 501, 502], [300, 301, 302], [400, 401, 402], [0, 0, 800], [0, 0, 900]
    ]  # fmt: skip


def test_what_is_given_is_never_written_to():
    given = torch.ones(1, 1, 2, 2)
    cache = RowCache.of([(given.expand(3, -1, -1, -1), given.expand(3, -1, -1, -1))])
    cache.keep([2, 0], 2)
    cache.join(RowCache.of([(2 * given, 2 * given)]))
    cache.update(torch.full((3, 1, 1, 2), 3.0), torch.full((3, 1, 1, 2), 3.0), 0)
    assert bool((given == 1).all())
    assert cache.layers[0].keys[:, 0, :, 0].tolist() == [[1, 1, 3], [1, 1, 3], [2, 2, 3]]


def test_rows_that_come_and_go_at_random_keep_their_own_tokens():
    """Against lists of numbers, through growth to the right, below, and shrinking from the left."""
    draw = random.Random(0)
    cache, rows = filled(1, 3, 0), [[0, 1, 2]]
    for number in range(1, 120):
        choice = draw.choice(["join", "keep", "step", "step"])
        if choice == "join":
            width = draw.randint(1, 9)
            cache.join(filled(1, width, number))
            rows.append([100 * number + column for column in range(width)])
        elif choice == "keep" and len(rows) > 2:
            stay = sorted(draw.sample(range(len(rows)), len(rows) - draw.randint(1, 2)))
            order = cache.keep(stay, max(len(rows[place]) for place in stay))
            assert sorted(order) == stay
            rows = [rows[place] for place in order]
        else:
            state = torch.full((len(rows), 1, 1, 2), float(number))
            for layer in range(2):
                cache.update(state, -state, layer)
            rows = [[*row, number] for row in rows]
        widest = max(map(len, rows))
        assert content(cache, 0) == [[0] * (widest - len(row)) + row for row in rows]

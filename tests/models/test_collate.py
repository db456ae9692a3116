"""Padding-free batches, worked out by hand."""

from __future__ import annotations

from raytune_ft.models.chat import Encoded
from raytune_ft.models.collate import group_by_budget, pack


def test_rows_lie_end_to_end_and_targets_point_at_their_predecessor() -> None:
    batch = pack([Encoded([5, 6, 7], [True, False, True]), Encoded([8, 9], [False, True])])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.cu_seq_lens.tolist() == [0, 3, 5]
    # Token 5 is supervised but first in its row: nothing predicts it. 7 is predicted at place 1, 9 at place 3.
    assert batch.predictors.tolist() == [1, 3]
    assert batch.targets.tolist() == [7, 9]
    assert batch.row_of_target.tolist() == [0, 1]
    assert (batch.rows, batch.tokens, batch.longest) == (2, 5, 3)
    assert batch.part(1, 2).longest == 2
    assert batch.to("meta").longest == 3


def test_a_batch_without_targets_keeps_its_tokens() -> None:
    batch = pack([Encoded([5, 6], [True, True])]).without_targets()
    assert batch.tokens == 2
    assert batch.targets.tolist() == []


def test_groups_hold_the_budget_and_every_row_once() -> None:
    lengths = [3, 10, 4, 4, 12]
    groups = group_by_budget(lengths, 12)
    assert groups == [[4], [1], [2, 3, 0]]  # 12; 10; 4 + 4 + 3
    assert group_by_budget([20], 12) == [[0]]  # longer than the budget: alone


def test_padded_groups_count_the_longest_row_for_each() -> None:
    # 6 + 6 fits in 12; unpadded a third row of 1 would need 13.
    assert group_by_budget([6, 5, 1], 12, padded=True) == [[0, 1], [2]]


def test_no_rows_make_no_groups() -> None:
    assert group_by_budget([], 12) == []

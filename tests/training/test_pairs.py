"""Pairs as batches: which tokens count, what stays together, and which datasets are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from raytune_ft.core.errors import DataError
from raytune_ft.training.batches import packed_steps
from raytune_ft.training.micro_batches import divided
from raytune_ft.training.pairs import PairRows, refuse_unpaired

COLUMNS = ("input_ids", "supervised", "rejected_input_ids", "rejected_supervised")


def rows_of(tmp_path: Path, *pairs: tuple[list[int], list[int], list[int], list[int]]) -> PairRows:
    path = tmp_path / "pairs.parquet"
    kinds = (pa.list_(pa.int32()), pa.list_(pa.bool_())) * 2
    columns = [pa.array(column, kind) for column, kind in zip(zip(*pairs, strict=True), kinds, strict=True)]
    pq.write_table(pa.table(columns, names=list(COLUMNS)), path)
    return PairRows([str(path)], str(tmp_path / "cache"))


def marks(*bits: int) -> list[bool]:
    return [bool(bit) for bit in bits]


def test_rows_lie_chosen_then_rejected_and_only_their_answers_are_targets(tmp_path: Path) -> None:
    # Both rows begin with a question (1, 2), an answer that is supervised (3, 4), and a question (5).
    data = rows_of(
        tmp_path,
        ([1, 2, 3, 4, 5, 6, 7, 9], marks(0, 0, 1, 1, 0, 1, 1, 1), [1, 2, 3, 4, 5, 6, 8], marks(0, 0, 1, 1, 0, 1, 1)),
        ([1, 7], marks(0, 1), [1, 8, 9], marks(0, 1, 1)),
    )
    batch = data.packed([0, 1])
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 9, 1, 2, 3, 4, 5, 6, 8, 1, 7, 1, 8, 9]]
    assert batch.cu_seq_lens.tolist() == [0, 8, 15, 17, 20]
    # The answer's first token (6) is the same in both, and still belongs to the answers.
    assert batch.targets.tolist() == [6, 7, 9, 6, 8, 7, 8, 9]
    assert batch.row_of_target.tolist() == [0, 0, 0, 1, 1, 2, 3, 3]
    assert (batch.units, batch.items, batch.rows) == (2, 2, 4)
    assert data.lengths([1, 0]) == [5, 15]
    assert data[1].input_ids == [1, 7]


def test_an_answer_that_goes_on_where_the_other_ends_keeps_its_tokens(tmp_path: Path) -> None:
    data = rows_of(tmp_path, ([1, 2, 3, 4], marks(0, 1, 1, 1), [1, 2, 3], marks(0, 1, 1)))
    batch = data.packed([0])
    assert batch.targets.tolist() == [2, 3, 4, 2, 3]


def test_parts_of_a_batch_are_whole_pairs_with_their_reference(tmp_path: Path) -> None:
    pairs = [([1, 2, n], marks(0, 1, 1), [1, n], marks(0, 1)) for n in range(3, 8)]
    data = rows_of(tmp_path, *pairs)
    data.reference = np.arange(10, dtype=np.float32).reshape(5, 2)
    whole = data.packed([4, 0, 1, 2, 3])
    assert whole.reference.tolist() == [8, 9, 0, 1, 2, 3, 4, 5, 6, 7]
    parts = divided([whole], 4)
    assert [part.units for part in parts] == [1, 1, 1, 2]
    assert torch.cat([part.reference for part in parts]).tolist() == whole.reference.tolist()
    assert torch.cat([part.targets for part in parts]).tolist() == whole.targets.tolist()
    assert [part.row_of_target.tolist() for part in parts][-1] == [0, 0, 1, 2, 2, 3]
    assert len(divided([whole], 99)) == 5
    empty = whole.without_targets()
    assert (empty.items, empty.units, empty.tokens) == (0, 5, whole.tokens)


def test_a_budget_of_tokens_counts_both_rows_of_a_pair(tmp_path: Path) -> None:
    data = rows_of(tmp_path, *[([1, 2, n], marks(0, 1, 1), [1, n], marks(0, 1)) for n in range(3, 8)])
    (batch,) = [next(packed_steps(data, 5, 0, start=0, rank=0, world_size=1, micro_batches=1, token_budget=10))]
    assert [micro.tokens for micro in batch] == [10, 10, 5]


@pytest.mark.parametrize("statistics", [True, False])
def test_a_dataset_with_rows_that_are_no_pairs_is_refused_by_count(statistics: bool, tmp_path: Path) -> None:
    path, other, plain = (tmp_path / f"{name}.parquet" for name in "abc")
    ids = pa.array([[1], None, [2], None], pa.list_(pa.int32()))
    pq.write_table(pa.table({"rejected_input_ids": ids}), path, write_statistics=statistics, row_group_size=2)
    pq.write_table(pa.table({"rejected_input_ids": ids.slice(2, 1)}), other, write_statistics=statistics)
    pq.write_table(pa.table({"input_ids": ids}), plain)
    refuse_unpaired({"train": [str(other)]}, "d")
    with pytest.raises(DataError, match="d: 2 of 5 rows are no preferences"):
        refuse_unpaired({"train": [str(path)], "validation": [str(other)]}, "d")
    with pytest.raises(DataError, match="4 of 4 rows are no preferences"):
        refuse_unpaired({"train": [str(plain)]}, "d")

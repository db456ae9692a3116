"""Which rows make up which step."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from dataclasses import fields
from itertools import islice
from pathlib import Path

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from moto.server import ThreadedMotoServer

from raytune_ft.core.errors import ArtifactError, DataError
from raytune_ft.core.storage import Location
from raytune_ft.models.collate import pack
from raytune_ft.training.batches import (
    TokenRows,
    evaluation_batches,
    one_ahead,
    packed_steps,
    rank_share,
    say_disliked,
    step_rows,
    within_budget,
)


def test_every_epoch_has_every_row_once_in_an_order_of_its_own() -> None:
    steps = list(islice(step_rows(10, 4, seed=1), 6))
    first, second = ([row for step in epoch for row in step] for epoch in (steps[:3], steps[3:]))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert [len(step) for step in steps] == [4, 4, 2, 4, 4, 2]


def test_a_later_start_continues_the_same_order() -> None:
    whole = list(islice(step_rows(10, 4, seed=1), 8))
    assert list(islice(step_rows(10, 4, seed=1, start=5), 3)) == whole[5:]


def test_ranks_and_micro_batches_share_a_step_without_loss_or_overlap() -> None:
    rows = [7, 3, 9, 1, 4, 8, 2]
    shares = [rank_share(rows, rank, 2, 2) for rank in range(2)]
    assert shares == [[[7, 4], [9, 2]], [[3, 8], [1]]]
    assert sorted(row for share in shares for micro in share for row in micro) == sorted(rows)


def test_rows_packed_at_once_are_those_packed_one_by_one(splits: dict[str, list[str]], tmp_path) -> None:
    data = TokenRows(splits["train"], str(tmp_path / "cache"))
    numbers = [7, 0, 16, 7]
    whole, single = data.packed(numbers), pack([data[number] for number in numbers])
    assert whole.rows == 4
    assert whole.places is single.places is None
    assert whole.longest == single.longest == max(len(data[number].input_ids) for number in numbers)
    for part in (part for part in fields(whole) if part.name not in {"places", "longest"}):
        one, other = getattr(whole, part.name), getattr(single, part.name)
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_a_rank_without_rows_takes_part_without_targets(splits: dict[str, list[str]], tmp_path) -> None:
    data = TokenRows(splits["train"], str(tmp_path / "cache"))
    # 18 rows in batches of 17: the second step has one row, so rank 1 has none.
    where = {"batch_size": 17, "seed": 0, "start": 1, "world_size": 2, "micro_batches": 1}
    [mine], [others] = (next(packed_steps(data, rank=rank, **where)) for rank in range(2))
    assert len(mine.targets) > 0
    assert len(others.targets) == 0
    assert others.tokens > 0


def test_a_token_budget_divides_what_is_too_much_and_no_row() -> None:
    lengths = {0: 5, 1: 9, 2: 3, 3: 20, 4: 1}
    assert within_budget([[0, 1, 2], [3, 4], []], lengths, 12) == [[1], [0, 2], [3], [4]]
    assert within_budget([[0, 1, 2], [3, 4]], lengths, 100) == [[1, 0, 2], [3, 4]]


@pytest.mark.parametrize("world_size", [1, 3])
def test_within_a_token_budget_all_ranks_have_as_many_micro_batches_and_each_row_is_there_once(
    splits: dict[str, list[str]], tmp_path, world_size: int
) -> None:
    data = TokenRows(splits["train"], str(tmp_path / "cache"))
    longest = max(data.lengths(range(len(data))))
    assert longest == max(len(data[number].input_ids) for number in range(len(data)))
    where = {"batch_size": 13, "seed": 0, "start": 0, "world_size": world_size, "micro_batches": 2}
    steps = [next(packed_steps(data, rank=rank, token_budget=longest + 30, **where)) for rank in range(world_size)]
    assert len({len(micros) for micros in steps}) == 1
    assert all(micro.tokens <= longest + 30 for micros in steps for micro in micros)
    found = [micro for micros in steps for micro in micros if len(micro.targets)]
    assert sorted(place for micro in found for place in micro.places.tolist()) == list(range(13))
    rows = next(step_rows(len(data), 13, 0))
    assert sum(micro.rows for micro in found) == 13
    assert sorted(int(token) for micro in found for token in micro.targets) == sorted(
        int(token) for token in data.packed(rows).targets
    )


def test_one_ahead_gives_the_same_batches_and_has_the_next_one_ready() -> None:
    made: list[int] = []
    second = threading.Event()

    def batches() -> Iterator[int]:
        for number in range(4):
            made.append(number)
            if number == 1:
                second.set()
            yield number

    found = one_ahead(batches())
    assert next(found) == 0
    assert second.wait(10)  # nobody asked for it yet
    assert [0, *found] == [0, 1, 2, 3] == made


def test_one_ahead_passes_on_what_went_wrong() -> None:
    def batches() -> Iterator[int]:
        yield 1
        raise ValueError("row 2 cannot be read")

    found = one_ahead(batches())
    assert next(found) == 1
    with pytest.raises(ValueError, match="row 2"):
        next(found)


def labelled(path: Path, labels: list[bool | None]) -> str:
    ids = [[1, 10 + number] for number in range(len(labels))]
    kept = [[False, True]] * len(labels)
    columns = {"input_ids": ids, "supervised": kept, "label": pa.array(labels, pa.bool_())}
    pq.write_table(pa.table(columns), path)
    return str(path)


def test_answers_that_people_disliked_are_no_examples(tmp_path: Path, caplog) -> None:
    file = labelled(tmp_path / "a.parquet", [True, False, None, False, True])
    rows = TokenRows([file], str(tmp_path / "cache"))
    assert (len(rows), rows.disliked) == (3, 2)
    assert [rows[number].input_ids[1] for number in range(3)] == [10, 12, 14]
    assert rows.packed([2, 0]).input_ids.tolist() == [[1, 14, 1, 10]]
    with caplog.at_level(logging.WARNING, "raytune_ft"):
        say_disliked(
            {"train": rows, "validation": TokenRows([labelled(tmp_path / "b.parquet", [None])], str(tmp_path))}
        )
    assert "2 train rows are answers that people disliked" in caplog.text


def test_nothing_but_disliked_answers_is_refused(tmp_path: Path) -> None:
    file = labelled(tmp_path / "a.parquet", [False, False])
    with pytest.raises(DataError, match="all 2 rows are answers that people disliked"):
        TokenRows([file], str(tmp_path / "cache"))


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[tuple[str, str]]:
    """A bucket of an S3 server on this machine, and what a URI says to reach it without the environment's help."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {"ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    boto3.client("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket="rows")
    yield "s3://rows", f"?endpoint_override={host}:{port}&scheme=http&region=us-east-1"
    server.stop()


def test_rows_on_an_object_store_are_read_from_a_copy_until_the_file_changes(
    bucket: tuple[str, str], tmp_path: Path
) -> None:
    base, options = bucket
    uri = f"{base}/d ata/train-0.parquet{options}"
    assert len(put(uri, labelled(tmp_path / "a.parquet", [None] * 3), tmp_path / "1")) == 3
    (copy,) = (tmp_path / "home").rglob("*.parquet")
    written = copy.stat().st_mtime_ns
    assert TokenRows([uri], str(tmp_path / "2"))[2].input_ids == [1, 12]
    assert copy.stat().st_mtime_ns == written  # not fetched again
    assert len(put(uri, labelled(tmp_path / "b.parquet", [None] * 5), tmp_path / "3")) == 5
    with pytest.raises(ArtifactError, match=r"s3://rows/missing.*no such file"):
        TokenRows([f"{base}/missing.parquet{options}"], str(tmp_path / "4"))


def put(uri: str, file: str, cache: Path) -> TokenRows:
    Location.at(uri).write(Path(file).read_bytes())
    return TokenRows([uri], str(cache))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_evaluate_every_row_once_in_as_many_batches_each(
    world_size: int, splits: dict[str, list[str]], tmp_path: Path
) -> None:
    """4 rows, of which one rank of three has two; the others stand in with a row that does not count."""
    data = TokenRows(splits["validation"], str(tmp_path / "cache"))
    ranks = [list(evaluation_batches(data, 1, rank, world_size)) for rank in range(world_size)]
    assert {len(batches) for batches in ranks} == {-(-4 // world_size)}
    targets = [batch.targets.tolist() for batches in ranks for batch in batches if batch.items]
    assert sorted(targets) == sorted(pack([data[number]]).targets.tolist() for number in range(4))
    some = list(evaluation_batches(data, 2, 0, 1, [3, 1, 2]))
    assert [batch.rows for batch in some] == [2, 1]
    assert some[1].targets.tolist() == pack([data[2]]).targets.tolist()

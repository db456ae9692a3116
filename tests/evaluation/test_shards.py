"""Rows on storage: what is there is never computed again, and what failed is asked again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest

from raytune_ft.core.errors import ArtifactError, DataError, ModelError
from raytune_ft.core.records import Message, Record
from raytune_ft.core.storage import Location
from raytune_ft.evaluation.inference import shares
from raytune_ft.evaluation.kept import GOES_ON, KeptRows, folder_name
from raytune_ft.evaluation.results import ModelScores
from raytune_ft.evaluation.scorer import OnRows
from raytune_ft.evaluation.shards import (
    DONE_SCHEMA,
    ShardActor,
    close_shard,
    fault_in,
    fault_table,
    shard_table,
    work_off,
)
from raytune_ft.evaluation.workload import Target, Workload


def records(*positions: int) -> list[Record]:
    return [Record(messages=(Message("user", f"q{n}"),), reference="r", position=n) for n in positions]


class Upper:
    """A scorer that answers in capitals, a row at a time; it breaks at some rows."""

    def __init__(self, *, dies_at: int | None = None, fails_at: int | None = None) -> None:
        self.dies_at, self.fails_at = dies_at, fails_at
        self.asked: list[int] = []

    def measure(self, label: str, records: Sequence[Record], on_rows: OnRows) -> None:
        for record in records:
            self.asked.append(record.position)
            row = {"position": record.position, "id": record.id}
            if record.position == self.dies_at:
                raise RuntimeError("the machine went away")
            if record.position == self.fails_at:
                on_rows([{**row, "error": "timed out"}])
            else:
                said = record.messages[0].content.upper()
                on_rows([{**row, "answer": said, "answer_tokens": 2, "finish_reason": "length"}])


@pytest.fixture
def kept(tmp_path: Path) -> KeptRows:
    return KeptRows(Location.at(tmp_path / "pieces"))


def test_a_second_attempt_asks_only_for_what_the_first_left(kept: KeptRows) -> None:
    first = Upper(dies_at=3)
    with pytest.raises(RuntimeError):
        work_off(first, kept, "m", "0", records(0, 1, 2, 3, 4))
    second = Upper()
    done = work_off(second, kept, "m", "0", records(0, 1, 2, 3, 4))
    assert second.asked == [3, 4]
    assert done == {
        "target": "m", "shard": "0", "answered": 5, "failed": 0, "tokens": 10, "cut_off": 5, "fault": None,
    }  # fmt: skip
    assert {n: row["answer"] for n, row in kept.all_answered("m").items()} == {n: f"Q{n}" for n in range(5)}


def test_rows_without_an_answer_are_told_and_asked_again(kept: KeptRows) -> None:
    assert work_off(Upper(fails_at=1), kept, "m", "0", records(0, 1))["failed"] == 1
    assert kept.all_failed("m")[1]["error"] == "timed out"
    again = Upper()
    work_off(again, kept, "m", "0", records(0, 1))
    assert again.asked == [1]
    assert kept.all_failed("m") == {}


def test_other_content_in_the_place_of_a_kept_row_is_measured_anew(kept: KeptRows) -> None:
    work_off(Upper(), kept, "m", "0", records(0))
    again = Upper()
    work_off(again, kept, "m", "0", [Record(messages=(Message("user", "other"),), position=0)])
    assert again.asked == [0]


def test_targets_are_kept_apart(kept: KeptRows) -> None:
    work_off(Upper(), kept, "a/b", "0", records(0))
    assert kept.all_answered("c") == {}
    assert set(kept.all_answered("a/b")) == {0}


def test_labels_that_differ_never_share_a_folder(kept: KeptRows) -> None:
    labels = ["модель", "другая", "lr=1", "lr-1", "a b", "a-b", "a/b", ".", "..", "\ud83d"]
    assert len({folder_name(label) for label in labels}) == len({ModelScores(x, "", "", {}, {}).file for x in labels})
    assert len({folder_name(label) for label in labels}) == len(labels)
    assert [folder_name(label) for label in ("tuned", "lr-1.5_b")] == ["tuned", "lr-1.5_b"]
    work_off(Upper(), kept, "модель", "0", records(0))
    assert kept.all_answered("другая") == kept.all_answered(".") == {}


def test_an_actor_tells_a_fault_as_a_row_and_keeps_what_it_did(tiny_model: Path, kept: KeptRows) -> None:
    work = Workload(answers=False, likelihoods=True)
    targets = [Target("m", str(tiny_model))]
    actor = ShardActor(targets, work, kept.where.uri, threads=1, concurrency=1)
    table = pa.concat_tables([shard_table(records(0, 1), "m", "a"), shard_table(records(5), "m", "b")])
    done = actor(table)
    assert done.schema == DONE_SCHEMA
    assert [(row["shard"], row["answered"]) for row in done.to_pylist()] == [("a", 2), ("b", 1)]
    broken = ShardActor([Target("m", str(kept.where.path))], work, kept.where.uri, threads=1, concurrency=1)
    fault = fault_in(broken(table).to_pylist()[0])
    assert isinstance(fault, ModelError)


def test_a_shard_that_could_not_be_read_is_told_behind_those_that_could(tiny_model: Path, kept: KeptRows) -> None:
    actor = ShardActor([Target("m", str(tiny_model))], Workload(False, True), kept.where.uri, threads=1, concurrency=1)
    unread = fault_table(DataError("p.jsonl:2: has no prompt"), "m", "b")
    done = actor(pa.concat_tables([shard_table(records(0), "m", "a"), unread])).to_pylist()
    assert [(row["shard"], row["answered"]) for row in done] == [("a", 1), ("b", 0)]
    fault = fault_in(done[1])
    assert isinstance(fault, DataError)
    assert str(fault) == "p.jsonl:2: has no prompt"


def test_shards_are_large_unless_every_actor_is_to_have_work() -> None:
    assert shares(4, 40, even=False) == (1, 64)
    assert shares(4, 40, even=True) == (4, 10)
    assert shares(2, 5000, even=False) == (2, 512)


def test_a_closed_shard_is_one_file_in_the_order_of_its_rows(kept: KeptRows, tmp_path: Path) -> None:
    work_off(Upper(fails_at=1), kept, "m", "0", records(2, 0, 1))
    close_shard(pa.table({"shard": ["0"]}), kept, "m", Location.at(tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "0.jsonl").read_text().splitlines()]
    assert [(row["position"], row.get("answer"), row.get("error")) for row in rows] == [
        (0, "Q0", None),
        (1, None, "timed out"),
        (2, "Q2", None),
    ]


def test_a_shard_that_storage_does_not_take_is_told_with_the_place(kept: KeptRows, tmp_path: Path) -> None:
    work_off(Upper(), kept, "m", "0", records(0))
    (tmp_path / "answers").symlink_to("/dev/full")  # no folder
    (closed,) = close_shard(pa.table({"shard": ["0"]}), kept, "m", Location.at(tmp_path / "answers")).to_pylist()
    fault = fault_in(closed)
    assert isinstance(fault, ArtifactError)
    assert f"{tmp_path / 'answers'}: the storage refused: " in str(fault)
    assert str(fault).endswith(GOES_ON)


def test_a_long_shard_says_how_far_it_is(kept: KeptRows, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "raytune_ft")
    work_off(Upper(), kept, "m", "0", records(0, 1, 2), tell_s=0)
    assert [record.message for record in caplog.records] == ["m: 1 of 3 rows of a shard", "m: 2 of 3 rows of a shard"]
    work_off(Upper(), kept, "m", "1", records(0, 1, 2))
    assert len(caplog.records) == 2  # it was over before there was anything to say


_WORKER = """
import sys
from raytune_ft.core.records import Message, Record
from raytune_ft.evaluation import shards
from raytune_ft.evaluation.workload import Target, Workload
from raytune_ft.models.config import DecodingConfig
shards._KEEP_ROWS = 4
rows = [Record(messages=(Message("user", f"order {n}"),), position=n) for n in range(60)]
work = Workload(answers=True, decoding=DecodingConfig(max_new_tokens=400))
actor = shards.ShardActor([Target("m", sys.argv[1])], work, sys.argv[2], threads=1, concurrency=1)
print(actor(shards.shard_table(rows, "m", "0")).to_pylist()[0]["answered"])
"""


def test_rows_that_storage_does_not_take_are_a_fault_that_names_the_place(tiny_model: Path, kept: KeptRows) -> None:
    Path(kept.where.path).symlink_to("/dev/full")  # no folder
    work = Workload(answers=False, likelihoods=True)
    actor = ShardActor([Target("m", str(tiny_model))], work, kept.where.uri, threads=1, concurrency=1)
    row = Record(messages=(Message("user", "red"),), reference="blue", position=0)
    fault = fault_in(actor(shard_table([row], "m", "0")).to_pylist()[0])
    assert isinstance(fault, ArtifactError)
    assert f"{kept.where}: the storage refused: " in str(fault) and str(fault).endswith(GOES_ON)


@pytest.mark.soak
def test_a_killed_process_loses_only_the_rows_that_were_under_way(tiny_model: Path, kept: KeptRows) -> None:
    command = [sys.executable, "-c", _WORKER, str(tiny_model), kept.where.uri]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    first = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not kept.where.files() and time.monotonic() < deadline:
        time.sleep(0.02)
    first.kill()
    first.wait()
    before = {name: Path(kept.where.path, name).stat().st_mtime_ns for name in kept.where.files()}
    assert 0 < len(kept.all_answered("m")) < 60
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "60"
    assert len(kept.all_answered("m")) == 60
    assert all(Path(kept.where.path, name).stat().st_mtime_ns == when for name, when in before.items())

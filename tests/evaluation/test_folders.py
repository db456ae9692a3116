"""Which files of a folder hold rows: links that lead nowhere are refused, and what is passed over is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from raytune_ft.core.errors import DataError
from raytune_ft.core.manifest import Parent
from raytune_ft.core.storage import Location
from raytune_ft.evaluation.exposures import LogFiles, log_lines
from raytune_ft.evaluation.folders import files_of, files_of_split
from raytune_ft.evaluation.lineage import _training_data
from raytune_ft.evaluation.production import feedback_files
from raytune_ft.evaluation.prompts import prompt_files
from raytune_ft.evaluation.rows import read_rows

ROW = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.jsonl", "test/1.jsonl", "train/1.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(ROW) + "\n")
    return tmp_path


def logged(path: str) -> list[object]:
    return list(log_lines(path, LogFiles(path), setting="exposures_path"))


@pytest.mark.parametrize("read", [lambda path: prompt_files(path, None), feedback_files, logged])
def test_links_that_lead_nowhere_are_refused_where_a_folder_is_read_whole(
    folder: Path, read: Callable[[str], object]
) -> None:
    (folder / ".hidden.jsonl").symlink_to("gone.jsonl")
    (folder / "more.jsonl").symlink_to("a.jsonl")
    read(str(folder))
    (folder / "b.jsonl").symlink_to("gone.jsonl")
    (folder / "test/shards").symlink_to(folder / "gone")
    with pytest.raises(DataError, match=r"links that lead nowhere: b\.jsonl, test/shards; put back what they lead to"):
        read(str(folder))


@pytest.mark.parametrize("read", [lambda path: prompt_files(path, "test"), lambda path: read_rows(path, "test")])
def test_links_that_lead_nowhere_are_refused_where_they_are_of_the_split(
    folder: Path, read: Callable[[str], object]
) -> None:
    (folder / "b.jsonl").symlink_to("gone.jsonl")
    (folder / "train/2.jsonl").symlink_to("gone.jsonl")
    read(str(folder))
    (folder / "test/2.jsonl").symlink_to("gone.jsonl")
    (folder / "test.jsonl").symlink_to("gone.jsonl")
    with pytest.raises(DataError, match=r"links that lead nowhere: test\.jsonl, test/2\.jsonl; put back"):
        read(str(folder))


def test_a_split_that_is_a_link_to_nothing_is_refused(folder: Path) -> None:
    (folder / "held_out").symlink_to("gone")
    with pytest.raises(DataError, match=r"links that lead nowhere: held_out; put back"):
        files_of_split(Location.at(folder), "held_out")


def test_training_rows_behind_a_link_that_leads_nowhere_could_not_be_looked_into(folder: Path) -> None:
    (folder / "train/2.jsonl").symlink_to("gone.jsonl")
    found = _training_data(Parent(role="dataset", where=str(folder), digest="d"))
    assert found.files == () and "links that lead nowhere: train/2.jsonl" in str(found.unreadable)


def test_files_of_other_kinds_are_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("b.jsonl.gz", "test/c.csv", ".hidden"):
        (folder / name).write_text("x")
    found = files_of(Location.at(folder))
    assert [file.uri.removeprefix(f"{folder}/") for file in found] == ["a.jsonl", "test/1.jsonl", "train/1.jsonl"]
    assert [file.name for file in files_of_split(Location.at(folder), "test")] == ["1.jsonl"]
    assert caplog.messages == [
        f"{folder}: passed over 2 files that are not named *.jsonl or *.parquet: b.jsonl.gz, test/c.csv",
        f"{folder}: passed over 1 file that is not named *.jsonl or *.parquet: test/c.csv",
    ]

from __future__ import annotations

from pathlib import Path

import pytest

from raytune_ft.core.errors import DataError
from raytune_ft.data.sources import find_files, source_parents


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.jsonl", "b.csv", "sub/a.jsonl", "notes.md", ".hidden.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    return tmp_path


def test_a_folder_gives_its_files_of_known_kinds_in_order(folder: Path) -> None:
    found = find_files([str(folder)])
    assert [(Path(f.uri).relative_to(folder).as_posix(), f.kind, f.number) for f in found] == [
        ("a.jsonl", "jsonl", 0),
        ("b.csv", "csv", 1),
        ("sub/a.jsonl", "jsonl", 2),
    ]


def test_files_of_the_same_name_are_told_apart_by_their_folder(folder: Path) -> None:
    assert [f.label for f in find_files([str(folder / "a.jsonl"), str(folder / "b.csv")])] == ["a.jsonl", "b.csv"]
    labels = [f.label for f in find_files([str(folder / "*.jsonl"), str(folder / "sub")])]
    assert labels == [f"{folder.name}/a.jsonl", "sub/a.jsonl"]


def test_a_star_stays_in_its_folder_and_two_stars_go_below(folder: Path) -> None:
    assert len(find_files([str(folder / "*.jsonl")])) == 1
    assert len(find_files([str(folder / "**/*.jsonl")])) == 2


def test_test_files_come_first_and_cannot_be_sources_too(folder: Path) -> None:
    found = find_files([str(folder / "a.jsonl")], [str(folder / "b.csv")])
    assert [(f.label, f.is_test) for f in found] == [("b.csv", True), ("a.jsonl", False)]
    with pytest.raises(DataError, match="stands in sources and in test_sources"):
        find_files([str(folder)], [str(folder / "a.jsonl")])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone.jsonl", "gone.jsonl: there is no such file or folder"),
        ("*.parquet", "no file to read matches"),
        ("notes.md", "of no known kind"),
        ("empty.jsonl", "is empty"),
        ("bare", "holds no file to read"),
    ],
)
def test_a_source_without_rows_is_named(folder: Path, name: str, message: str) -> None:
    (folder / "empty.jsonl").touch()
    (folder / "bare").mkdir()
    with pytest.raises(DataError, match=message.replace("*", r"\*")):
        find_files([str(folder / name)])


def test_the_digest_of_a_source_changes_with_its_content(folder: Path) -> None:
    before = source_parents([str(folder)], "source")
    assert source_parents([str(folder)], "source") == before
    (folder / "sub/a.jsonl").write_text("[]\n")
    assert source_parents([str(folder)], "source")[0].digest != before[0].digest

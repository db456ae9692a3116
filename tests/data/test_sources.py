from __future__ import annotations

from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raytune_ft.core.draft import begin
from raytune_ft.core.errors import DataError
from raytune_ft.core.manifest import ArtifactKind
from raytune_ft.core.storage import Location
from raytune_ft.data.config import DatasetFormat
from raytune_ft.data.export import export_splits
from raytune_ft.data.readers import read_rows
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


def test_links_that_lead_nowhere_are_refused_and_named(folder: Path) -> None:
    (folder / "c.jsonl").symlink_to("gone.jsonl")
    (folder / "sub/shards").symlink_to(folder / "gone")
    (folder / "sub/self.csv").symlink_to("self.csv")
    (folder / "sub/up").symlink_to(folder)
    (folder / ".hidden.csv").symlink_to("gone.csv")
    with pytest.raises(DataError, match=r"links that lead nowhere: c\.jsonl, sub/self\.csv, sub/shards; put back"):
        find_files([str(folder)])
    with pytest.raises(DataError, match=r"holds links that lead nowhere: c\.jsonl; put back"):
        find_files([str(folder / "*.jsonl")])
    assert [f.label for f in find_files([str(folder / "*.csv")])] == ["b.csv"]


def test_links_below_an_output_of_ours_do_not_count(folder: Path) -> None:
    (folder / "sub/manifest.json").write_text("{}")
    (folder / "sub/c.jsonl").symlink_to("gone.jsonl")
    assert [f.label for f in find_files([str(folder)])] == ["a.jsonl", "b.csv"]


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


def test_a_file_is_read_once_by_whatever_links_it_is_met(folder: Path) -> None:
    (folder / "round").symlink_to(folder)
    other = folder.with_name(f"{folder.name}-other")
    other.symlink_to(folder)
    labels = [file.label for file in find_files([str(folder), str(other)])]
    assert labels == [f"{folder.name}/a.jsonl", f"{folder.name}/b.csv", "sub/a.jsonl"]
    with pytest.raises(DataError, match="stands in sources and in test_sources"):
        find_files([str(folder)], [str(other / "a.jsonl")])


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


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.parquet.gz", "parquet is compressed inside already"),
        ("hf:", "expected hf:org/name"),
        ("hf:a:b:c", "expected hf:org/name"),
        ("hf:a@b@c", "expected hf:org/name"),
    ],
)
def test_what_cannot_be_a_source_is_said_before_anything_is_read(folder: Path, name: str, message: str) -> None:
    (folder / "a.parquet.gz").write_text("x")
    with pytest.raises(DataError, match=message):
        find_files([name if name.startswith("hf:") else str(folder / name)])


def test_endings_in_capitals_and_compressed_ones_are_known(tmp_path: Path) -> None:
    for name in ("A.JSONL", "b.json.gz", "c.txt.zst", "d.csv.bz2", "e.ndjson"):
        (tmp_path / name).write_text("x")
    assert [f.kind for f in find_files([str(tmp_path)])] == ["jsonl", "json", "text", "csv", "jsonl"]


def test_a_dataset_saved_to_disk_is_a_source_of_its_rows_only(tmp_path: Path) -> None:
    rows = [{"prompt": f"Q{n}", "completion": "A"} for n in range(5)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "one", num_shards=2)
    files = find_files([str(tmp_path / "one")])
    assert [(f.label, f.kind) for f in files] == [
        ("data-00000-of-00002.arrow", "arrow"),
        ("data-00001-of-00002.arrow", "arrow"),
    ]
    assert [row.values for file in files for row in read_rows(file)] == rows
    (tmp_path / "one/cache-1234.arrow").write_bytes(b"left by an earlier map()")
    assert find_files([str(tmp_path / "one")]) == files


def test_all_splits_of_a_saved_dataset_are_read_or_the_one_whose_folder_is_given(tmp_path: Path) -> None:
    split = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(tmp_path / "two")
    assert [f.label for f in find_files([str(tmp_path / "two")])] == [
        "test/data-00000-of-00001.arrow",
        "train/data-00000-of-00001.arrow",
    ]
    assert len(find_files([str(tmp_path / "two/train")])) == 1
    (tmp_path / "two/train/data-00000-of-00001.arrow").unlink()
    with pytest.raises(DataError, match=r"train/data-00000-of-00001.arrow: is missing, and .*state.json names it"):
        find_files([str(tmp_path / "two")])


def test_of_a_dataset_of_ours_the_files_of_its_splits_are_read_and_no_export_of_them(tmp_path: Path) -> None:
    with begin(str(tmp_path / "set"), ArtifactKind.DATASET, settings={}) as draft:
        for name in ("train/00000.parquet", "test/00000.parquet", "rejected/00000.parquet"):
            (draft.folder / name).parent.mkdir(exist_ok=True)
            pq.write_table(pa.table({"text": [name]}), draft.folder / name)
    (tmp_path / "set/export").mkdir()
    pq.write_table(pa.table({"text": ["again"]}), tmp_path / "set/export/train.parquet")
    found = [file.uri.removeprefix(f"{tmp_path}/set/") for file in find_files([str(tmp_path / "set")])]
    assert found == ["test/00000.parquet", "train/00000.parquet"]
    (tmp_path / "set/train/00000.parquet").unlink()
    with pytest.raises(DataError, match=r"train/00000.parquet is missing"):
        find_files([str(tmp_path / "set")])


@pytest.mark.parametrize("name", ["manifest.json", "started.json"])
def test_what_runs_wrote_below_a_folder_is_passed_over(
    folder: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = source_parents([str(folder)], "source")
    (folder / "out" / "train").mkdir(parents=True)
    (folder / "out" / name).write_text("{}")
    (folder / "out" / "train" / "0.jsonl").write_text("{}\n")
    assert [f.label for f in find_files([str(folder)])] == [
        f"{folder.name}/a.jsonl",
        f"{folder.name}/b.csv",
        "sub/a.jsonl",
    ]
    assert source_parents([str(folder)], "source") == before
    assert "passed over what runs wrote below it: out" in caplog.text


@pytest.mark.parametrize("output_format", [DatasetFormat.JSONL, DatasetFormat.HUGGINGFACE])
def test_an_export_is_read_back_as_a_folder(tmp_path: Path, output_format: DatasetFormat) -> None:
    split = datasets.Dataset.from_dict({"text": ["a", "b"]})
    export_splits({"train": split}, Location.at(str(tmp_path / "out")), output_format)
    files = find_files([str(tmp_path / "out")])
    assert [row.values for file in files for row in read_rows(file)] == [{"text": "a"}, {"text": "b"}]

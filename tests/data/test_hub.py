from __future__ import annotations

import json
from pathlib import Path

import pytest

from raytune_ft.core.errors import DataError
from raytune_ft.data.hub import HubSource
from raytune_ft.data.readers import read_rows
from raytune_ft.data.sources import find_files, source_parents


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder laid out like a dataset's repository, where `datasets` looks for it before it asks the hub."""
    folder = tmp_path / "org/name"
    for name, numbers in {"train-0": [0, 1], "train-1": [2], "test-0": [3]}.items():
        (folder / "data").mkdir(parents=True, exist_ok=True)
        (folder / f"data/{name}.jsonl").write_text("".join(json.dumps({"text": f"row {n}"}) + "\n" for n in numbers))
    configs = [{"split": split, "path": f"data/{split}-*.jsonl"} for split in ("train", "test")]
    card = {
        "configs": [{"config_name": "main", "data_files": configs}, {"config_name": "other", "data_files": configs[:1]}]
    }
    (folder / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return folder


def test_the_name_of_a_dataset_has_a_configuration_and_a_split() -> None:
    assert HubSource.parse("hf:org/name") == HubSource("org/name")
    assert HubSource.parse("hf:org/name:main@test") == HubSource("org/name", "main", "test")
    assert HubSource.parse(HubSource("org/name", "main", "test").part(2, 3)) == HubSource(
        "org/name", "main", "test", 2, 3
    )


def test_a_dataset_is_read_shard_by_shard_and_only_the_split_that_is_asked_for(repository: Path) -> None:
    files = find_files(["hf:org/name:main"], ["hf:org/name:main@test"])
    assert [(f.label, f.kind, f.is_test) for f in files] == [
        ("name:main@test#0-of-1", "hub", True),
        ("name:main@train#0-of-2", "hub", False),
        ("name:main@train#1-of-2", "hub", False),
    ]
    rows = [[row.values["text"] for row in read_rows(file) if row.values] for file in files]
    assert rows == [["row 3"], ["row 0", "row 1"], ["row 2"]]


def test_a_dataset_in_a_folder_is_found_from_another_working_directory(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file,) = find_files(["hf:org/name:main@test"])
    monkeypatch.chdir("/")
    assert [row.values for row in read_rows(file)] == [{"text": "row 3"}]


def test_what_a_dataset_lacks_is_said_with_what_it_has(repository: Path) -> None:
    with pytest.raises(DataError, match="name:main@dev: has no split 'dev'; name one of train, test behind an @"):
        find_files(["hf:org/name:main@dev"])
    with pytest.raises(DataError, match=r"(?s)name@train: cannot be opened as a dataset: .*main.*other"):
        find_files(["hf:org/name"])


def test_the_digest_of_a_dataset_changes_with_its_files(repository: Path) -> None:
    before = source_parents(["hf:org/name:main"], "source")
    assert source_parents(["hf:org/name:main"], "source") == before
    assert before[0].where == f"hf:{repository}:main@train"
    (repository / "data/train-2.jsonl").write_text('{"text": "more"}\n')
    assert source_parents(["hf:org/name:main"], "source")[0].digest != before[0].digest


def test_without_a_network_it_is_said_what_to_put_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"cannot be reached .* into a folder named org/none .*save_to_disk\(FOLDER\)"):
        find_files(["hf:org/none@test"])

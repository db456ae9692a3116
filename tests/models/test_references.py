"""References lead to the parts of models, or to one clear message."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from raytune_ft.core.draft import begin
from raytune_ft.core.errors import ArtifactError, ModelError
from raytune_ft.core.manifest import ArtifactKind
from raytune_ft.core.storage import Location
from raytune_ft.models.derived import merge
from raytune_ft.models.loading import load_model
from raytune_ft.models.references import check_content, model_parent, resolve_model, shared_model

from .test_loading import make_adapter


def test_a_folder_that_is_not_there_is_named() -> None:
    with pytest.raises(ModelError, match="no such model folder"):
        resolve_model("./nowhere/at/all")


def test_a_folder_without_a_model_says_what_lies_there(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ModelError, match=r"neither config.json nor adapter_config.json .*notes.txt"):
        resolve_model(str(tmp_path))


def test_an_unfinished_artifact_is_no_model(tmp_path: Path) -> None:
    begin(tmp_path / "m", ArtifactKind.MODEL, settings={})
    with pytest.raises(ArtifactError, match="did not finish"):
        resolve_model(str(tmp_path / "m"))


def test_a_name_that_is_no_path_is_taken_as_a_hub_id() -> None:
    assert resolve_model("org/name").base == "org/name"


def test_an_unknown_starter_names_the_known_one() -> None:
    with pytest.raises(ModelError, match="starter:smollm2-135m"):
        resolve_model("starter:llama")


def test_weights_that_changed_on_the_disk_are_refused_before_anything_is_made_of_them(
    tiny_model: Path, tmp_path: Path
) -> None:
    base = merge(str(make_adapter(tiny_model, tmp_path / "first")), str(tmp_path / "base")).local()
    upon = make_adapter(base, tmp_path / "upon")
    assert model_parent(str(upon)).digest == resolve_model(str(upon)).digest
    flip_a_bit(base / "model.safetensors")
    load_model(str(base))  # nothing else would tell
    for reference in (base, upon):
        with pytest.raises(ArtifactError, match=r"base: does not match .* model.safetensors was changed"):
            model_parent(str(reference))
    with pytest.raises(ArtifactError, match=r"model.safetensors was changed"):
        merge(str(upon), str(tmp_path / "merged"))
    check_content(str(upon), with_base=False)


def flip_a_bit(weights: Path) -> None:
    with weights.open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))


def test_the_starter_is_placed_on_shared_storage_as_an_artifact(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    draft = begin(tmp_path / "cache/raytune_ft/starter/smollm2-135m", ArtifactKind.MODEL, settings={})
    with draft:
        shutil.copytree(tiny_model, draft.folder, dirs_exist_ok=True)
    placed = shared_model("starter:smollm2-135m", Location.at(tmp_path / "storage"))
    assert placed == str(tmp_path / "storage/starter-smollm2-135m")
    assert resolve_model(placed).artifact is not None
    assert resolve_model(placed).digest == draft.artifact.digest

"""Which base joins the table, on real folders of a tiny model and its adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from raytune_ft.core.draft import begin
from raytune_ft.core.manifest import ArtifactKind, Parent
from raytune_ft.evaluation.bases import base_of, with_base


@pytest.fixture
def adapter(tiny_model: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tiny_model)}))
    return folder


def test_an_adapter_stands_beside_its_base(adapter: Path, tiny_model: Path) -> None:
    assert base_of(str(adapter)) == str(tiny_model)
    found = with_base({"model": str(adapter)})
    assert list(found.items()) == [("base", str(tiny_model)), ("tuned", str(adapter))]


def test_several_tuned_models_share_one_base_that_comes_first(adapter: Path, tiny_model: Path, tmp_path: Path) -> None:
    second = tmp_path / "second"
    shutil.copytree(adapter, second)
    found = with_base({"adapter": str(adapter), "second": str(second)})
    assert list(found) == ["base", "adapter", "second"]


def test_a_base_that_is_there_already_is_not_measured_twice(adapter: Path, tiny_model: Path, tmp_path: Path) -> None:
    models = {"tiny": str(tiny_model), "adapter": str(adapter)}
    assert with_base(models) == models
    copied = tmp_path / "copy"
    shutil.copytree(tiny_model, copied)
    assert with_base({"adapter": str(adapter), "tiny": f"{tiny_model}/"}) == {
        "adapter": str(adapter),
        "tiny": f"{tiny_model}/",
    }


def test_a_plain_model_has_no_base(tiny_model: Path) -> None:
    assert with_base({"model": str(tiny_model)}) == {"model": str(tiny_model)}


def test_an_artifact_stands_beside_what_it_was_made_from_while_that_is_there(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, where in (("tuned", str(tiny_model)), ("orphan", str(tmp_path / "gone"))):
        draft = begin(
            tmp_path / name, ArtifactKind.MODEL, settings={}, parents=[Parent(role="model", where=where, digest="0")]
        )
        with draft:
            shutil.copytree(tiny_model, draft.folder, dirs_exist_ok=True)
    assert list(with_base({"model": str(tmp_path / "tuned")})) == ["base", "tuned"]
    with caplog.at_level("WARNING", logger="raytune_ft"):
        assert list(with_base({"model": str(tmp_path / "orphan")})) == ["model"]
    assert "is not there any more, so the table goes without it" in caplog.text

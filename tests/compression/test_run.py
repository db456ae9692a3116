"""Compression on a real local cluster: artifacts with parents, work that is found again, errors as they were raised."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from raytune_ft.compression.config import PruningConfig, PruningMethod, QuantizationConfig
from raytune_ft.compression.run import prune_model, quantize_model
from raytune_ft.core.artifacts import open_artifact
from raytune_ft.core.errors import ArtifactError, ModelError
from raytune_ft.core.manifest import ArtifactKind
from raytune_ft.models.references import model_parent


def digest(folder: Path) -> str:
    return hashlib.sha256(b"".join(p.name.encode() + p.read_bytes() for p in sorted(folder.iterdir()))).hexdigest()


@pytest.mark.ray
def test_quantizing_makes_an_artifact_whose_parent_is_the_source(
    ray_cluster: object, tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    before = digest(tiny_model)
    path = quantize_model(str(tiny_model), str(tmp_path / "small"), QuantizationConfig(bits=4))
    artifact = open_artifact(path, ArtifactKind.MODEL)
    assert path == str(tmp_path / "small")
    assert artifact.manifest.parents == [model_parent(str(tiny_model))]
    assert artifact.numbers["bytes_after"] < artifact.numbers["bytes_before"]
    assert artifact.manifest.settings["bits"] == 4
    assert digest(tiny_model) == before, "the source is only read"

    with caplog.at_level("INFO", "raytune_ft"):
        assert quantize_model(str(tiny_model), str(tmp_path / "small"), QuantizationConfig(bits=4)) == path
    assert "found finished" in caplog.text

    with pytest.raises(ArtifactError, match="bits: 4 -> 8"):
        quantize_model(str(tiny_model), str(tmp_path / "small"), QuantizationConfig(bits=8))
    with pytest.raises(ModelError, match="is quantized already"):
        quantize_model(path, str(tmp_path / "smaller"))
    assert not (tmp_path / "smaller").exists()


@pytest.mark.ray
def test_pruning_makes_an_artifact_and_says_what_does_not_get_smaller(
    ray_cluster: object, tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level("INFO", "raytune_ft"):
        path = prune_model(str(tiny_model), str(tmp_path / "sparse"), PruningConfig(method=PruningMethod.STRUCTURED))
    artifact = open_artifact(path, ArtifactKind.MODEL)
    assert artifact.numbers["sparsity"] == 0.5
    assert artifact.manifest.parents == [model_parent(str(tiny_model))]
    assert "50.0% of the linear layers' weights are zero" in caplog.text
    assert "runs no faster" in caplog.text


@pytest.mark.ray
def test_a_users_mistake_comes_out_of_the_task_as_itself(ray_cluster: object, tiny_model: Path, tmp_path: Path):
    with pytest.raises(ModelError, match="is not a multiple of 48") as caught:
        prune_model(
            str(tiny_model), str(tmp_path / "sparse"), PruningConfig(method=PruningMethod.STRUCTURED, pattern="24:48")
        )
    assert type(caught.value) is ModelError
    assert caught.value.exit_code == 2
    assert "Traceback" not in str(caught.value)


def test_the_source_is_never_the_output(tiny_model: Path):
    before = digest(tiny_model)
    for output in (tiny_model, tiny_model / "small"):
        with pytest.raises(ArtifactError, match="is the source model or lies inside it"):
            quantize_model(str(tiny_model), str(output))
    assert digest(tiny_model) == before


def test_a_folder_that_is_no_model_is_refused_before_anything_is_written(tmp_path: Path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").write_text("{}\n")
    with pytest.raises(ModelError, match="is not a model"):
        quantize_model(str(tmp_path / "data"), str(tmp_path / "small"))
    assert not (tmp_path / "small").exists()

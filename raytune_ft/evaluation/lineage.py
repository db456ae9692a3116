"""What a model was trained on, as the manifests of the model and of what it was made from say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from raytune_ft.core.artifacts import Artifact, has_manifest, open_artifact
from raytune_ft.core.errors import ArtifactError, DataError
from raytune_ft.core.manifest import ArtifactKind, Parent
from raytune_ft.core.storage import Location
from raytune_ft.evaluation.config_inference import is_endpoint
from raytune_ft.evaluation.folders import ROWS, files_of_split
from raytune_ft.models.references import resolve_model


@dataclass(frozen=True)
class TrainingData:
    """A dataset that a model was trained on: its files of training rows, or why there are none to look into."""

    where: str
    digest: str
    files: tuple[Location, ...] = ()
    unreadable: str | None = None


def trained_on(path: str) -> list[TrainingData] | None:
    """The datasets of a model, of its base, and of what they were made from; None where no manifest tells.

    Raises:
        ModelError: if the path leads to no model.
    """
    resolved = resolve_model(path)
    artifacts = [resolved.artifact] if resolved.artifact is not None else []
    if resolved.adapter is not None and has_manifest(resolved.base):
        artifacts.append(open_artifact(resolved.base, verify="size"))
    if not artifacts:
        return None
    found = [data for artifact in artifacts for data in _data_of(artifact, set())]
    return list({data.digest: data for data in found}.values())


def _data_of(artifact: Artifact, seen: set[str]) -> Iterator[TrainingData]:
    for parent in artifact.manifest.parents:
        if parent.role == "dataset":
            yield _training_data(parent)
        elif parent.where not in seen and not is_endpoint(parent.where):
            seen.add(parent.where)
            if has_manifest(parent.where):
                made_from = open_artifact(parent.where, verify="size")
                if made_from.manifest.kind != ArtifactKind.DATASET:
                    yield from _data_of(made_from, seen)
            elif parent.role != "calibration" and _is_gone(parent.where):
                reason = f"{parent.where}, which it was made from, is not there any more"
                yield TrainingData(parent.where, parent.digest, unreadable=reason)


def _is_gone(where: str) -> bool:
    """Whether a folder that was there is not; a hub id or a starter's name never was one."""
    return (where.startswith("/") or "://" in where) and not Location.at(where).exists()


def _training_data(parent: Parent) -> TrainingData:
    location = Location.at(parent.where)
    try:
        if location.is_file():
            files = [location] if location.name.endswith(ROWS) else []
        else:
            files = files_of_split(location, "train")
    except (ArtifactError, DataError) as error:
        return TrainingData(parent.where, parent.digest, unreadable=str(error))
    if not files:
        return TrainingData(parent.where, parent.digest, unreadable=f"{location}: is neither JSONL nor Parquet")
    return TrainingData(parent.where, parent.digest, tuple(files))

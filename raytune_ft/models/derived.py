"""Model artifacts made from adapters without training: merged into their base, or combined into one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from raytune_ft.core.artifacts import Artifact
from raytune_ft.core.draft import begin
from raytune_ft.core.errors import ArtifactError
from raytune_ft.core.manifest import ArtifactKind, Parent
from raytune_ft.core.storage import Location
from raytune_ft.models.adapters import merge_adapter
from raytune_ft.models.combination import CombinationType, combine_adapters
from raytune_ft.models.references import model_parent, resolve_adapter


def merge(model_path: str, output_dir: str) -> Artifact:
    """The artifact of an adapter merged into its base in fp32, verified; run again, it finds its finished work.

    Raises:
        ModelError: if `model_path` is no adapter, or of a prompt method, which has no merge.
    """
    resolve_adapter(model_path)
    return _made(
        output_dir,
        {"derived": "merge"},
        {"model_path": model_path},
        [model_parent(model_path)],
        lambda folder: merge_adapter(model_path, folder),
    )


def combine(
    paths: Sequence[str],
    weights: Sequence[float],
    output_dir: str,
    combination_type: CombinationType = "cat",
    *,
    rank: int | None = None,
) -> Artifact:
    """The artifact of several LoRA adapters as one weighted adapter; see `combine_adapters`.

    Raises:
        ModelError: as `combine_adapters`.
    """
    how = {"derived": "combine", "weights": list(weights), "combination_type": combination_type, "rank": rank}
    return _made(
        output_dir,
        how,
        {"adapters": list(paths)},
        [model_parent(path, f"adapter {number}") for number, path in enumerate(paths, start=1)],
        lambda folder: combine_adapters(paths, weights, folder, combination_type, rank=rank),
    )


def _made(
    output_dir: str, how: dict[str, Any], what: dict[str, Any], parents: list[Parent], write: Callable[[Path], None]
) -> Artifact:
    target = Location.at(output_dir)
    for parent in parents:
        if target.uri == parent.where or target.uri.startswith(parent.where + "/"):
            raise ArtifactError(f"{target}: is or lies in {parent.where}, which is only read; choose another folder")
    draft = begin(target, ArtifactKind.MODEL, settings={**how, **what}, identity=how, parents=parents)
    if draft.finished:
        return draft.finished
    with draft:
        write(draft.folder)
    return draft.artifact

"""Where compression meets Ray: a model is quantized or pruned by one task, and becomes an artifact."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from raytune_ft.compression.config import PruningConfig, PruningJob, QuantizationConfig, QuantizationJob
from raytune_ft.core.artifacts import Artifact, has_manifest, open_artifact
from raytune_ft.core.cluster import Cluster, connect, own_errors
from raytune_ft.core.draft import begin
from raytune_ft.core.errors import ArtifactError, DataError, RunError, first_line
from raytune_ft.core.manifest import ArtifactKind, Parent
from raytune_ft.core.placement import Demand, ResourcePlan
from raytune_ft.core.storage import Location, source_digest
from raytune_ft.models.loading import quiet_transformers
from raytune_ft.models.references import model_parent, shared_model

logger = logging.getLogger("raytune_ft")


def quantize_model(model_path: str, output_dir: str, config: QuantizationConfig | None = None) -> str:
    """Quantizes a model into a new folder and returns its path; see `quantize`."""
    settings = (config or QuantizationConfig()).model_dump()
    return quantize(QuantizationJob(model_path=model_path, output_dir=output_dir, **settings)).location.uri


def prune_model(model_path: str, output_dir: str, config: PruningConfig | None = None) -> str:
    """Prunes a model into a new folder and returns its path; see `prune`."""
    settings = (config or PruningConfig()).model_dump()
    return prune(PruningJob(model_path=model_path, output_dir=output_dir, **settings)).location.uri


def quantize(job: QuantizationJob) -> Artifact:
    """Quantizes the job's model on the cluster; its numbers hold sizes and agreement with the source.

    Raises:
        ModelError: if the source is no model, is quantized already, or has an adapter that cannot merge.
        ArtifactError: if the output folder holds something else.
        ClusterError: if the cluster cannot place the task.
    """
    config = QuantizationConfig(**job.model_dump(exclude={"model_path", "output_dir"}))
    artifact = _compressed(f"quantize {job.model_path}", job, _quantize, config)
    numbers = artifact.numbers
    logger.info(
        "%s: %d bits, %s instead of %s; same first token at %.1f%% of %d positions, KL %.4f nats",
        artifact.location, job.bits, _megabytes(numbers["bytes_after"]), _megabytes(numbers["bytes_before"]),
        100 * numbers["agreement"]["top1"], numbers["agreement"]["tokens"], numbers["agreement"]["kl"],
    )  # fmt: skip
    return artifact


def prune(job: PruningJob) -> Artifact:
    """Prunes the job's model on the cluster; its numbers hold measured sparsity and agreement with the source.

    Raises:
        ModelError: if the source is no model, is quantized, has an adapter that cannot merge, or does not fit the
            pattern.
        ArtifactError: if the output folder holds something else.
        ClusterError: if the cluster cannot place the task.
    """
    config = PruningConfig(**job.model_dump(exclude={"model_path", "output_dir"}))
    artifact = _compressed(f"prune {job.model_path}", job, _prune, config)
    numbers = artifact.numbers
    logger.info(
        "%s: %.1f%% of the linear layers' weights are zero (%.1f%% of all); same first token at %.1f%% of %d "
        "positions, KL %.4f nats. %s",
        artifact.location, 100 * numbers["sparsity"], 100 * numbers["sparsity_of_model"],
        100 * numbers["agreement"]["top1"], numbers["agreement"]["tokens"], numbers["agreement"]["kl"],
        _what_it_gives(job, numbers),
    )  # fmt: skip
    return artifact


def _what_it_gives(job: PruningJob, numbers: dict[str, Any]) -> str:
    after, before = _megabytes(numbers["bytes_after"]), _megabytes(numbers["bytes_before"])
    if job.storage == "compact":
        return f"Zeros are left out on disk: {after} instead of {before}; in memory it is as large, and runs no faster."
    return f"Zeros are stored like other numbers: the folder stays at {after} and runs no faster."


Work = Callable[[str, Path, Any, str], dict[str, Any]]


def _compressed(run: str, job: QuantizationJob | PruningJob, work: Work, config: Any) -> Artifact:
    from raytune_ft.compression.source import refuse_quantized

    target = Location.at(job.output_dir)
    _refuse_overlap(job.model_path, target)
    refuse_quantized(job.model_path)
    draft = begin(
        target,
        ArtifactKind.MODEL,
        settings=job.resolved(),
        identity=job.identity(),
        parents=[model_parent(job.model_path), *calibration_parents(job)],
    )
    if draft.finished:
        logger.info("%s: found finished", target)
        return draft.finished
    with draft:
        cluster = connect()
        reference = shared_model(job.model_path, target.parent)
        draft.numbers.update(_on_cluster(cluster, run, _in_task, work, reference, target, config))
    return draft.artifact


def calibration_parents(job: QuantizationJob | PruningJob) -> list[Parent]:
    """The manifest's entry for the rows that a method looks at, if it looks at any.

    Raises:
        DataError: if there are none at that place.
        ArtifactError: if a dataset there is unfinished or damaged.
    """
    if job.calibration_path is None:
        return []
    location = Location.at(job.calibration_path)
    if has_manifest(location):
        return [open_artifact(location, ArtifactKind.DATASET, verify="size").as_parent("calibration")]
    if not location.is_file():
        raise DataError(f"calibration_path: {location}: expected a dataset artifact, or a JSONL or Parquet file")
    return [Parent(role="calibration", where=str(location), digest=source_digest(location))]


def _refuse_overlap(model_path: str, target: Location) -> None:
    source = Location.at(model_path)
    if source.uri == target.uri or target.uri.startswith(source.uri + "/"):
        raise ArtifactError(
            f"{target}: is the source model or lies inside it; the source is only read. Choose another output_dir."
        )


def _on_cluster(cluster: Cluster, run: str, task: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """The result of one task with one CPU, and one GPU where the cluster has any; its errors as they were raised."""
    import ray

    gpus = 1 if cluster.gpus else 0
    cluster.admit(ResourcePlan(run, (Demand("task", 1, cpus=1, gpus=gpus),)))
    remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(task)
    try:
        with own_errors():
            return ray.get(remote.remote(*args, device="cuda" if gpus else "cpu"))  # type: ignore[no-any-return]
    except ray.exceptions.RayTaskError:
        raise
    except ray.exceptions.RayError as error:
        raise RunError(f"{run}: the task was lost ({first_line(error)}). Run the same command again.") from error


def _in_task(work: Work, reference: str, target: Location, config: Any, *, device: str) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    quiet_transformers()
    if target.is_local:
        folder = Path(target.path)
        folder.mkdir(parents=True, exist_ok=True)
        return work(reference, folder, config, device)
    with tempfile.TemporaryDirectory(prefix="raytune-ft-") as scratch:
        numbers = work(reference, Path(scratch), config, device)
        target.upload(Path(scratch))
    return numbers


def _quantize(reference: str, folder: Path, config: QuantizationConfig, device: str) -> dict[str, Any]:
    from raytune_ft.compression.quantize import write_quantized
    from raytune_ft.models.golden import inherit_golden

    numbers = asdict(write_quantized(reference, folder, config, device=device))
    inherit_golden(reference, folder)
    return numbers


def _prune(reference: str, folder: Path, config: PruningConfig, device: str) -> dict[str, Any]:
    from raytune_ft.compression.prune import write_pruned

    return asdict(write_pruned(reference, folder, config, device=device))


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"

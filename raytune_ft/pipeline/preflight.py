"""What later steps would refuse, looked for before they are waited for: nobody trains for hours to hear of a lost file.

Steps that are finished are not looked at again: the same settings found their work good.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice

from raytune_ft.compression.config import PruningJob, QuantizationJob, QuantizationMethod
from raytune_ft.compression.environment import quantizer_python
from raytune_ft.compression.prune import refuse_pattern
from raytune_ft.compression.run import calibration_parents
from raytune_ft.compression.source import refuse_quantized
from raytune_ft.core.artifacts import Artifact, has_manifest, open_artifact, read_manifest
from raytune_ft.core.cluster import Cluster
from raytune_ft.core.draft import refuse_other
from raytune_ft.core.errors import ArtifactError, DataError, UserError
from raytune_ft.core.manifest import ArtifactKind
from raytune_ft.core.placement import ResourcePlan
from raytune_ft.core.records import Record
from raytune_ft.core.storage import Location
from raytune_ft.data.formats import FormatFault, format_of_row, to_record
from raytune_ft.data.prepared import PreparedDataset
from raytune_ft.data.readers import read_rows as source_rows
from raytune_ft.data.sources import SourceFile, find_files
from raytune_ft.evaluation.checks import check_leaks, refuse_uncheckable
from raytune_ft.evaluation.config import EvaluationConfig, MeasureConfig
from raytune_ft.evaluation.config_ladder import LadderConfig
from raytune_ft.evaluation.ladder import pace_records, refuse_unmeasurable
from raytune_ft.evaluation.metrics import make_metric
from raytune_ft.evaluation.rows import read_rows
from raytune_ft.evaluation.run import fitting_metrics
from raytune_ft.evaluation.workload import Target, refuse_likelihoods, targets_of
from raytune_ft.models.loading import load_tokenizer
from raytune_ft.models.references import resolve_adapter, resolve_model
from raytune_ft.pipeline.config import FOLDERS, SUMMARY, PipelineConfig, shaped_like
from raytune_ft.serving.choice import quantization_of, refuse_unservable, refuse_whole_models
from raytune_ft.serving.config import ServingConfig
from raytune_ft.serving.run import plan_of
from raytune_ft.training.config import FineTuningConfig
from raytune_ft.training.config_alignment import PreferenceConfig, PreferenceLoss
from raytune_ft.training.inputs import checked, refuse_missing_packages, refuse_other_kind
from raytune_ft.training.run import worker_demand
from raytune_ft.tuning.config import SweepConfig
from raytune_ft.tuning.homes import apart, refuse_pausing
from raytune_ft.tuning.packs import Packs

_KINDS = {
    "prepare": ArtifactKind.DATASET,
    "tune": ArtifactKind.SWEEP,
    "evaluate": ArtifactKind.REPORT,
    "ladder": ArtifactKind.REPORT,
    "serve": ArtifactKind.ENDPOINT,
}
"""What each step leaves; the others leave a model."""
_LOOKED_AT = 100
"""Rows of a file among which one that can be read is looked for."""
_ROLES = {"train": None, "evaluate": "tuned", "align": "adapter"}
"""What a step's manifest calls the model that it takes from an earlier one; most call it so. `train` takes none."""


def unfinished(config: PipelineConfig, names: Sequence[str]) -> list[str]:
    """The steps that are still to be done."""
    return [name for name in names if not has_manifest(config.storage / FOLDERS[name])]


def refuse_early(config: PipelineConfig, names: Sequence[str]) -> None:
    """Checks what the settings of steps lead to, and that each step's folder is free or holds that step's own work.

    Args:
        config: the pipeline's, with a base model that every node can load.
        names: the steps, in their order.

    Raises:
        UserError: naming the step, what is wrong, and how to mend it.
    """
    for name in unfinished(config, names):
        with _of(name):
            _refuse_unusable(config, name)
    _refuse_stale(config, names)
    _refuse_other_work(config, names)


def refuse_misfits(config: PipelineConfig, names: Sequence[str], cluster: Cluster) -> None:
    """Checks what the cluster can tell of steps that are still to be done.

    Raises:
        ClusterError: if a step's processes cannot be placed.
        RunError: if what quantizes cannot be installed.
    """
    for name in unfinished(config, names):
        settings = getattr(config, name)
        if isinstance(settings, FineTuningConfig):
            demand = worker_demand(settings, use_gpu=settings.on_gpu(cluster.gpus))
            cluster.refuse_misfit(ResourcePlan(name, (demand,)))
        elif isinstance(settings, ServingConfig):
            cluster.refuse_misfit(plan_of(settings, cluster))
        elif isinstance(settings, QuantizationJob) and _needs_environment(settings) and cluster.is_one_machine:
            quantizer_python()


def _needs_environment(job: QuantizationJob) -> bool:
    return job.method is QuantizationMethod.COMPRESSED_TENSORS


def refuse_unfit(config: PipelineConfig, names: Sequence[str]) -> None:
    """Checks what the prepared dataset tells of the steps that are still to come.

    Raises:
        UserError: if metrics and rows do not fit each other, a model that is there was trained on test rows, or what is
            to learn from preferences finds none.
    """
    ahead = unfinished(config, names)
    if config.align is not None and "align" in ahead and _is_made_here(config, config.align.dataset_path):
        with _of("align"):
            dataset = open_artifact(config.align.dataset_path, ArtifactKind.DATASET)
            refuse_other_kind(config.align, PreparedDataset(dataset).uris)
    if config.evaluate is not None and "evaluate" in ahead:
        with _of("evaluate"):
            _refuse_unmeasured(config, config.evaluate)
    if config.ladder is not None and "ladder" in ahead:
        with _of("ladder"):
            fitting_metrics(
                config.ladder, read_rows(config.ladder.dataset_path, config.ladder.split, config.ladder.max_rows)
            )
            pace_records(config.ladder)


def _refuse_unmeasured(config: PipelineConfig, settings: EvaluationConfig) -> None:
    rows = read_rows(settings.dataset_path, settings.split, settings.max_rows)
    fitting_metrics(settings, rows)
    there = {"base": config.model_path, "previous": config.previous_path, "adapter_path": config.train.adapter_path}
    targets = targets_of({label: path for label, path in there.items() if path is not None}, config.storage)
    check_leaks(settings, targets, rows)


@contextmanager
def _of(step: str) -> Iterator[None]:
    """Puts the step's name before what is wrong with it."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{step}: {error}") from None


def _refuse_unusable(config: PipelineConfig, name: str) -> None:
    settings = getattr(config, name)
    if isinstance(settings, FineTuningConfig):
        _refuse_untrainable(config, settings)
    elif isinstance(settings, MeasureConfig):
        _refuse_unmeasurable(config, settings)
    elif isinstance(settings, QuantizationJob | PruningJob):
        refuse_quantized(config.model_path)
        if settings.calibration_path is not None and not _is_made_here(config, settings.calibration_path):
            calibration_parents(settings)
        if isinstance(settings, PruningJob):
            refuse_pattern(config.model_path, settings)
    elif isinstance(settings, ServingConfig):
        refuse_whole_models(settings)
        base = resolve_model(config.model_path)
        if config.quantize is not None:
            refuse_unservable(settings, _FORMATS[config.quantize.method], is_adapter=False)
        elif config.prune is not None:
            refuse_unservable(settings, "", is_adapter=False)
        else:
            refuse_unservable(settings, quantization_of(base), is_adapter=config.train.uses_adapter)
    elif isinstance(settings, SweepConfig):
        refuse_missing_packages(settings.training)
        refuse_pausing(settings, apart(settings, Packs.of(settings.space, settings.training)))


_FORMATS = {
    QuantizationMethod.BITSANDBYTES: "bitsandbytes",
    QuantizationMethod.COMPRESSED_TENSORS: "compressed-tensors",
}
"""How transformers names the formats that `quantize` writes."""


def _refuse_untrainable(config: PipelineConfig, settings: FineTuningConfig) -> None:
    checked(settings)
    if settings.adapter_path is not None and not _is_made_here(config, settings.adapter_path):
        resolve_adapter(settings.adapter_path, "adapter_path")
    dataset = settings.dataset_path
    if _is_made_here(config, dataset):
        return
    if has_manifest(dataset):
        refuse_other_kind(settings, PreparedDataset(open_artifact(dataset, ArtifactKind.DATASET, verify="size")).uris)
    else:
        _refuse_other_records(settings, find_files([dataset]))


def _refuse_other_records(settings: FineTuningConfig, files: Sequence[SourceFile]) -> None:
    """Checks that the first record of each file is one that the step learns from; faulty rows are prepare's to find."""
    if not isinstance(settings, PreferenceConfig):
        return
    rated = settings.loss_type is PreferenceLoss.KTO
    for file in files:
        record = next(_records(file), None)
        if record is not None and (record.label is None if rated else not record.rejected):
            wanted = "an answer with a label or a rating" if rated else "a pair of a chosen and a rejected answer"
            raise DataError(
                f"{file.label}: row {record.position + 1} is not {wanted}, which loss_type {settings.loss_type} learns "
                "from; name such records in dataset_path, or another loss_type"
            )


def _records(file: SourceFile) -> Iterator[Record]:
    for row in islice(source_rows(file), _LOOKED_AT):
        with suppress(FormatFault):
            if row.values is not None:
                kind, _ = format_of_row(row.values, None)
                yield to_record(row.values, kind, source=file.label, position=row.position)


def _refuse_unmeasurable(config: PipelineConfig, settings: MeasureConfig) -> None:
    for metric in settings.metrics:
        make_metric(metric, settings.resolved())
    refuse_uncheckable(settings)
    if isinstance(settings, EvaluationConfig):
        targets = [Target(label, path) for label, path in settings.models.items()]
        refuse_likelihoods(targets, settings.metrics, settings.endpoint)
        for target in targets:
            if not target.is_endpoint and not _is_made_here(config, target.path):
                load_tokenizer(target.path)
    elif isinstance(settings, LadderConfig):
        refuse_unmeasurable(settings)


def _is_made_here(config: PipelineConfig, path: str) -> bool:
    """Whether a step of this pipeline makes what lies at a path."""
    return any(Location.at(path).uri == (config.storage / folder).uri for folder in FOLDERS.values())


def _refuse_stale(config: PipelineConfig, names: Sequence[str]) -> None:
    """Checks that finished steps were made of what these settings put before them."""
    stale: dict[str, str] = {}
    for name in names:
        folder = config.storage / FOLDERS[name]
        if has_manifest(folder):
            missed = (taken for taken in _taken(config, name) if taken in stale or _is_not_of(folder, name, taken))
            if (other := next(missed, None)) is not None:
                stale[folder.uri] = other
    if stale:
        quality = config.storage / f"{FOLDERS['ladder']}-quality"
        also = [quality.uri] if (config.storage / FOLDERS["ladder"]).uri in stale else []
        first, other = next(iter(stale.items()))
        raise ArtifactError(
            f"{first}: was not made of {other}, which these settings make it of. Delete {', '.join([*stale, *also])} "
            "and run the same command again (all else is found), or choose another storage_path. Nothing was "
            "overwritten."
        )


def _taken(config: PipelineConfig, name: str) -> list[str]:
    """The folders of other steps that a step takes its model, or its best settings, from."""
    settings = getattr(config, name)
    if name == "train":
        return [] if config.tune is None else [config.tune.output_dir]
    if isinstance(settings, PreferenceConfig):
        return [settings.adapter_path or settings.model_path]
    if isinstance(settings, LadderConfig):
        return list(settings.model_paths)
    return [] if name in {"prepare", "tune"} else [settings.model_path]


def _is_not_of(folder: Location, name: str, taken: str) -> bool:
    """Whether a finished step was made of something else than what lies at `taken` now."""
    if not has_manifest(taken):
        return True
    role = _ROLES.get(name, "model")
    known = [parent.digest for parent in read_manifest(folder).parents if parent.role == role]
    return bool(known) and Artifact(Location.at(taken), read_manifest(Location.at(taken))).digest not in known


def _refuse_other_work(config: PipelineConfig, names: Sequence[str]) -> None:
    """Checks that each step's folder is free, or holds this step's work with the same settings."""
    training: FineTuningConfig | None = config.train
    for name in names:
        folder, settings = config.storage / FOLDERS[name], getattr(config, name)
        if name == "prepare":
            settings = None  # its turn is now
        elif name == "train":
            settings = training
        elif isinstance(settings, PreferenceConfig):
            settings = None if training is None else shaped_like(training, settings)
        identity, idle = (None, ()) if settings is None else (settings.identity(), settings.idle)
        refuse_other(folder, _KINDS.get(name, ArtifactKind.MODEL), identity, idle=idle)
        if name == "tune":  # what it finds best is not known before it is finished
            best = read_manifest(folder).numbers["best_settings"] if has_manifest(folder) else None
            training = None if best is None else config.train.with_overrides(**best)
    refuse_other(config.storage / SUMMARY, ArtifactKind.PIPELINE)

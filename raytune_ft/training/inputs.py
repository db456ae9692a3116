"""What a run is made from: settings that were checked, its models and its data, and their entries in the manifest."""

from __future__ import annotations

import logging

from raytune_ft.core.artifacts import has_manifest, open_artifact, read_claim, read_manifest
from raytune_ft.core.errors import ArtifactError
from raytune_ft.core.manifest import CLAIM, ArtifactKind, Parent
from raytune_ft.core.storage import Location, source_digest
from raytune_ft.data.run import tokenized_splits
from raytune_ft.evaluation.metric_names import EvaluationMetric
from raytune_ft.models.references import model_parent, shared_model
from raytune_ft.training import checkpoint
from raytune_ft.training.config import DistillationConfig, FineTuningConfig
from raytune_ft.training.config_alignment import PreferenceConfig, PreferenceLoss, ReinforcementConfig, RewardConfig
from raytune_ft.training.cursor import other_batch
from raytune_ft.training.deepspeed_parser import refuse_unparsable
from raytune_ft.training.deepspeed_settings import read_deepspeed_json
from raytune_ft.training.folder import CHECKPOINTS
from raytune_ft.training.pairs import refuse_unpaired, refuse_unrated
from raytune_ft.training.trackers import refuse_missing

logger = logging.getLogger("raytune_ft")


def refuse_missing_packages(config: FineTuningConfig) -> None:
    """Checks that what settings of a run name beside the project's own dependencies is installed.

    Raises:
        MissingDependencyError: if a tracker is not.
        ConfigError: if a tokenizer of BLEU is not.
    """
    refuse_missing(config.report_to)
    if config.differs("bleu_tokenizer"):
        from raytune_ft.evaluation.metrics import make_metric  # only a run that asks for one waits for metrics to load

        make_metric(EvaluationMetric.BLEU, config.resolved())


def checked(config: FineTuningConfig) -> FineTuningConfig:
    """The settings, with DeepSpeed's JSON read, after the checks that need neither model, data nor cluster.

    Raises:
        UserError: naming the setting.
    """
    refuse_missing_packages(config)
    if isinstance(config.deepspeed_config, str):
        config = config.with_overrides(deepspeed_config=read_deepspeed_json(config.deepspeed_config))
    refuse_unparsable(config)
    if config.resume_from_checkpoint != "auto":
        checkpoint.named(config.resume_from_checkpoint)
    return config


def refuse_other_batch(config: FineTuningConfig, output: Location) -> None:
    """Checks that an unfinished run in the folder has the same global batch; its workers may be others.

    Raises:
        ArtifactError: if it has not, with the layouts that would go on.
    """
    if not (output / CLAIM).exists() or has_manifest(output) or not (output / CHECKPOINTS).exists():
        return
    claim = read_claim(output)
    wanted = None if claim is None else claim.identity.get("global_batch_size")
    if wanted is not None and wanted != config.global_batch_size:
        raise ArtifactError(other_batch(int(wanted), f"{output}: the run that was begun here", config))


def splits_of(config: FineTuningConfig, where: Location) -> dict[str, list[str]]:
    """Parquet files of each split, tokenized for a run's model, and checked to be what the run learns from.

    Args:
        config: the run's settings.
        where: the folder for what has to be tokenized.

    Raises:
        DataError: if no row is left, or rows are not of the kind that the settings want.
    """
    tokens_of = config.model_path
    if isinstance(config, DistillationConfig) and not config.model_path:
        tokens_of = config.teacher_path  # a student that is made of it has its tokens
    splits = tokenized_splits(
        config.dataset_path,
        tokens_of,
        where,
        max_length=config.max_length,
        prompts=isinstance(config, ReinforcementConfig),
    )
    refuse_other_kind(config, splits)
    _tell_idle_length(config, where)
    return splits


def _tell_idle_length(config: FineTuningConfig, where: Location) -> None:
    """Says of a dataset that is taken as it is that longer rows, which the settings would take, are not in it."""
    if not config.differs("max_length") or where.exists() or not has_manifest(config.dataset_path):
        return
    prepared = read_manifest(Location.at(config.dataset_path)).settings.get("max_length")
    if prepared is not None and prepared < config.max_length:
        logger.warning(
            "max_length %d is set and changes nothing: %s was prepared with max_length %d; prepare it with more",
            config.max_length,
            config.dataset_path,
            prepared,
        )


def refuse_other_kind(config: FineTuningConfig, splits: dict[str, list[str]]) -> None:
    """Checks that the rows of splits are what a run learns from: pairs, or rated answers, where it wants such.

    Raises:
        DataError: with the number of rows that are not.
    """
    if isinstance(config, PreferenceConfig) and config.loss_type is PreferenceLoss.KTO:
        refuse_unrated(splits, config.dataset_path)
    elif isinstance(config, PreferenceConfig | RewardConfig):
        refuse_unpaired(splits, config.dataset_path)


def model_parents(config: FineTuningConfig, storage: Location) -> list[Parent]:
    """The manifest's entries for the models that a run starts from, learns from, or has its answers judged by."""
    found = [model_parent(shared_model(config.model_path, storage))] if config.model_path else []
    if config.adapter_path is not None:
        found.append(model_parent(config.adapter_path, "adapter"))
    if isinstance(config, ReinforcementConfig) and config.reward_model_path is not None:
        found.append(model_parent(config.reward_model_path, "reward model"))
    if isinstance(config, DistillationConfig):
        found.append(model_parent(shared_model(config.teacher_path, storage), "teacher"))
    return found


def reachable(config: FineTuningConfig, storage: Location) -> FineTuningConfig:
    """The settings with models that every node can load."""
    changes = {"adapter_path": config.adapter_path, "model_path": config.model_path or None}
    if isinstance(config, ReinforcementConfig):
        changes["reward_model_path"] = config.reward_model_path
    if isinstance(config, DistillationConfig):
        changes["teacher_path"] = config.teacher_path
    shared = {name: shared_model(path, storage) for name, path in changes.items() if path is not None}
    return config.with_overrides(**shared)


def refuse_other_student(config: FineTuningConfig) -> None:
    """Checks that a given student means the same text by its tokens as the teacher.

    Raises:
        ModelError: if it does not.
    """
    if isinstance(config, DistillationConfig) and config.model_path:
        from raytune_ft.training.distill import refuse_other_tokens

        refuse_other_tokens(config.teacher_path, config.model_path)


def data_parent(dataset_path: str) -> Parent:
    """The manifest entry of a dataset: an artifact, or a file of records."""
    if has_manifest(dataset_path):
        return open_artifact(dataset_path, ArtifactKind.DATASET).as_parent("dataset")
    location = Location.at(dataset_path)
    return Parent(role="dataset", where=str(location), digest=source_digest(location))

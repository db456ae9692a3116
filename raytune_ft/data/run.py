"""Preparing data on the cluster: sources to a dataset, pass by pass, and datasets tokenized anew for a model."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from raytune_ft.core.artifacts import Artifact, has_manifest, open_artifact
from raytune_ft.core.cluster import Cluster
from raytune_ft.core.draft import Draft, begin
from raytune_ft.core.errors import DataError
from raytune_ft.core.grammar import number_of
from raytune_ft.core.manifest import CLAIM, ArtifactKind
from raytune_ft.core.placement import Demand, ResourcePlan
from raytune_ft.core.storage import Location
from raytune_ft.data.account import Account
from raytune_ft.data.config import SPLITS, DataCollectionConfig
from raytune_ft.data.corrections import correction_parents
from raytune_ft.data.export import export_splits
from raytune_ft.data.language import check_languages
from raytune_ft.data.passes import (
    assessed,
    audited,
    collected,
    linked,
    shared,
    tallied,
    with_variants,
    without_benchmarks,
)
from raytune_ft.data.prepared import PreparedDataset
from raytune_ft.data.ray_blocks import all_by_key, mapped, ray_data, spread
from raytune_ft.data.report import publish, refuse_broken
from raytune_ft.data.rows import UNANSWERED
from raytune_ft.data.shards import Layout, assign_files, assign_folders, count_folders
from raytune_ft.data.sources import SourceFile, find_files, source_parents
from raytune_ft.data.split import Tally, find_cuts
from raytune_ft.data.stages import retokenize_files, settle_rows, write_rows
from raytune_ft.data.suspects import flag_rows
from raytune_ft.data.telling import remedies, tell
from raytune_ft.data.tokenize import (
    TEMPLATE_FILE,
    TokenPolicy,
    chat_for,
    policy_of_dataset,
    template_parents,
    tokenizer_parent,
)
from raytune_ft.data.weights import file_weights, weigh_training_rows
from raytune_ft.models.references import model_parent
from raytune_ft.models.templates import template_text

logger = logging.getLogger("raytune_ft")

_PARTITION_BYTES = 32 << 20
_MOST_PARTITIONS = 512
_FEW_ROWS = 3000


class DataCollector:
    """Collects records from sources, cleans and splits them, and exports the result."""

    def __init__(self, config: DataCollectionConfig) -> None:
        self.config = config

    def prepare(self) -> PreparedDataset:
        """The prepared splits; a finished run with the same settings and sources is found, not repeated.

        Raises:
            DataError: if a source is missing or unreadable, a row is none (by policy), or no row is left to train on.
        """
        return PreparedDataset(prepare(self.config))

    def export(self, dataset: Mapping[str, Any], output_path: str | os.PathLike[str] | None = None) -> str:
        """Writes the splits as `output_format`; returns the folder, by default ``export`` in the dataset's own.

        Args:
            dataset: what `prepare` gave, or any mapping of split name to `datasets.Dataset`.
            output_path: an empty or new folder; path or URI.
        """
        target = Location.at(output_path) if output_path else Location.at(self.config.output_path) / "export"
        return export_splits(dataset, target, self.config.output_format).uri


def prepare(config: DataCollectionConfig) -> Artifact:
    """The dataset artifact that `config` describes, made on the cluster or found finished.

    Raises:
        DataError: as `DataCollector.prepare`.
    """
    check_languages(config.languages)
    if config.differs("output_format"):
        logger.info("prepare: the dataset is Parquet; %s is what `DataCollector.export` writes", config.output_format)
    files = find_files(config.sources, config.test_sources)
    file_weights(files, config.source_weights)
    parents = [*source_parents(config.sources, "source"), *source_parents(config.test_sources, "test_source")]
    parents += source_parents(config.benchmarks, "benchmark")
    if config.model_path is not None:
        parents.append(tokenizer_parent(config.model_path))
    policy = TokenPolicy.of(config, template_text(config.template))
    parents += template_parents(config.template, policy.template)
    parents += correction_parents(config.corrections)
    judges = {"suspect_model": config.suspect_model, "paraphrase_model": config.augmentation.paraphrase_model}
    parents += [model_parent(reference, role) for role, reference in judges.items() if reference is not None]
    draft = _begin(config.output_path, config.resolved(), config.identity(), parents)
    if draft.finished is None:
        with draft, ray_data() as cluster:
            _prepare(config, files, policy, draft, cluster)
    return draft.artifact


def tokenized_splits(
    dataset_path: str | os.PathLike[str],
    model_path: str,
    output: str | os.PathLike[str] | Location,
    *,
    max_length: int = 1024,
    prompts: bool = False,
) -> dict[str, list[str]]:
    """Split name -> Parquet files, in order, with the columns ``input_ids`` and ``supervised`` for a model.

    A dataset artifact that was prepared for the same chat template and vocabulary, with no row over `max_length`
    tokens, is taken as it is; another is tokenized into an artifact at `output`; records files of any format that
    `prepare` reads become one there, with a tenth of the rows for validation. Rows that ask and do not answer are
    among them only where `prompts` says that these are wanted.

    Raises:
        DataError: if no row is left to train on, or the dataset has prompts without an answer that are not wanted.
    """
    source, target = Location.at(dataset_path), Location.at(output)
    if has_manifest(source) or (source / CLAIM).exists():
        dataset = open_artifact(source, ArtifactKind.DATASET)
        policy = policy_of_dataset(dataset, max_length)
        if not _is_tokenized(dataset, model_path, policy):
            dataset = _tokenized_anew(dataset, model_path, policy, target)
    else:
        settings = {"sources": (source.uri,), "output_path": target.uri, "max_length": max_length, "test_split": 0.0}
        settings["unanswered"] = "keep" if prompts else "reject"
        dataset = prepare(DataCollectionConfig(**settings, model_path=model_path))
    unanswered = dataset.numbers.get("remarks", {}).get(UNANSWERED, 0)
    if unanswered and not prompts:
        raise DataError(
            f"{source}: {number_of(unanswered, 'row is a prompt', 'rows are prompts')} without an answer, since it was "
            "prepared with unanswered: keep. "
            "`raytune-ft reinforce` learns from these; for anything else, prepare it with unanswered: reject"
        )
    return PreparedDataset(dataset).uris


def _is_tokenized(dataset: Artifact, model_path: str, policy: TokenPolicy) -> bool:
    fingerprint = dataset.numbers.get("chat_fingerprint")
    if fingerprint is None or dataset.numbers["tokens_longest"] > policy.max_length:
        return False
    parent = tokenizer_parent(model_path)
    same_files = any(p.role == parent.role and p.digest == parent.digest for p in dataset.manifest.parents)
    return same_files or bool(fingerprint == chat_for(model_path, policy.template).fingerprint)


def _tokenized_anew(dataset: Artifact, model_path: str, policy: TokenPolicy, target: Location) -> Artifact:
    identity = {"model_path": model_path, **asdict(policy)}
    settings = {"dataset_path": str(dataset.location), **identity}
    draft = _begin(target, settings, identity, [dataset.as_parent("dataset"), tokenizer_parent(model_path)])
    if draft.finished is None:
        with draft, ray_data() as cluster:
            _retokenize(dataset, model_path, policy, draft, cluster)
    return draft.artifact


def _begin(where: str | Location, settings: Any, identity: Any, parents: Any) -> Draft:
    draft = begin(where, ArtifactKind.DATASET, settings=settings, identity=identity, parents=parents)
    if draft.finished is not None:
        logger.info("prepare: found the finished dataset at %s", draft.location)
    return draft


def _prepare(
    config: DataCollectionConfig, files: list[SourceFile], policy: TokenPolicy, draft: Draft, cluster: Cluster
) -> None:
    storage = draft.location.parent
    model = shared(config.model_path, storage)
    _keep_template(policy, draft)
    logger.info("prepare: reading %s", number_of(len(files), "file"))
    _admit(cluster, len(files))
    rows = collected(config, files)
    rows_in = rows.count()
    settled = all_by_key(rows, "group", _partitions(rows, cluster))
    settled = mapped(settled, settle_rows, config=config, model=model, policy=policy)
    settled = linked(without_benchmarks(settled, config), files, config)
    tally = tallied(settled, config)
    layout = _planned(tally, rows_in, config)
    split, parts = mapped(settled, assign_folders, layout=layout), settled.num_blocks()
    assessment = assessed(split, parts, model, config, storage) if config.quality.report else None
    if assessment is not None and assessment.suspects:
        split = mapped(split, flag_rows, why=assessment.why)
    if config.source_weights:
        weights = file_weights(files, config.source_weights)
        split = mapped(split, weigh_training_rows, weights=weights, seed=config.seed).materialize()
    if config.augmentation.ratio:
        split = with_variants(split, parts, config, storage, model=model, policy=policy)
    if config.source_weights or config.augmentation.ratio:
        layout = layout.counted(row["counts"] for row in mapped(split, count_folders).take_all())
        if not layout.rows["train"]:
            raise DataError("source_weights: leave out every row of the training split; give a source a higher weight")
    far = audited(split, parts, files, config)
    placed = mapped(split, assign_files, layout=layout)
    if parts > 1:
        placed = all_by_key(placed, "path", min(len(layout.paths), _MOST_PARTITIONS))
    counts = mapped(placed, write_rows, where=draft.location.uri, model=model, policy=policy).take_all()
    account = Account.of(rows_in, [json.loads(row["counts"]) for row in counts])
    account.conflicting, account.distances = tally.conflicting, far
    _close(account, draft)
    tell(config, account)
    if assessment is not None:
        refuse_broken(publish(assessment, account, config, draft.location), draft.location)


def _planned(tally: Tally, rows_in: int, config: DataCollectionConfig) -> Layout:
    """Which rows go into which split.

    Raises:
        DataError: if none is left to train on.
    """
    cuts = find_cuts(tally.ranks, test_split=config.test_split, validation_split=config.validation_split)
    layout = Layout.plan(tally, cuts, seed=config.seed, shuffle=config.shuffle)
    if not layout.rows["train"]:
        lost = f"{number_of(rows_in, 'row')} in, {tally}{remedies(tally.rejected)}"
        raise DataError(f"no row is left to train on: {lost}")
    return layout


def _retokenize(dataset: Artifact, model_path: str, policy: TokenPolicy, draft: Draft, cluster: Cluster) -> None:
    model = shared(model_path, draft.location.parent)
    _keep_template(policy, draft)
    files = [name for names in PreparedDataset(dataset).files.values() for name in names]
    _admit(cluster, len(files))
    blocks = [pa.table({"path": [name]}) for name in files]
    where = {"source": dataset.location.uri, "target": draft.location.uri}
    counts = mapped(spread(blocks), retokenize_files, **where, model=model, policy=policy)
    rows_in = sum(dataset.numbers[f"rows_{split}"] for split in SPLITS)
    account = Account.of(rows_in, [json.loads(row["counts"]) for row in counts.take_all()])
    if not account.splits["train"]:
        raise DataError(f"no row is left to train on: {account}")
    _close(account, draft)


def _keep_template(policy: TokenPolicy, draft: Draft) -> None:
    """Training takes it from here into the model's folder, so that serving renders what was trained on."""
    if policy.template is not None:
        (draft.folder / TEMPLATE_FILE).write_text(policy.template, encoding="utf-8")


def _close(account: Account, draft: Draft) -> None:
    for form, count in account.formats.most_common():
        logger.info("prepare: %s read as %s", number_of(count, "row"), form)
    for note in account.notes():
        logger.info("prepare: %s", note)
    logger.info("prepare: %s", account)
    logger.info("prepare: %s", ", ".join(f"{split} {account.splits[split]}" for split in SPLITS))
    draft.write_json("account.json", account.numbers())
    draft.numbers.update(account.numbers())


def _partitions(rows: Any, cluster: Cluster) -> int:
    """By size; few rows stay together, since loading a tokenizer in a second process takes longer than they do."""
    least = 1 if rows.count() < _FEW_ROWS else int(cluster.cpus)
    return int(min(max(-(-rows.size_bytes() // _PARTITION_BYTES), least), _MOST_PARTITIONS))


def _admit(cluster: Cluster, files: int) -> None:
    cluster.admit(ResourcePlan("prepare", (Demand("data task", max(1, min(int(cluster.cpus), files)), 1),)))

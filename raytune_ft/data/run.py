"""Where preparing data meets Ray Data: four passes over blocks, with only counts coming back to the driver."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import ray.data

from raytune_ft.core.artifacts import Artifact, has_manifest, open_artifact
from raytune_ft.core.cluster import Cluster
from raytune_ft.core.draft import Draft, begin
from raytune_ft.core.errors import DataError
from raytune_ft.core.grammar import number_of
from raytune_ft.core.manifest import CLAIM, ArtifactKind
from raytune_ft.core.placement import Demand, ResourcePlan
from raytune_ft.core.storage import Location
from raytune_ft.data.account import Account
from raytune_ft.data.assessment import Assessment, Means, assess, assess_here
from raytune_ft.data.augment import augmented
from raytune_ft.data.config import SPLITS, DataCollectionConfig
from raytune_ft.data.corrections import applied_ids, correction_parents, read_corrections, refuse_unknown
from raytune_ft.data.export import export_splits
from raytune_ft.data.groups import TESTED_GROUP, link_rows
from raytune_ft.data.language import check_languages
from raytune_ft.data.leaks import (
    audit,
    benchmark_grams,
    mark_benchmarks,
    overlapping,
    refuse_overlaps,
    refuse_straddles,
    sorted_grams,
)  # fmt: skip
from raytune_ft.data.near import NEAR_REASON
from raytune_ft.data.prepared import PreparedDataset
from raytune_ft.data.ray_blocks import RayBlocks, all_by_key, mapped, passed, ray_data, stepped
from raytune_ft.data.report import publish, refuse_broken
from raytune_ft.data.representativeness import FIELDS, added_counts, distances
from raytune_ft.data.rows import RAW_TEXT, UNANSWERED
from raytune_ft.data.shards import Layout, assign_files, assign_folders, count_folders
from raytune_ft.data.sources import SourceFile, find_files, source_parents
from raytune_ft.data.split import Tally, departures, find_cuts, tally_rows
from raytune_ft.data.stages import collect_rows, retokenize_files, settle_rows, write_rows
from raytune_ft.data.strata import named_fields, refuse_absent, refuse_many, seen_names
from raytune_ft.data.suspects import flag_rows
from raytune_ft.data.tokenize import (
    TEMPLATE_FILE,
    TokenPolicy,
    chat_for,
    policy_of_dataset,
    template_parents,
    tokenizer_parent,
)
from raytune_ft.data.weights import file_weights, weigh_training_rows
from raytune_ft.models.embedding import shared_embedder
from raytune_ft.models.references import model_parent, shared_model
from raytune_ft.models.templates import template_text

logger = logging.getLogger("raytune_ft")

_PARTITION_BYTES = 32 << 20
_MOST_PARTITIONS = 512
_FEW_ROWS = 3000
_MANY = 0.1
_REMEDIES = {
    NEAR_REASON: (
        "they are near-duplicates of others; where a template makes rows alike, set near_duplicates: group, or raise "
        "near_duplicate_threshold"
    ),
    TESTED_GROUP: (
        "they begin with the question of a test row, or belong to its conversation (group_by); to learn from them, "
        "take such test rows out"
    ),
    UNANSWERED: "to have a model answer them and learn from rewards (raytune-ft reinforce), set unanswered: keep",
    "too long": "raise max_length, or set over_length to split, truncate_left or truncate_right",
    "tools": "give a chat template that writes tools (template)",
    "tool calls": "give a chat template that writes calls (template)",
}


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
    model = _shared(config.model_path, draft)
    _keep_template(policy, draft)
    logger.info("prepare: reading %s", number_of(len(files), "file"))
    _admit(cluster, len(files))
    rows = _collected(config, files)
    rows_in = rows.count()
    settled = all_by_key(rows, "group", _partitions(rows, cluster))
    settled = mapped(settled, settle_rows, config=config, model=model, policy=policy)
    settled = _linked(_without_benchmarks(settled, config), files, config)
    tally = Tally()
    for row in mapped(settled, tally_rows, seed=config.seed).take_all():
        tally.add(row["tally"])
    refuse_many(tally.ranks, config.stratify_by)
    cuts = find_cuts(tally.ranks, test_split=config.test_split, validation_split=config.validation_split)
    layout = Layout.plan(tally, cuts, seed=config.seed, shuffle=config.shuffle)
    if not layout.rows["train"]:
        remedies = "".join(f"; {_REMEDIES[name]}" for name in tally.rejected if name in _REMEDIES)
        raise DataError(f"no row is left to train on: {number_of(rows_in, 'row')} in, {tally}{remedies}")
    split = mapped(settled, assign_folders, layout=layout)
    assessment = _assessed(split, settled.num_blocks(), model, config, draft) if config.quality.report else None
    if assessment is not None and assessment.suspects:
        split = mapped(split, flag_rows, why=assessment.why)
    if config.source_weights:
        weights = file_weights(files, config.source_weights)
        split = mapped(split, weigh_training_rows, weights=weights, seed=config.seed).materialize()
    if config.augmentation.ratio:
        split = _augmented(split, settled.num_blocks(), config, draft, model=model, policy=policy)
    if config.source_weights or config.augmentation.ratio:
        layout = layout.counted(row["counts"] for row in mapped(split, count_folders).take_all())
        if not layout.rows["train"]:
            raise DataError("source_weights: leave out every row of the training split; give a source a higher weight")
    far = _audited(split, settled.num_blocks(), files, config)
    placed = mapped(split, assign_files, layout=layout)
    if settled.num_blocks() > 1:
        placed = all_by_key(placed, "path", min(len(layout.paths), _MOST_PARTITIONS))
    counts = mapped(placed, write_rows, where=draft.location.uri, model=model, policy=policy).take_all()
    account = Account.of(rows_in, [json.loads(row["counts"]) for row in counts])
    account.conflicting, account.distances = tally.conflicting, far
    _close(account, draft)
    _report(config, account)
    if assessment is not None:
        refuse_broken(publish(assessment, account, config, draft.location), draft.location)


def _collected(config: DataCollectionConfig, files: list[SourceFile]) -> Any:
    """The rows of the files, read and cleaned, after the check that they have what the settings name."""
    table = pa.Table.from_pylist([asdict(file) for file in files])
    blocks = [table.slice(place, 1) for place in range(table.num_rows)]
    corrections = read_corrections(config.corrections)
    rows = mapped(ray.data.from_arrow(blocks), collect_rows, config=config, corrections=corrections).materialize()
    if not rows.count():
        raise DataError(f"no rows in {', '.join(file.label for file in files[:3])}: nothing to prepare")
    if corrections:
        refuse_unknown(corrections, [row["id"] for row in mapped(rows, applied_ids).take_all()])
    if config.columns or named_fields(config):
        seen = mapped(rows, seen_names, fields=list(named_fields(config).values())).take_all()
        refuse_absent([row["seen"] for row in seen], config)
    return rows


def _assessed(rows: Any, parts: int, model: str | None, config: DataCollectionConfig, draft: Draft) -> Assessment:
    """What the rows are like, and which labels look wrong."""
    meant = config.task_description is not None or config.quality.needs_embeddings
    embedder = shared_embedder(config.embedding_model, draft.location.parent) if meant else None
    means = Means(config.task_description, embedder, model, _shared(config.suspect_model, draft))
    settings: dict[str, Any] = {"config": config.quality, "seed": config.seed, "means": means}
    if parts == 1:
        return Assessment.from_json(mapped(rows, assess_here, **settings).take_all()[0]["assessment"])
    return assess(RayBlocks(rows, parts), **settings)


def _augmented(rows: Any, parts: int, config: DataCollectionConfig, draft: Draft, **target: Any) -> Any:
    """The rows with the variants that `augmentation` asks for, tokenized for the target's `model` by its `policy`."""
    settings = config.augmentation
    paraphraser = _shared(settings.paraphrase_model, draft)
    embedder = shared_embedder(config.embedding_model, draft.location.parent) if paraphraser else None
    models = {"paraphraser": paraphraser, "embedder": embedder, **target}
    return passed(rows, parts, augmented, config=settings, seed=config.seed, **models).materialize()


def _without_benchmarks(rows: Any, config: DataCollectionConfig) -> Any:
    """The rows, computed, with those marked (by policy: refused) that share text with a benchmark."""
    if not config.benchmarks:
        return rows.materialize()
    files = find_files(config.benchmarks)
    blocks = [pa.Table.from_pylist([asdict(file)]) for file in files]
    grams = mapped(ray.data.from_arrow(blocks), benchmark_grams).repartition(1)
    grams = mapped(grams, sorted_grams).materialize()
    if not grams.count():
        logger.warning("prepare: no text of the benchmarks has 13 words: nothing to compare with")
        return rows.materialize()
    refs = grams.to_arrow_refs()
    labels = [file.label for file in files]
    marked = mapped(rows, stepped, refs=refs, step=mark_benchmarks, settings={"labels": labels}).materialize()
    if config.on_leak == "raise":
        refuse_overlaps(mapped(marked, overlapping).take_all())
    return marked


def _linked(rows: Any, files: list[SourceFile], config: DataCollectionConfig) -> Any:
    """The rows with near-duplicates marked, and one group for all that must stay together."""
    settings = {"config": config, "labels": [file.label for file in files], "tests": sum(f.is_test for f in files)}
    return passed(rows, rows.num_blocks(), link_rows, **settings).materialize()


def _audited(
    rows: Any, parts: int, files: list[SourceFile], config: DataCollectionConfig
) -> dict[str, dict[str, float]]:
    """Distances of the splits from the whole, after the check that nothing stands in two of them."""
    found = passed(rows, parts, audit, config=config).take_all()
    refuse_straddles([row for row in found if row["kind"] != FIELDS], [file.label for file in files])
    counts = added_counts(row["text"] for row in found if row["kind"] == FIELDS)
    return distances(counts, given_test=bool(config.test_sources))


def _retokenize(dataset: Artifact, model_path: str, policy: TokenPolicy, draft: Draft, cluster: Cluster) -> None:
    model = _shared(model_path, draft)
    _keep_template(policy, draft)
    files = [name for names in PreparedDataset(dataset).files.values() for name in names]
    _admit(cluster, len(files))
    blocks = [pa.table({"path": [name]}) for name in files]
    where = {"source": dataset.location.uri, "target": draft.location.uri}
    counts = mapped(ray.data.from_arrow(blocks), retokenize_files, **where, model=model, policy=policy)
    rows_in = sum(dataset.numbers[f"rows_{split}"] for split in SPLITS)
    account = Account.of(rows_in, [json.loads(row["counts"]) for row in counts.take_all()])
    if not account.splits["train"]:
        raise DataError(f"no row is left to train on: {account}")
    _close(account, draft)


def _keep_template(policy: TokenPolicy, draft: Draft) -> None:
    """Training takes it from here into the model's folder, so that serving renders what was trained on."""
    if policy.template is not None:
        (draft.folder / TEMPLATE_FILE).write_text(policy.template, encoding="utf-8")


def _shared(model_path: str | None, draft: Draft) -> str | None:
    return None if model_path is None else shared_model(model_path, draft.location.parent)


def _close(account: Account, draft: Draft) -> None:
    for form, count in account.formats.most_common():
        logger.info("prepare: %s read as %s", number_of(count, "row"), form)
    for note in account.notes():
        logger.info("prepare: %s", note)
    logger.info("prepare: %s", account)
    logger.info("prepare: %s", ", ".join(f"{split} {account.splits[split]}" for split in SPLITS))
    draft.write_json("account.json", account.numbers())
    draft.numbers.update(account.numbers())


def _report(config: DataCollectionConfig, account: Account) -> None:
    judged = [split for split in SPLITS if split != "test" or not config.test_sources]
    whole = "rows of the sources" if config.test_sources else "whole"
    for departure in departures({split: account.splits[split] for split in judged}):
        logger.warning("prepare: %s", departure)
    for split in SPLITS:
        far = ", ".join(f"{field} {distance:.3f}" for field, distance in account.distances.get(split, {}).items())
        if far:
            logger.info("prepare: %s: Jensen–Shannon distance from the %s: %s", split, whole, far)
    if account.conflicting:
        logger.warning(
            "prepare: %s the same prompt as another row, but differently; conflicting_answers: drop leaves them out",
            number_of(account.conflicting, "row answers", "rows answer"),
        )
    for remark, count in account.remarks.items():
        if remark.startswith(RAW_TEXT):
            logger.warning(
                "prepare: %s %s; if one is to be learned from the other, say so with columns (for example "
                "prompt: text, completion: label), else with input_format: text",
                number_of(count, "row is", "rows are"),
                remark,
            )
    for reason, remedy in _REMEDIES.items():
        if account.rejected[reason] > _MANY * account.rows_in:
            share = 100 * account.rejected[reason] / account.rows_in
            logger.warning("prepare: %.0f%% of the rows were left out as %r: %s", share, reason, remedy)


def _partitions(rows: Any, cluster: Cluster) -> int:
    """By size; few rows stay together, since loading a tokenizer in a second process takes longer than they do."""
    least = 1 if rows.count() < _FEW_ROWS else int(cluster.cpus)
    return int(min(max(-(-rows.size_bytes() // _PARTITION_BYTES), least), _MOST_PARTITIONS))


def _admit(cluster: Cluster, files: int) -> None:
    cluster.admit(ResourcePlan("prepare", (Demand("data task", max(1, min(int(cluster.cpus), files)), 1),)))

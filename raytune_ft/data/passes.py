"""The passes of `prepare` over its rows, block by block; what comes back to the driver are counts and findings."""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from raytune_ft.core.errors import DataError
from raytune_ft.core.storage import Location
from raytune_ft.data.assessment import Assessment, Means, assess, assess_here
from raytune_ft.data.augment import augmented
from raytune_ft.data.config import DataCollectionConfig
from raytune_ft.data.corrections import applied_ids, read_corrections, refuse_unknown
from raytune_ft.data.groups import link_rows
from raytune_ft.data.leaks import (
    audit,
    benchmark_grams,
    mark_benchmarks,
    overlapping,
    refuse_overlaps,
    refuse_straddles,
    sorted_grams,
)  # fmt: skip
from raytune_ft.data.ray_blocks import RayBlocks, mapped, passed, spread, stepped
from raytune_ft.data.representativeness import FIELDS, added_counts, distances
from raytune_ft.data.sources import SourceFile, find_files
from raytune_ft.data.split import Tally, tally_rows
from raytune_ft.data.stages import collect_rows
from raytune_ft.data.strata import named_fields, refuse_absent, refuse_many, seen_names
from raytune_ft.models.embedding import shared_embedder
from raytune_ft.models.references import shared_model

logger = logging.getLogger("raytune_ft")


def collected(config: DataCollectionConfig, files: list[SourceFile]) -> Any:
    """The rows of the files, read and cleaned, after the check that they have what the settings name."""
    table = pa.Table.from_pylist([asdict(file) for file in files])
    blocks = [table.slice(place, 1) for place in range(table.num_rows)]
    corrections = read_corrections(config.corrections)
    rows = mapped(spread(blocks), collect_rows, config=config, corrections=corrections).materialize()
    if not rows.count():
        raise DataError(f"no rows in {', '.join(file.label for file in files[:3])}: nothing to prepare")
    if corrections:
        refuse_unknown(corrections, [row["id"] for row in mapped(rows, applied_ids).take_all()])
    if config.columns or named_fields(config):
        seen = mapped(rows, seen_names, fields=list(named_fields(config).values())).take_all()
        refuse_absent([row["seen"] for row in seen], config)
    return rows


def assessed(rows: Any, parts: int, model: str | None, config: DataCollectionConfig, storage: Location) -> Assessment:
    """What the rows are like, and which labels look wrong."""
    meant = config.task_description is not None or config.quality.needs_embeddings
    embedder = shared_embedder(config.embedding_model, storage) if meant else None
    means = Means(config.task_description, embedder, model, shared(config.suspect_model, storage))
    settings: dict[str, Any] = {"config": config.quality, "seed": config.seed, "means": means}
    if parts == 1:
        return Assessment.from_json(mapped(rows, assess_here, **settings).take_all()[0]["assessment"])
    return assess(RayBlocks(rows, parts), **settings)


def with_variants(rows: Any, parts: int, config: DataCollectionConfig, storage: Location, **target: Any) -> Any:
    """The rows with the variants that `augmentation` asks for, tokenized for the target's `model` by its `policy`."""
    settings = config.augmentation
    paraphraser = shared(settings.paraphrase_model, storage)
    embedder = shared_embedder(config.embedding_model, storage) if paraphraser else None
    models = {"paraphraser": paraphraser, "embedder": embedder, **target}
    return passed(rows, parts, augmented, config=settings, seed=config.seed, **models).materialize()


def without_benchmarks(rows: Any, config: DataCollectionConfig) -> Any:
    """The rows, computed, with those marked (by policy: refused) that share text with a benchmark."""
    if not config.benchmarks:
        return rows.materialize()
    files = find_files(config.benchmarks)
    blocks = [pa.Table.from_pylist([asdict(file)]) for file in files]
    grams = mapped(spread(blocks), benchmark_grams).repartition(1)
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


def linked(rows: Any, files: list[SourceFile], config: DataCollectionConfig) -> Any:
    """The rows with near-duplicates marked, and one group for all that must stay together."""
    settings = {"config": config, "labels": [file.label for file in files], "tests": sum(f.is_test for f in files)}
    return passed(rows, rows.num_blocks(), link_rows, **settings).materialize()


def audited(
    rows: Any, parts: int, files: list[SourceFile], config: DataCollectionConfig
) -> dict[str, dict[str, float]]:
    """Distances of the splits from the whole, after the check that nothing stands in two of them."""
    found = passed(rows, parts, audit, config=config).take_all()
    refuse_straddles([row for row in found if row["kind"] != FIELDS], [file.label for file in files])
    counts = added_counts(row["text"] for row in found if row["kind"] == FIELDS)
    return distances(counts, given_test=bool(config.test_sources))


def tallied(rows: Any, config: DataCollectionConfig) -> Tally:
    """What the splits are cut by, after the check that the fields of `stratify_by` have few values."""
    tally = Tally()
    for row in mapped(rows, tally_rows, seed=config.seed).take_all():
        tally.add(row["tally"])
    refuse_many(tally.ranks, config.stratify_by)
    return tally


def shared(model_path: str | None, storage: Location) -> str | None:
    """What every node can load, where a model is named; see `shared_model`."""
    return None if model_path is None else shared_model(model_path, storage)

"""Where evaluation meets Ray: rows are sharded over copies of each model, one model after the other."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ray

from raytune_ft.core import cluster
from raytune_ft.core.artifacts import Artifact
from raytune_ft.core.cluster import Cluster, Demand, ResourcePlan, own_error
from raytune_ft.core.draft import Draft, begin
from raytune_ft.core.errors import RaytuneError, RunError
from raytune_ft.core.manifest import ArtifactKind, now
from raytune_ft.core.records import records_to_table
from raytune_ft.core.storage import Location
from raytune_ft.evaluation.bases import with_base
from raytune_ft.evaluation.config import (
    ComparisonConfig,
    EvaluationConfig,
    EvaluationMetric,
    MeasureConfig,
)
from raytune_ft.evaluation.measurement import compared, measured
from raytune_ft.evaluation.metrics import METRICS
from raytune_ft.evaluation.report import generate_evaluation_report, write_report
from raytune_ft.evaluation.results import (
    Answer,
    ComparisonResult,
    EvaluationResult,
    ModelScores,
    parse_answers,
    read_result,
    write_answers,
)
from raytune_ft.evaluation.rows import EvaluationRows, check_rows, prompt_text, prompt_turns, read_rows
from raytune_ft.evaluation.scorer import ScorerActor, fault_in
from raytune_ft.evaluation.slices import slice_fields, sliced
from raytune_ft.models.config import DecodingConfig, Precision
from raytune_ft.models.loading import model_parent, shared_model

__all__ = ["ModelEvaluator", "compare", "compare_models", "evaluate", "generate_evaluation_report"]

logger = logging.getLogger("raytune_ft")

_LEAST_BATCH, _MOST_BATCH = 64, 512
"""Rows sent to a model at once: large, since generation sorts them by length, yet some, so that progress shows."""


class ModelEvaluator:
    """Evaluates a model, beside its base if the settings name one."""

    def __init__(self, config: EvaluationConfig) -> None:
        self.config = config
        self._artifact: Artifact | None = None

    @property
    def artifact(self) -> Artifact:
        """The report's folder; evaluated on first use."""
        if self._artifact is None:
            self._artifact = evaluate(self.config)
        return self._artifact

    def evaluate(self) -> EvaluationResult:
        """Measures, or reads what an earlier call with the same settings measured.

        Raises:
            DataError: if rows, references or metrics do not fit each other.
            ModelError: if a model cannot be loaded.
        """
        return read_result(self.artifact)

    def visualize_results(self) -> list[str]:
        """Paths of the plots, each as an SVG and a PNG file."""
        folder = self.artifact.local()
        return sorted(str(folder / name) for name in self.artifact.manifest.files if name.startswith("plots/"))


def compare_models(
    model_paths: Sequence[str],
    dataset_path: str,
    metrics: Sequence[EvaluationMetric | str],
    output_dir: str = "comparison_results",
    *,
    split: str = "test",
    decoding: DecodingConfig | None = None,
    precision: Precision = Precision.AUTO,
    max_rows: int | None = None,
    num_actors: int | None = None,
    seed: int = 0,
) -> ComparisonResult:
    """Measures several models on the same rows and compares each pair; the report lies in `output_dir`.

    Raises:
        ConfigError: if a metric is unknown or a model named twice.
        DataError: if rows, references or metrics do not fit each other.
        ModelError: if a model cannot be loaded.
    """
    config = ComparisonConfig(
        model_paths=tuple(map(str, model_paths)),
        dataset_path=str(dataset_path),
        metrics=tuple(metrics),
        output_dir=str(output_dir),
        split=split,
        decoding=decoding or DecodingConfig(),
        precision=precision,
        max_rows=max_rows,
        num_actors=num_actors,
        seed=seed,
    )
    result = read_result(compare(config))
    assert isinstance(result, ComparisonResult)
    return result


def evaluate(config: EvaluationConfig) -> Artifact:
    """Evaluates the model of `config` and leaves a report."""
    return _measure(config, _models(config), EvaluationResult)


def compare(config: ComparisonConfig) -> Artifact:
    """Compares the models of `config` and leaves a report."""
    return _measure(config, _models(config), ComparisonResult)


def _models(config: EvaluationConfig | ComparisonConfig) -> dict[str, str]:
    """Label and path of every model of the table."""
    return with_base(config.models) if config.compare_with_base else config.models


def _measure(config: MeasureConfig, models: dict[str, str], kind: type[EvaluationResult]) -> Artifact:
    rows = read_rows(config.dataset_path, config.split, config.max_rows)
    check_rows(rows, needs_answers=any(metric.needs_answers for metric in config.metrics))
    metrics = {name: METRICS[name]() for name in config.metrics}
    references = [record.answer or "" for record in rows.records]
    for name, metric in metrics.items():
        if name.needs_answers:
            metric.check(references)
    slice_fields([record.metadata for record in rows.records], config.slice_by)
    storage = Location.at(config.output_dir).parent
    shared = {label: shared_model(path, storage) for label, path in models.items()}
    parents = {label: model_parent(path, role=label) for label, path in shared.items()}
    draft = begin(
        config.output_dir,
        ArtifactKind.REPORT,
        settings=config.resolved(),
        identity=config.identity(),
        parents=[*parents.values(), rows.parent],
        keep=("answers",),
    )
    if draft.finished is not None:
        logger.info("Evaluation: found finished in %s", draft.location)
        return draft.finished
    with draft:
        scored = []
        for label, path in shared.items():
            blank = ModelScores(label, models[label], parents[label].digest, {}, {})
            answers = _kept_answers(draft, blank, rows) or _answers(config, label, path, rows)
            write_answers(draft.folder / blank.file, answers)  # at once: what was computed is not lost again
            scored.append(measured(replace(blank, answers=answers), metrics, seed=config.seed))
            write_answers(draft.folder / blank.file, scored[-1].answers)
        comparisons = compared(scored, metrics, seed=config.seed)
        dataset = {
            "path": rows.parent.where,
            "split": rows.split,
            "rows": len(rows.records),
            "digest": rows.parent.digest,
        }
        slices = sliced(scored, metrics, seed=config.seed, fields=config.slice_by)
        result = kind(config.resolved(), dataset, tuple(scored), comparisons, now(), slices=slices)
        _write(draft, result)
    logger.info("%s", result)
    return draft.artifact


def _answers(config: MeasureConfig, label: str, path: str, rows: EvaluationRows) -> tuple[Answer, ...]:
    """What the model does with every row, computed on the cluster."""
    connected = cluster.connect()
    actors, batch = _shares(connected, config.num_actors, len(rows.records))
    gpus = 1 if connected.gpus else 0
    threads = max(1, int(connected.cpus // actors))
    connected.admit(ResourcePlan(f"evaluation of {label}", (Demand("model", actors, 1, gpus, threads),)))
    scored = _scored(config, label, path, rows, actors=actors, batch=batch, gpus=gpus, threads=threads)
    if isinstance(scored, RaytuneError):
        raise scored
    missing = len(rows.records) - len(scored)
    if missing:
        raise RunError(f"evaluation of {label}: {missing} of {len(rows.records)} rows came back without an answer")
    return tuple(
        Answer(
            id=record.id,
            prompt=prompt_text(record),
            reference=record.answer,
            metadata=dict(record.metadata),
            turns=prompt_turns(record),
            **scored[place],
        )
        for place, record in enumerate(rows.records)
    )


def _scored(
    config: MeasureConfig,
    label: str,
    path: str,
    rows: EvaluationRows,
    *,
    actors: int,
    batch: int,
    gpus: int,
    threads: int,
) -> dict[int, dict[str, Any]] | RaytuneError:
    """What the model did with each row by its place, or why it could not."""
    numbered = records_to_table([replace(record, position=place) for place, record in enumerate(rows.records)])
    dataset = ray.data.from_arrow([numbered.slice(start, batch) for start in range(0, len(numbered), batch)])
    dataset.context.raise_original_map_exception = True
    outcome = dataset.map_batches(
        ScorerActor,
        fn_constructor_args=(path, config, threads),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=1,
        num_gpus=gpus,
    )
    found: dict[int, dict[str, Any]] = {}
    fault: RaytuneError | None = None
    try:
        for table in outcome.iter_batches(batch_size=None, batch_format="pyarrow"):
            for row in table.to_pylist():
                fault = fault or fault_in(row)
                found[row.pop("position")] = row
            logger.info("Evaluation of %s: %d of %d rows", label, len(found), len(numbered))
    except Exception as error:  # noqa: BLE001 - whatever Ray wraps a fault in: it is unwrapped and raised again
        last = (str(error).strip().splitlines() or [repr(error)])[-1]
        return own_error(error) or RunError(f"evaluation of {label} failed: {last}")
    return fault or found


def _shares(connected: Cluster, wanted: int | None, rows: int) -> tuple[int, int]:
    """How many copies of the model, and how many rows each takes at once; no copy without rows."""
    copies = wanted or int(connected.gpus or max(1, connected.cpus - 1))
    batch = min(max(math.ceil(rows / copies), _LEAST_BATCH), _MOST_BATCH)
    if wanted is not None:
        batch = min(batch, math.ceil(rows / wanted))
    return min(copies, math.ceil(rows / batch)), batch


def _kept_answers(draft: Draft, model: ModelScores, rows: EvaluationRows) -> tuple[Answer, ...] | None:
    """What an earlier attempt at the same report has already measured of this model."""
    path = draft.folder / model.file
    if not path.exists():
        return None
    kept = parse_answers(path.read_text(encoding="utf-8"))
    if [answer.id for answer in kept] != [record.id for record in rows.records]:
        return None
    logger.info("Evaluation of %s: found all %d rows of an earlier attempt", model.label, len(kept))
    return kept


def _write(draft: Draft, result: EvaluationResult) -> None:
    write_report(draft.folder, result)
    draft.numbers["rows"] = result.dataset["rows"]
    for model in result.models:
        draft.numbers[model.label] = {**model.values, "cut_off": model.cut_off}

"""Evaluation: rows, models and metrics to a report. Where rows meet model actors: `inference`."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

from raytune_ft.core.artifacts import Artifact
from raytune_ft.core.draft import Draft, begin
from raytune_ft.core.errors import ConfigError
from raytune_ft.core.manifest import ArtifactKind, Parent, now
from raytune_ft.core.storage import Location
from raytune_ft.evaluation.answered import answers_of, missing_notes, missing_of, refuse_missing
from raytune_ft.evaluation.bases import with_base
from raytune_ft.evaluation.checks import (
    Check,
    check_forgetting,
    check_harness,
    check_leaks,
    check_production,
    check_templates,
    refuse_uncheckable,
)
from raytune_ft.evaluation.config import (
    ComparisonConfig,
    EvaluationConfig,
    EvaluationMetric,
    MeasureConfig,
)
from raytune_ft.evaluation.config_inference import is_endpoint
from raytune_ft.evaluation.inference import ask
from raytune_ft.evaluation.kept import PIECES, KeptRows
from raytune_ft.evaluation.measurement import compared, measured
from raytune_ft.evaluation.metrics import make_metric
from raytune_ft.evaluation.report import generate_evaluation_report, write_report
from raytune_ft.evaluation.results import ComparisonResult, EvaluationResult, ModelScores, read_result, write_answers
from raytune_ft.evaluation.rewards import rewarded
from raytune_ft.evaluation.row_metric import RowMetric
from raytune_ft.evaluation.rows import EvaluationRows, check_rows, read_rows, without
from raytune_ft.evaluation.slices import slice_fields, sliced
from raytune_ft.evaluation.workload import (
    Target,
    parent_of,
    refuse_likelihoods,
    settings_parents,
    targets_of,
    workload_of,
)
from raytune_ft.models.config import DecodingConfig, Precision
from raytune_ft.models.references import model_parent

__all__ = ["ModelEvaluator", "compare", "compare_models", "evaluate", "generate_evaluation_report"]

logger = logging.getLogger("raytune_ft")


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
        ConfigError: if a metric is unknown, a model named twice, or one given where a list is wanted.
        DataError: if rows, references or metrics do not fit each other.
        ModelError: if a model cannot be loaded.
    """
    config = ComparisonConfig(
        model_paths=_listed(model_paths),
        dataset_path=str(dataset_path),
        metrics=_listed(metrics),
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


def _listed(given: Any) -> Any:
    """Several texts as a tuple; a text alone, which is no list of its letters, as it is: the settings refuse it."""
    return tuple(map(str, given)) if isinstance(given, Iterable) and not isinstance(given, str) else given


def evaluate(config: EvaluationConfig) -> Artifact:
    """Evaluates the model of `config` and leaves a report."""
    return _measure(config, _models(config), EvaluationResult)


def compare(config: ComparisonConfig) -> Artifact:
    """Compares the models of `config` and leaves a report."""
    return _measure(config, _models(config), ComparisonResult)


def _models(config: EvaluationConfig | ComparisonConfig) -> dict[str, str]:
    """Label and path of every model of the table; only of models that are not served the base is known."""
    if not config.compare_with_base or any(map(is_endpoint, config.models.values())):
        return config.models
    return with_base(config.models)


def _measure(config: MeasureConfig, models: dict[str, str], kind: type[EvaluationResult]) -> Artifact:
    rows = _rows(config)
    metrics = fitting_metrics(config, rows)
    work = workload_of(config)
    targets = targets_of(models, Location.at(config.output_dir).parent)
    _refuse_misfits(config, targets)
    parents = {target.label: parent_of(target, role=target.label) for target in targets}
    draft = _begun(config, [*parents.values(), rows.parent])
    if draft.finished is not None:
        return draft.finished
    with draft:
        bare = check_templates(targets, rows)
        checks = [check_leaks(config, targets, rows)]
        kept = KeptRows(draft.location / PIECES)
        ask(rows.records, targets, work, kept, num_actors=config.num_actors, what="evaluation")
        missing = [row for target in targets for row in missing_of(rows.records, kept, target.label)]
        left_out = {row.position for row in missing}
        refuse_missing(missing, len(rows.records), config.max_unanswered)
        answers = {target.label: answers_of(rows.records, kept, target.label, left_out) for target in targets}
        scored = [
            ModelScores(label, models[label], parents[label].digest, values={}, intervals={}, answers=found)
            for label, found in answers.items()
        ]
        if config.reward_model_path is not None:
            asked = without(rows.records, left_out)
            scored = rewarded(scored, asked, config.reward_model_path, config.precision, draft.location.parent)
        scored = [measured(model, metrics, seed=config.seed) for model in scored]
        for model in scored:
            write_answers(draft.folder / model.file, model.answers)
        checks += _later_checks(config, targets, rows, draft)
        result = kind(
            settings=config.resolved(),
            dataset=_dataset(rows, len(left_out)),
            models=tuple(scored),
            comparisons=compared(scored, metrics, seed=config.seed),
            created_at=now(),
            slices=sliced(scored, metrics, seed=config.seed, fields=config.slice_by),
            notes=(*missing_notes(missing), *bare, *(note for check in checks for note in check.notes)),
            checks={check.name: check.found for check in checks},
        )
        _write(draft, result)
        kept.delete()
    logger.info("%s", result)
    return draft.artifact


def _refuse_misfits(config: MeasureConfig, targets: Sequence[Target]) -> None:
    """Checks what the targets alone tell.

    Raises:
        ConfigError: if they cannot give what metrics or checks need.
    """
    refuse_likelihoods(targets, config.metrics, config.endpoint)
    if config.forgetting is not None and len(targets) < 2:
        raise ConfigError("forgetting: compares with the base, which is not known here; name it in base_model_path")
    refuse_uncheckable(config)


def _begun(config: MeasureConfig, parents: Sequence[Parent]) -> Draft:
    """The report in the making, or as it was finished before."""
    judges = [] if config.reward_model_path is None else [model_parent(config.reward_model_path, "reward model")]
    draft = begin(
        config.output_dir,
        ArtifactKind.REPORT,
        settings=config.resolved(),
        identity=config.identity(),
        parents=[*parents, *judges, *settings_parents(config)],
        keep=(PIECES,),
    )
    if draft.finished is not None:
        logger.info("Evaluation: found finished in %s", draft.location)
        if config.production_path is not None:
            logger.info("Evaluation: what has come to %s since is not in that report", config.production_path)
    return draft


def _rows(config: MeasureConfig) -> EvaluationRows:
    rows = read_rows(config.dataset_path, config.split, config.max_rows)
    if rows.split is None and config.differs("split"):
        raise ConfigError(
            f"split: {rows.parent.where} is a single file, taken whole; leave split out (got {config.split!r})"
        )
    return rows


def _later_checks(config: MeasureConfig, targets: Sequence[Target], rows: EvaluationRows, draft: Draft) -> list[Check]:
    """What is looked at once the answers are kept."""
    general = KeptRows(draft.location / PIECES / "general")
    found = (
        check_production(config, rows, draft.location.parent),
        check_forgetting(config, targets, general),
        check_harness(config, targets),
    )
    return [check for check in found if check is not None]


def fitting_metrics(config: MeasureConfig, rows: EvaluationRows) -> dict[EvaluationMetric, RowMetric]:
    """The metrics of the settings, all of which fit the rows.

    Raises:
        ConfigError: if a schema or function that they name cannot be had, or no row has a field of `slice_by`.
        DataError: if rows lack what a metric needs.
    """
    check_rows(
        rows,
        needs_answers=any(metric.needs_answers for metric in config.metrics),
        needs_references=any(metric.needs_references for metric in config.metrics),
        needs_choices=any(metric.needs_choices for metric in config.metrics),
    )
    metrics = {name: make_metric(name, config.resolved()) for name in config.metrics}
    for name, metric in metrics.items():
        if name.needs_answers:
            metric.check(record.answer or "" for record in rows.records)
    slice_fields((record.metadata for record in rows.records), config.slice_by)
    return metrics


def _dataset(rows: EvaluationRows, unanswered: int) -> dict[str, Any]:
    return {
        "path": rows.parent.where,
        "split": rows.split,
        "rows": len(rows.records) - unanswered,
        "unanswered": unanswered,
        "digest": rows.parent.digest,
    }


def _write(draft: Draft, result: EvaluationResult) -> None:
    write_report(draft.folder, result)
    draft.numbers["rows"] = result.dataset["rows"]
    for model in result.models:
        draft.numbers[model.label] = {**model.values, "cut_off": model.cut_off}

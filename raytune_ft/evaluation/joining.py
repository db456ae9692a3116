"""Reports that were made one by one, joined into one comparison: their rows are matched by id, nothing is run again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from raytune_ft.core.artifacts import Artifact, open_artifact
from raytune_ft.core.draft import begin
from raytune_ft.core.errors import ConfigError, DataError
from raytune_ft.core.manifest import ArtifactKind, now
from raytune_ft.evaluation.measurement import compared, measured
from raytune_ft.evaluation.metrics import make_metric
from raytune_ft.evaluation.report import write_report
from raytune_ft.evaluation.results import (
    ComparisonResult,
    EvaluationResult,
    ModelScores,
    on_disk,
    read_result,
    write_answers,
)
from raytune_ft.evaluation.slices import sliced


def open_reports(paths: Sequence[str]) -> tuple[list[Artifact], list[EvaluationResult]]:
    """Finished reports and what they found.

    Raises:
        ConfigError: if there are fewer than two.
        ArtifactError: if one is not a finished report.
    """
    if len(paths) < 2:
        raise ConfigError("compare takes a settings file, or at least two reports (--gate: reports alone)")
    artifacts = [open_artifact(path, ArtifactKind.REPORT) for path in paths]
    return artifacts, [read_result(artifact) for artifact in artifacts]


def joined(results: Sequence[EvaluationResult]) -> ComparisonResult:
    """The evaluated model of each report, beside the base of the first if that has one, on the metrics all share.

    Notes and checks are those of all reports, each under the label of its report's model.

    Raises:
        DataError: if the reports are not of the same rows, or share no metric.
    """
    metrics = [metric for metric in results[0].metrics if all(metric in result.metrics for result in results)]
    if not metrics:
        raise DataError("these reports share no metric; evaluate with the same metrics")
    models = evaluated_models(results)
    labels = [model.label for model in models]
    first = results[0].models[0]
    if len(results[0].models) > 1 and first.digest not in {model.digest for model in models}:
        models = [replace(first, label=_unused(first.label, models)), *models]
    models = [models[0], *(same_rows(models[0], model) for model in models[1:])]
    settings = {**results[0].settings, "metrics": [str(metric) for metric in metrics]}
    seed = int(settings["seed"])
    chosen = {metric: make_metric(metric, settings) for metric in metrics}
    scored = [measured(replace(model, values={}, intervals={}), chosen, seed=seed) for model in models]
    return ComparisonResult(
        settings=settings,
        dataset=results[0].dataset,
        models=tuple(scored),
        comparisons=compared(scored, chosen, seed=seed),
        created_at=now(),
        slices=sliced(scored, chosen, seed=seed, fields=settings.get("slice_by")),
        notes=tuple(f"{label}: {note}" for label, part in zip(labels, results, strict=True) for note in part.notes),
        checks={
            f"{label}: {name}": found
            for label, part in zip(labels, results, strict=True)
            for name, found in part.checks.items()
        },
    )


def write_joined(reports: Sequence[Artifact], output_dir: str) -> Artifact:
    """The report artifact of `joined`, in a folder of its own."""
    results = [read_result(report) for report in reports]
    found = joined(results)
    parents = [report.as_parent(f"report {number}") for number, report in enumerate(reports, 1)]
    draft = begin(output_dir, ArtifactKind.REPORT, settings=found.settings, parents=parents)
    if draft.finished is not None:
        return draft.finished
    with draft:
        for model in found.models:
            write_answers(draft.folder / model.file, model.answers)
            draft.numbers[model.label] = {**model.values, "cut_off": model.cut_off}
        write_report(draft.folder, found)
        draft.numbers["rows"] = found.dataset["rows"]
    return draft.artifact


def evaluated_models(results: Sequence[EvaluationResult]) -> list[ModelScores]:
    """The evaluated model of each report, labelled by its report's folder where two would share a label.

    Raises:
        DataError: if a report is named twice.
    """
    models = [result.model for result in results]
    if len({model.label for model in models}) == len(models):
        return models
    wheres = [result.where.rstrip("/") or f"report {number}" for number, result in enumerate(results, 1)]
    names = [where.rpartition("/")[2] for where in wheres]
    chosen = names if len(set(names)) == len(names) else wheres
    if len(set(chosen)) < len(chosen):
        twice = next(name for name in chosen if chosen.count(name) > 1)
        raise DataError(f"{twice}: is named twice; a report cannot be compared with itself")
    return [replace(model, label=label) for model, label in zip(models, chosen, strict=True)]


def same_rows(model: ModelScores, other: ModelScores) -> ModelScores:
    """`other` with its answers in the order of `model`'s rows, matched by the rows' ids.

    Raises:
        DataError: if they did not answer the same rows, with how many each lacks.
    """
    own, their = _occurrences(model), _occurrences(other)
    if own.keys() != their.keys():
        lacks = [len(own.keys() - their.keys()), len(their.keys() - own.keys())]
        raise DataError(
            f"{model.label} and {other.label} were not measured on the same rows: of {len(own)} rows of {model.label}, "
            f"{lacks[0]} are not among the {len(their)} of {other.label}, and {lacks[1]} the other way round. "
            "Evaluate both on the same dataset and split"
        )
    return replace(other, answers=on_disk(other.answers[their[key]] for key in own))


def _occurrences(model: ModelScores) -> Mapping[tuple[str, int], int]:
    """The place of each row by its id, and by which time the id comes where rows are alike."""
    seen: dict[str, int] = {}
    places = {}
    for place, answer in enumerate(model.answers):
        seen[answer.id] = seen.get(answer.id, 0) + 1
        places[answer.id, seen[answer.id]] = place
    return places


def _unused(label: str, models: Sequence[ModelScores]) -> str:
    while label in {model.label for model in models}:
        label = f"{label} (base)"
    return label

"""What an evaluation found, as objects and as the versioned files of a report artifact."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from raytune_ft.core.artifacts import Artifact, open_artifact
from raytune_ft.core.errors import ArtifactError
from raytune_ft.core.grammar import number_of
from raytune_ft.core.manifest import ArtifactKind
from raytune_ft.core.spool import Spool
from raytune_ft.core.storage import Location, whole_file
from raytune_ft.evaluation.compare import Difference
from raytune_ft.evaluation.config import EvaluationMetric
from raytune_ft.evaluation.judging import Judging, Vote, summarized
from raytune_ft.evaluation.kept import folder_name
from raytune_ft.evaluation.votes import FOLDER, VOTES, parse_votes

if TYPE_CHECKING:
    from raytune_ft.evaluation.gate import GateDecision

RESULTS = "results.json"
SCHEMA_VERSION = 2
"""Of ``results.json`` and ``report.json``; raised whenever a field changes its meaning or goes."""


@dataclass(frozen=True)
class Answer:
    """What one model did with one row; what was not measured is None."""

    id: str
    prompt: str
    reference: str | None = None
    answer: str | None = None
    finish_reason: Literal["stop", "length"] | None = None
    answer_tokens: int | None = None
    nll: float | None = None
    """Nats, summed over the supervised tokens of the reference."""
    tokens: int | None = None
    """How many supervised tokens the reference has."""
    bytes: int | None = None
    """Bytes (UTF-8) of the text that these tokens are of."""
    windows: int | None = None
    """More than 1 where the row is longer than the model's context and was scored in overlapping windows."""
    choices: list[dict[str, Any]] | None = None
    """The answers to choose from, each with its text, nats and bytes."""
    reward: float | None = None
    """What the reward model of the settings gives the answer."""
    scores: dict[str, float] = field(default_factory=dict)
    """Per metric the headline of this row taken alone."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """What the row's record says of itself beside its content."""
    turns: tuple[dict[str, str], ...] = ()
    """Roles, contents and tool calls (JSON text) before the answer, where they are more than the one user turn that
    `prompt` shows."""
    tools: str | None = None
    """The tools of the row, JSON text."""


@dataclass(frozen=True)
class ModelScores:
    """What was measured of one model."""

    label: str
    path: str
    digest: str
    values: dict[str, float]
    """Every value of every metric."""
    intervals: dict[str, tuple[float, float]]
    """95% bootstrap interval of each metric's headline, by metric."""
    answers: Sequence[Answer] = ()
    """One a row, in the order of the rows; on disk (see `core.spool`) where they were measured or read."""

    @property
    def cut_off(self) -> int:
        """Answers that ended because `max_new_tokens` was reached."""
        return sum(answer.finish_reason == "length" for answer in self.answers)

    @property
    def file(self) -> str:
        """Where in the artifact its answers lie."""
        return f"answers/{folder_name(self.label)}.jsonl"


@dataclass(frozen=True, kw_only=True)
class Comparison(Difference):
    """One model against another on one metric, over the same rows."""

    metric: EvaluationMetric
    model: str
    other: str
    words: str


@dataclass(frozen=True)
class Slice:
    """The same values on some of the rows: those with one value of a field, or of one range of lengths."""

    by: str
    """A metadata field, ``prompt characters`` or ``reference characters``."""
    name: str
    rows: int
    values: dict[str, dict[str, float]]
    """By model and metric the headline."""
    intervals: dict[str, dict[str, tuple[float, float]]]
    comparisons: tuple[Comparison, ...] = ()
    """Of each later model with the first; corrected for all slices of the same metric and models."""


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation found."""

    settings: dict[str, Any]
    dataset: dict[str, Any]
    """Where the rows lay, their split, number and digest."""
    models: tuple[ModelScores, ...]
    comparisons: tuple[Comparison, ...]
    created_at: str
    where: str = ""
    """The folder of the report artifact."""
    slices: tuple[Slice, ...] = ()
    judging: Judging | None = None
    """What people said of the answers, side by side."""
    notes: tuple[str, ...] = ()
    """What a reader has to know before believing the numbers: leaks, rows without an answer, abilities lost."""
    checks: dict[str, Any] = field(default_factory=dict)
    """What was looked at beside the metrics: ``leakage``, ``production``, ``forgetting``, ``harness``; where reports
    were joined, ``<label>: leakage`` and so on."""

    @property
    def metrics(self) -> tuple[EvaluationMetric, ...]:
        """What was measured."""
        return tuple(EvaluationMetric(name) for name in self.settings["metrics"])

    @property
    def model(self) -> ModelScores:
        """The model that was to be evaluated (the last one; a base comes before it)."""
        return self.models[-1]

    @property
    def values(self) -> dict[str, float]:
        """The values of `model`."""
        return self.model.values

    def beats(
        self,
        other: EvaluationResult,
        metric: EvaluationMetric | str | None = None,
        max_drop: float = 0.0,
        confidence: float = 0.95,
    ) -> GateDecision:
        """Whether this report's model is better than that of `other`, or worse by less than `max_drop`.

        Args:
            other: a report of the same rows.
            metric: what counts; by default the strictest that was measured.
            max_drop: how much worse is still good enough, in the metric's own units.
            confidence: with which that has to be shown.

        Raises:
            ConfigError: if a setting is unknown or out of range.
            DataError: if the reports are not of the same rows, or one lacks the metric.
        """
        from raytune_ft.evaluation.gate import gate_results

        return gate_results(self, other, metric, max_drop=max_drop, confidence=confidence)

    def __getitem__(self, label: str) -> ModelScores:
        return next(model for model in self.models if model.label == label)

    def __str__(self) -> str:
        lines = []
        for model in self.models:
            headlines = (f"{metric} {model.values[metric.facts.headline]:.4g}" for metric in self.metrics)
            lines.append(f"{model.label}: {', '.join(headlines)} ({number_of(self.dataset['rows'], 'row')})")
        return "\n".join(lines + [comparison.words for comparison in self.comparisons])


@dataclass(frozen=True)
class ComparisonResult(EvaluationResult):
    """What a comparison of several models found."""

    def ranking(self, metric: EvaluationMetric | str) -> list[str]:
        """Labels of the models, best first by the metric's headline (neighbours may be too close to tell)."""
        facts = EvaluationMetric(metric).facts

        def place(model: ModelScores) -> float:
            value = model.values[facts.headline]
            return (value if facts.lower_is_better else -value) if math.isfinite(value) else math.inf

        return [model.label for model in sorted(self.models, key=place)]


STRICT_METRICS = (
    EvaluationMetric.EXACT_MATCH,
    EvaluationMetric.ACCURACY,
    EvaluationMetric.CHOICE_ACCURACY,
    EvaluationMetric.FIELD_F1,
    EvaluationMetric.SET_F1,
    EvaluationMetric.F1,
    EvaluationMetric.VALID_JSON,
)
"""Metrics that call a row's answer right or wrong, the strictest first."""


def leading_metric(result: EvaluationResult) -> EvaluationMetric:
    """The metric that a row is judged by: the strictest that was measured, else the first."""
    return next((metric for metric in STRICT_METRICS if metric in result.metrics), result.metrics[0])


def to_json(result: EvaluationResult, *, with_answers: bool = False) -> dict[str, Any]:
    """The content of ``results.json``; the answers lie beside it unless they are asked for.

    A value that is no finite number is None.
    """
    models = []
    for model in result.models:
        entry = asdict(replace(model, answers=()))
        entry["answers"] = [asdict(answer) for answer in model.answers] if with_answers else None
        entry = {key: value for key, value in entry.items() if value is not None}
        models.append({**entry, "cut_off": model.cut_off, "file": model.file})
    content = {
        "schema_version": SCHEMA_VERSION,
        "kind": "comparison" if isinstance(result, ComparisonResult) else "evaluation",
        "created_at": result.created_at,
        "settings": result.settings,
        "dataset": result.dataset,
        "models": models,
        "comparisons": [asdict(comparison) for comparison in result.comparisons],
        "slices": [asdict(part) for part in result.slices],
        "judging": None if result.judging is None else asdict(result.judging),
        "notes": list(result.notes),
        "checks": result.checks,
    }
    return {name: plain(value) for name, value in content.items()}


def plain(value: Any) -> Any:
    """JSON knows neither NaN nor infinity: what is unknown is null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def numbers(values: dict[str, float | None]) -> dict[str, float]:
    """Values that JSON gave back; what is null there is NaN."""
    return {name: math.nan if value is None else value for name, value in values.items()}


def read_result(report: Artifact | str | os.PathLike[str] | Location) -> EvaluationResult:
    """What the report artifact in a folder found, with the votes of people in its folder ``judging``.

    Raises:
        ArtifactError: if there is no finished report, or its schema version is another.
    """
    artifact = report if isinstance(report, Artifact) else open_artifact(report, ArtifactKind.REPORT)
    content = artifact.read_json(RESULTS)
    if content.get("schema_version") != SCHEMA_VERSION:
        raise ArtifactError(
            f"{artifact.location}: is a report of schema version {content.get('schema_version')}; this version of "
            f"raytune-ft reads {SCHEMA_VERSION}. Evaluate again into another folder."
        )
    models = tuple(
        ModelScores(
            label=entry["label"],
            path=entry["path"],
            digest=entry["digest"],
            values=numbers(entry["values"]),
            intervals=intervals(entry["intervals"]),
            answers=read_answers(artifact / entry["file"]),
        )
        for entry in content["models"]
    )
    kind = ComparisonResult if content["kind"] == "comparison" else EvaluationResult
    found = kind(
        settings=content["settings"],
        dataset=content["dataset"],
        models=models,
        comparisons=_comparisons(content["comparisons"]),
        created_at=content["created_at"],
        where=str(artifact.location),
        slices=tuple(_slice(entry) for entry in content["slices"]),
        notes=tuple(content.get("notes", ())),
        checks=content.get("checks", {}),
    )
    votes = artifact / FOLDER / VOTES
    if not votes.is_file():
        return found
    return with_votes(found, parse_votes(votes.read().decode(errors="replace"), str(votes)))


def with_votes(result: EvaluationResult, votes: Sequence[Vote]) -> EvaluationResult:
    """The result with what people's votes amount to; votes on other models than the report's do not count."""
    labels = [model.label for model in result.models]
    ours = [vote for vote in votes if vote.model in labels and vote.other in labels]
    seed = int(result.settings.get("seed", 0))
    return replace(result, judging=summarized(ours, labels, seed=seed) if ours else None)


_MEASURED = ("difference", "low", "high", "standard_error")
"""What of a comparison is always a number, if not a finite one."""


def _comparisons(entries: Sequence[dict[str, Any]]) -> tuple[Comparison, ...]:
    found = []
    for entry in entries:
        known = numbers({name: entry[name] for name in _MEASURED})
        found.append(Comparison(**{**entry, **known, "metric": EvaluationMetric(entry["metric"])}))
    return tuple(found)


def intervals(found: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """As `numbers`, of intervals."""
    return {name: tuple(math.nan if end is None else end for end in ends) for name, ends in found.items()}  # type: ignore[misc]


def _slice(entry: dict[str, Any]) -> Slice:
    read = {
        "values": {label: numbers(found) for label, found in entry["values"].items()},
        "intervals": {label: intervals(found) for label, found in entry["intervals"].items()},
        "comparisons": _comparisons(entry["comparisons"]),
    }
    return Slice(**{**entry, **read})


def write_answers(path: Path, answers: Iterable[Answer]) -> None:
    """Writes one JSON line a row, at once: a file that is there is whole."""
    with whole_file(path) as file:
        file.writelines((json.dumps(plain(vars(answer)), ensure_ascii=False) + "\n").encode() for answer in answers)


def read_answers(file: Location) -> Sequence[Answer]:
    """The answers in a file of `write_answers`.

    Raises:
        ArtifactError: if the file cannot be read.
    """
    return on_disk(
        Answer(**{**row, "scores": numbers(row.get("scores") or {}), "turns": tuple(row.get("turns") or ())})
        for row in map(json.loads, file.lines())
    )


def on_disk(answers: Iterable[Answer]) -> Sequence[Answer]:
    """The answers, which may be many, as a sequence on this machine's disk."""
    return Spool(answers, vars, lambda row: Answer(**{**row, "turns": tuple(row["turns"])}))

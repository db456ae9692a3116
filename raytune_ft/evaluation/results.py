"""What an evaluation found, as objects and as the versioned files of a report artifact."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from raytune_ft.core.artifacts import Artifact, open_artifact
from raytune_ft.core.manifest import ArtifactKind
from raytune_ft.core.storage import Location
from raytune_ft.evaluation.compare import Verdict
from raytune_ft.evaluation.config import EvaluationMetric

RESULTS = "results.json"
SCHEMA_VERSION = 1


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
    scores: dict[str, float] = field(default_factory=dict)
    """Per metric the headline of this row taken alone."""


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
    answers: tuple[Answer, ...] = ()

    @property
    def cut_off(self) -> int:
        """Answers that ended because `max_new_tokens` was reached."""
        return sum(answer.finish_reason == "length" for answer in self.answers)

    @property
    def file(self) -> str:
        """Where in the artifact its answers lie."""
        return f"answers/{re.sub(r'[^A-Za-z0-9._-]+', '-', self.label)}.jsonl"


@dataclass(frozen=True)
class Comparison:
    """One model against another on one metric, over the same rows."""

    metric: EvaluationMetric
    model: str
    other: str
    difference: float
    low: float
    high: float
    confidence: float
    wins: int
    ties: int
    losses: int
    verdict: Verdict
    words: str


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

    def __getitem__(self, label: str) -> ModelScores:
        return next(model for model in self.models if model.label == label)

    def __str__(self) -> str:
        lines = []
        for model in self.models:
            headlines = (f"{metric} {model.values[metric.facts.headline]:.4g}" for metric in self.metrics)
            lines.append(f"{model.label}: {', '.join(headlines)} ({self.dataset['rows']} rows)")
        return "\n".join(lines + [comparison.words for comparison in self.comparisons])


@dataclass(frozen=True)
class ComparisonResult(EvaluationResult):
    """What a comparison of several models found."""

    def ranking(self, metric: EvaluationMetric | str) -> list[str]:
        """Labels of the models, best first by the metric's headline (neighbours may be too close to tell)."""
        facts = EvaluationMetric(metric).facts
        ranked = sorted(self.models, key=lambda m: m.values[facts.headline], reverse=not facts.lower_is_better)
        return [model.label for model in ranked]


def to_json(result: EvaluationResult, *, with_answers: bool = False) -> dict[str, Any]:
    """The content of ``results.json``; the answers lie beside it unless they are asked for."""
    models = []
    for model in result.models:
        entry = {key: value for key, value in asdict(model).items() if key != "answers" or with_answers}
        models.append({**entry, "cut_off": model.cut_off, "file": model.file})
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "comparison" if isinstance(result, ComparisonResult) else "evaluation",
        "created_at": result.created_at,
        "settings": result.settings,
        "dataset": result.dataset,
        "models": models,
        "comparisons": [asdict(comparison) for comparison in result.comparisons],
    }


def read_result(report: Artifact | str | os.PathLike[str] | Location) -> EvaluationResult:
    """What the report artifact in a folder found.

    Raises:
        ArtifactError: if there is no finished report.
    """
    artifact = report if isinstance(report, Artifact) else open_artifact(report, ArtifactKind.REPORT)
    content = artifact.read_json(RESULTS)
    models = tuple(
        ModelScores(
            label=entry["label"],
            path=entry["path"],
            digest=entry["digest"],
            values=entry["values"],
            intervals={name: (low, high) for name, (low, high) in entry["intervals"].items()},
            answers=parse_answers((artifact / entry["file"]).read().decode()),
        )
        for entry in content["models"]
    )
    comparisons = tuple(
        Comparison(**{**entry, "metric": EvaluationMetric(entry["metric"])}) for entry in content["comparisons"]
    )
    kind = ComparisonResult if content["kind"] == "comparison" else EvaluationResult
    where = str(artifact.location)
    return kind(content["settings"], content["dataset"], models, comparisons, content["created_at"], where)


def write_answers(path: Path, answers: tuple[Answer, ...]) -> None:
    """Writes one JSON line a row, at once: a file that is there is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.part")
    partial.write_text(
        "".join(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers), encoding="utf-8"
    )
    partial.replace(path)


def parse_answers(text: str) -> tuple[Answer, ...]:
    """The answers in a file of `write_answers`."""
    return tuple(Answer(**json.loads(line)) for line in text.split("\n") if line)

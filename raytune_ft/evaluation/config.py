"""What to measure: models, rows and metrics."""

from __future__ import annotations

import difflib
from enum import StrEnum
from typing import Annotated, Any, ClassVar, NamedTuple

from pydantic import BeforeValidator, Field, field_validator

from raytune_ft.core.config import Config
from raytune_ft.models.config import DecodingConfig, Precision


class MetricFacts(NamedTuple):
    """What a reader has to know of a metric."""

    headline: str
    """The value that stands for the metric where there is room for one."""
    title: str
    lower_is_better: bool
    best: float | None
    """The value of a perfect model, where a scale from 0 ends; None for an open scale."""
    meaning: str


class EvaluationMetric(StrEnum):
    """What can be measured."""

    PERPLEXITY = "perplexity"
    ACCURACY = "accuracy"
    EXACT_MATCH = "exact_match"
    F1 = "f1"
    FIELD_F1 = "field_f1"
    VALID_JSON = "valid_json"
    ROUGE = "rouge"
    BLEU = "bleu"

    @property
    def facts(self) -> MetricFacts:
        """Title, direction, scale and meaning."""
        return _FACTS[self]

    @property
    def needs_answers(self) -> bool:
        """Whether the model has to generate (else its likelihoods are enough)."""
        return self is not EvaluationMetric.PERPLEXITY


_FACTS = {
    EvaluationMetric.PERPLEXITY: MetricFacts(
        "perplexity", "Perplexity", True, None, "how surprised the model is by the reference, per supervised token"
    ),
    EvaluationMetric.ACCURACY: MetricFacts(
        "accuracy", "Accuracy", False, 1.0, "share of answers that are the reference label, blanks around it aside"
    ),
    EvaluationMetric.EXACT_MATCH: MetricFacts(
        "exact_match", "Exact match", False, 1.0, "share of answers that are the reference (for JSON: an equal value)"
    ),
    EvaluationMetric.F1: MetricFacts(
        "f1", "Token F1", False, 1.0, "words shared by answer and reference, mean of rows"
    ),
    EvaluationMetric.FIELD_F1: MetricFacts(
        "field_f1", "Field F1", False, 1.0, "key-value pairs of the JSON reference that the answer has, over all rows"
    ),
    EvaluationMetric.VALID_JSON: MetricFacts(
        "valid_json", "Valid JSON", False, 1.0, "share of answers that parse as a JSON object or array"
    ),
    EvaluationMetric.ROUGE: MetricFacts(
        "rougeL", "ROUGE-L", False, 1.0, "longest common word sequence of answer and reference, mean F-measure of rows"
    ),
    EvaluationMetric.BLEU: MetricFacts(
        "bleu", "BLEU", False, 100.0, "n-grams shared with the reference, over all rows"
    ),
}


def _known_metric(value: Any) -> Any:
    if isinstance(value, str) and value not in set(EvaluationMetric):
        known = [str(metric) for metric in EvaluationMetric]
        near = difflib.get_close_matches(value.lower(), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
        raise ValueError(f"there is no such metric; {hint}")
    return value


class MeasureConfig(Config):
    """What every evaluation is told, of one model or of several."""

    not_identity: ClassVar[frozenset[str]] = Config.not_identity | {"num_actors"}

    dataset_path: str = Field(min_length=1)
    """A dataset that `prepare` made, or a JSONL or Parquet file with a `messages` column."""
    metrics: tuple[Annotated[EvaluationMetric, BeforeValidator(_known_metric)], ...] = Field(min_length=1)
    """What to measure; a metric that does not fit the references is refused before a model is loaded."""
    output_dir: str = Field("evaluation_results", min_length=1)
    """Folder (or URI) of the report."""
    split: str = "test"
    """Which split of the dataset to measure on; a single file is taken whole."""
    decoding: DecodingConfig = DecodingConfig()
    """How answers are generated; greedy by default, so that a second run gives the same answers."""
    precision: Precision = Precision.AUTO
    """Number format of the model's weights."""
    max_rows: int | None = Field(None, ge=1)
    """Only the first so many rows; all by default."""
    compare_with_base: bool = True
    """Whether the base of the (first) tuned model is measured, too, where it is known and not among the models."""
    slice_by: tuple[str, ...] | None = None
    """Metadata fields to show values by; by default every field that takes few values, or numbers. Lengths always."""
    num_actors: int | None = Field(None, ge=1)
    """Copies of the model that share the rows; by default one per GPU, or one less than there are CPUs."""
    seed: int = 0
    """Seed of the bootstrap intervals."""

    @field_validator("metrics")
    @classmethod
    def _once(cls, metrics: tuple[EvaluationMetric, ...]) -> tuple[EvaluationMetric, ...]:
        return tuple(dict.fromkeys(metrics))


class EvaluationConfig(MeasureConfig):
    """Settings of `ModelEvaluator`."""

    model_path: str = Field(min_length=1)
    """The model to evaluate: a folder (model or adapter), an artifact, a hub id, or ``starter:smollm2-135m``."""
    base_model_path: str | None = None
    """A model to compare it with, usually its base; the two are then labelled ``base`` and ``tuned``."""

    @property
    def models(self) -> dict[str, str]:
        """Label and path of each model, in the order of the report."""
        if self.base_model_path is None:
            return {"model": self.model_path}
        return {"base": self.base_model_path, "tuned": self.model_path}


class ComparisonConfig(MeasureConfig):
    """Settings of `compare_models`."""

    output_dir: str = Field("comparison_results", min_length=1)
    """Folder (or URI) of the report."""
    model_paths: tuple[str, ...] = Field(min_length=2)
    """The models to compare, each of them as `EvaluationConfig.model_path`."""

    @field_validator("model_paths")
    @classmethod
    def _distinct(cls, paths: tuple[str, ...]) -> tuple[str, ...]:
        twice = next((path for path in paths if paths.count(path) > 1), None)
        if twice is not None:
            raise ValueError(f"names {twice} twice; a model cannot be compared with itself")
        return paths

    @property
    def models(self) -> dict[str, str]:
        """Label and path of each model: the shortest end of its path that no other shares."""
        parts = [path.rstrip("/").split("/") for path in self.model_paths]
        for depth in range(1, max(map(len, parts)) + 1):
            labels = ["/".join(part[-depth:]) for part in parts]
            if len(set(labels)) == len(labels):
                return dict(zip(labels, self.model_paths, strict=True))
        return dict(zip(self.model_paths, self.model_paths, strict=True))

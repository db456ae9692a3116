"""What to measure: models, rows and metrics."""

from __future__ import annotations

import difflib
import re
from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from raytune_ft.core.config import Config, Place
from raytune_ft.evaluation.config_inference import (
    OF_ENDPOINTS,
    WITHOUT_ENDPOINT,
    EndpointConfig,
    ModelPath,
    is_endpoint,
    refuse_idle_inference,
)
from raytune_ft.evaluation.metric_names import EvaluationMetric, MetricFacts
from raytune_ft.models.config import DecodingConfig, Precision

__all__ = ["ComparisonConfig", "EvaluationConfig", "EvaluationMetric", "MeasureConfig", "MetricFacts"]


def _known_metric(value: Any) -> Any:
    if isinstance(value, str) and value not in set(EvaluationMetric):
        known = [str(metric) for metric in EvaluationMetric]
        near = difflib.get_close_matches(value.lower(), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
        raise ValueError(f"there is no such metric; {hint}")
    return value


EXTRACTIONS = ("gsm8k", "last_number", "boxed")
"""Named ways to find the answer in a text."""


BleuTokenizer = Literal["13a", "intl", "zh", "char", "none", "ja-mecab", "ko-mecab"]
"""sacrebleu's, but for those that fetch a model from the network."""


_OF_METRICS = {
    "bleu_tokenizer": {EvaluationMetric.BLEU},
    "custom_functions": {EvaluationMetric.CUSTOM},
    "extraction": {EvaluationMetric.ACCURACY, EvaluationMetric.EXACT_MATCH},
    "json_schema": {EvaluationMetric.JSON_SCHEMA},
}
"""Settings that only some metrics look at."""


class ForgettingConfig(Config):
    """A check that tuning has not cost general abilities: shipped questions, and perplexity on general text."""

    text_path: Place | None = None
    """General text (a text file, blank lines between passages, or JSONL with ``text``); by default the shipped one."""
    max_accuracy_drop: float = Field(0.05, ge=0.0, le=1.0)
    """Share of the shipped questions that may be lost before the report warns."""
    max_perplexity_rise: float = Field(0.1, ge=0.0)
    """Rise of the perplexity on general text, as a share of the base's, before the report warns."""
    max_rows: int | None = Field(None, ge=1)
    """Only so many questions and passages."""


class HarnessConfig(Config):
    """Which lm-eval tasks to run, and how."""

    tasks: tuple[str, ...] = Field(min_length=1)
    """Names of tasks, as ``lm-eval ls tasks`` has them, or of those in `include_path`."""
    include_path: Place | None = None
    """Folder with task files (YAML) of your own."""
    num_fewshot: int | None = Field(None, ge=0)
    """Examples before each question; by default the task's own number."""
    limit: int | None = Field(None, ge=1)
    """Only the first so many documents of each task."""
    batch_size: int = Field(8, ge=1)
    """Documents at once."""
    endpoint_tokenizer: Place | None = None
    """Of an endpoint: the folder or hub id of its model's tokenizer. With it tasks of likelihoods are asked, too, by
    ``/v1/completions`` with log-probabilities; without it only tasks that generate, by ``/v1/chat/completions``."""


class MeasureConfig(Config):
    """What every evaluation is told, of one model or of several."""

    not_identity: ClassVar[frozenset[str]] = Config.not_identity | {
        "num_actors",
        "endpoint",
        "max_unanswered",
        "reward_model_path",
    }

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
    endpoint: EndpointConfig = EndpointConfig()
    """How models that are given as the URL of an endpoint are asked."""
    max_unanswered: int = Field(0, ge=0)
    """Rows that may stay without an answer; they are then left out of all models' values, and counted."""
    extraction: str | None = None
    """Where exact match and accuracy find the answer in a text: ``gsm8k`` (the number behind ``####``),
    ``last_number``, ``boxed``, or a regular expression whose (only) group is the answer; by default the whole text."""
    bleu_tokenizer: BleuTokenizer = "13a"
    """What BLEU counts as words, as sacrebleu names it: ``13a`` and ``intl`` part at blanks and punctuation, ``zh``
    makes each Chinese character one, ``char`` any character, ``none`` takes what blanks part. ``ja-mecab`` and
    ``ko-mecab`` need ``sacrebleu[ja]`` and ``sacrebleu[ko]``. Values of different tokenizers do not compare."""
    json_schema: str | dict[str, Any] | None = None
    """The schema of the metric json_schema, or the path of the file that holds it."""
    custom_functions: dict[str, str] = Field(default_factory=dict)
    """The functions of the metric custom by name, as ``package.module:function``; each takes answer and reference and
    gives a number, the higher the better. The first one's mean stands for the metric."""
    reward_model_path: Place | None = None
    """The model that the metric reward asks (`raytune-ft reward` trains one): a folder, artifact, URI or hub id. It
    reads the answers by its own chat template, so it may have other tokens than the models."""
    allow_leak: bool = False
    """Whether to go on, with a note in the report, where a model was trained on some of these rows."""
    near_duplicate: float = Field(0.8, gt=0.0, le=1.0)
    """Share of five-word sequences in common (Jaccard) from which a row counts as one that a model was trained on."""
    production_path: Place | None = None
    """Feedback records (JSONL, Parquet, or a folder of these): the report then says how far what they ask is from what
    the test set asks. More records do not make a finished report another one: evaluate into another folder."""
    production_embedder: Place = "starter:all-minilm-l6-v2"
    """The embedder by which that is told; a folder, URI or hub id."""
    forgetting: ForgettingConfig | None = None
    """Whether, and how, general abilities are compared with the base's."""
    harness: HarnessConfig | None = None
    """Tasks of lm-eval (the extra of that name) that each model goes through, too."""

    @field_validator("metrics")
    @classmethod
    def _once(cls, metrics: tuple[EvaluationMetric, ...]) -> tuple[EvaluationMetric, ...]:
        return tuple(dict.fromkeys(metrics))

    @field_validator("extraction")
    @classmethod
    def _pattern(cls, extraction: str | None) -> str | None:
        if extraction is not None and extraction not in EXTRACTIONS:
            try:
                groups = re.compile(extraction).groups
            except re.error as error:
                raise ValueError(f"must be {', '.join(EXTRACTIONS)} or a regular expression ({error})") from None
            if groups != 1:
                raise ValueError(f"must be {', '.join(EXTRACTIONS)} or a regular expression with one group")
        return extraction

    @model_validator(mode="after")
    def _asked_for(self) -> MeasureConfig:
        if EvaluationMetric.JSON_SCHEMA in self.metrics and self.json_schema is None:
            raise ValueError("metrics has json_schema, which needs a schema in json_schema")
        if EvaluationMetric.CUSTOM in self.metrics and not self.custom_functions:
            raise ValueError("metrics has custom, which needs a function in custom_functions")
        if (EvaluationMetric.REWARD in self.metrics) != (self.reward_model_path is not None):
            raise ValueError("the metric reward and a reward model in reward_model_path belong together; give both")
        return self

    @model_validator(mode="after")
    def _says_nothing_in_vain(self) -> MeasureConfig:
        for name, metrics in _OF_METRICS.items():
            if not metrics & set(self.metrics):
                wanted = " or ".join(sorted(metrics))
                self.refuse_idle([name], f"has no effect without the metric {wanted}; add that, or leave it out")
        if self.production_path is None:
            self.refuse_idle(["production_embedder"], "has no effect without production_path; leave it out")
        likelihoods = [metric for metric in self.metrics if not metric.needs_answers]
        if len(likelihoods) == len(self.metrics):
            why = f"has no effect: no answers are generated for {' and '.join(likelihoods)}; leave it out"
            self.decoding.refuse_idle(DecodingConfig.model_fields, why, under="decoding.")
        paths = self.models.values()
        refuse_idle_inference(paths, decoding=self.decoding, endpoint=self.endpoint, likelihoods=bool(likelihoods))
        if all(map(is_endpoint, paths)):
            self._refuse_of_local_models()
        if self.harness is not None and not any(map(is_endpoint, paths)):
            self.harness.refuse_idle(["endpoint_tokenizer"], WITHOUT_ENDPOINT, under="harness.")
        return self

    def _refuse_of_local_models(self) -> None:
        why = "has no effect: what the model of an endpoint was trained on is not known; leave it out"
        self.refuse_idle(["allow_leak", "near_duplicate"], why)
        if self.reward_model_path is None:
            self.refuse_idle(["precision"], OF_ENDPOINTS)
        if self.harness is not None:
            self.harness.refuse_idle(["batch_size"], OF_ENDPOINTS, under="harness.")
        if self.forgetting is not None:
            why = "has no effect: of an endpoint only the shipped questions are asked; leave it out"
            self.forgetting.refuse_idle(["text_path", "max_perplexity_rise"], why, under="forgetting.")

    @property
    @abstractmethod
    def models(self) -> dict[str, str]:
        """Label and path of each model, in the order of the report."""


class EvaluationConfig(MeasureConfig):
    """Settings of `ModelEvaluator`."""

    model_path: ModelPath
    """The model to evaluate: a folder (model or adapter), an artifact, a hub id, ``starter:smollm2-135m``, or the
    URL of an endpoint (``http://host:8000/v1#name``), whose own answers then count."""
    base_model_path: ModelPath | None = None
    """A model to compare it with, usually its base; the two are then labelled ``base`` and ``tuned``."""
    previous_model_path: ModelPath | None = None
    """The model that it is to replace, which is compared with it, too, and labelled ``previous``."""

    @model_validator(mode="after")
    def _with_base_or_not(self) -> EvaluationConfig:
        if self.base_model_path is not None and not self.compare_with_base:
            raise ValueError(
                f"compare_with_base: false, and base_model_path names a base to compare with ({self.base_model_path}); "
                "leave one of them out"
            )
        return self

    @property
    def models(self) -> dict[str, str]:
        """Label and path of each model, in the order of the report."""
        others = {"base": self.base_model_path, "previous": self.previous_model_path}
        named = {label: path for label, path in others.items() if path is not None}
        return {**named, "tuned" if named else "model": self.model_path}


class ComparisonConfig(MeasureConfig):
    """Settings of `compare_models`."""

    output_dir: str = Field("comparison_results", min_length=1)
    """Folder (or URI) of the report."""
    model_paths: tuple[ModelPath, ...] = Field(min_length=2)
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

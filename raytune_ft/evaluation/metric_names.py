"""What can be measured, and what a reader has to know of each metric."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


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
    CHRF = "chrf"
    LABEL_F1 = "label_f1"
    SET_F1 = "set_f1"
    CHOICE_ACCURACY = "choice_accuracy"
    CALIBRATION = "calibration"
    JSON_SCHEMA = "json_schema"
    LENGTH = "length"
    REPETITION = "repetition"
    REWARD = "reward"
    CUSTOM = "custom"

    @property
    def facts(self) -> MetricFacts:
        """Title, direction, scale and meaning."""
        return _FACTS[self]

    @property
    def needs_answers(self) -> bool:
        """Whether the model has to generate (else its likelihoods are enough)."""
        return not (self.needs_choices or self is EvaluationMetric.PERPLEXITY)

    @property
    def needs_choices(self) -> bool:
        """Whether the likelihoods of several answers to choose from are compared."""
        return self in {EvaluationMetric.CHOICE_ACCURACY, EvaluationMetric.CALIBRATION}

    @property
    def needs_references(self) -> bool:
        """Whether a row must say what the right answer is."""
        return self not in {EvaluationMetric.JSON_SCHEMA, EvaluationMetric.REPETITION, EvaluationMetric.REWARD}


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
    EvaluationMetric.CHRF: MetricFacts(
        "chrf", "chrF", False, 100.0, "character n-grams shared with the reference, over all rows"
    ),
    EvaluationMetric.LABEL_F1: MetricFacts(
        "label_f1_macro", "Label F1 (macro)", False, 1.0, "F1 of each label, the mean over the labels of the references"
    ),
    EvaluationMetric.SET_F1: MetricFacts(
        "set_f1", "Set F1", False, 1.0, "items that answer and reference list, whatever their order, over all rows"
    ),
    EvaluationMetric.CHOICE_ACCURACY: MetricFacts(
        "choice_accuracy", "Choice accuracy", False, 1.0, "share of rows whose likeliest choice is the reference"
    ),
    EvaluationMetric.CALIBRATION: MetricFacts(
        "ece",
        "Calibration error",
        True,
        None,
        "how far the confidence in the likeliest choice is from how often it is "
        "right (expected calibration error, 10 bins)",
    ),
    EvaluationMetric.JSON_SCHEMA: MetricFacts(
        "json_schema", "JSON schema", False, 1.0, "share of answers that the JSON schema of the settings accepts"
    ),
    EvaluationMetric.LENGTH: MetricFacts(
        "length_error",
        "Length error",
        True,
        None,
        "difference of the words of answer and reference, as a share of the reference's, mean of rows",
    ),
    EvaluationMetric.REPETITION: MetricFacts(
        "repetition", "Repetition", True, None, "share of an answer's four-word sequences that stood in it before"
    ),
    EvaluationMetric.REWARD: MetricFacts(
        "reward", "Reward", False, None, "mean score that the reward model of the settings gives the answers"
    ),
    EvaluationMetric.CUSTOM: MetricFacts(
        "custom", "Custom", False, None, "mean score of the function that the settings name"
    ),
}

"""The metrics: perplexity, whether an answer is right, and what a reward model gives it; all offline.

Those of shared words, of JSON, of choices, of labels and of an answer's surface lie beside; `make_metric` gives any of
them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np

from raytune_ft.core.errors import DataError
from raytune_ft.evaluation.answers import canonical, extracted, parse_json, same_answer
from raytune_ft.evaluation.choice_metrics import Calibration, ChoiceAccuracy
from raytune_ft.evaluation.json_metrics import FieldF1, ValidJson
from raytune_ft.evaluation.label_metrics import LabelF1, SetF1
from raytune_ft.evaluation.metric_names import EvaluationMetric
from raytune_ft.evaluation.overlap_metrics import Bleu, Rouge, TokenF1
from raytune_ft.evaluation.row_metric import Columns, MeanMetric, RowMetric, Values, ratio
from raytune_ft.evaluation.surface_metrics import Chrf, Custom, JsonSchema, Length, Repetition


class Perplexity(RowMetric):
    """exp of the mean negative log-likelihood per supervised token, over the tokens of all rows; and bits per byte of
    their text, by which models with different tokenizers compare."""

    name_in_settings = EvaluationMetric.PERPLEXITY

    def _info(self) -> Any:
        return self._described({name: datasets.Value("float64") for name in ("nll", "tokens", "bytes")})

    def columns(self, **rows: Sequence[Any]) -> Columns:
        """Nats and supervised tokens; a row without tokens, or scored as not a number, is refused."""
        nll, tokens = np.asarray(rows["nll"], float), np.asarray(rows["tokens"], float)
        bad = np.flatnonzero(~np.isfinite(nll) | (tokens <= 0))
        if bad.size:
            row = int(bad[0])
            raise DataError(
                f"perplexity: {bad.size} of {nll.size} rows have no finite score; row {row + 1} has nll {nll[row]} "
                f"over {tokens[row]:.0f} supervised tokens. Check the row's answer, or the model's weights for NaN."
            )
        return {"nll": nll, "tokens": tokens, "bytes": np.asarray(rows["bytes"], float)}

    def values(self, sums: Columns) -> Values:
        """`perplexity`, `nll_per_token` in nats, and, where the bytes are known, `bits_per_byte`."""
        mean = ratio(sums["nll"], sums["tokens"])
        with np.errstate(over="ignore"):
            values: Values = {"perplexity": np.exp(mean), "nll_per_token": mean}
        if np.all(sums["bytes"] > 0):
            values = {**values, "bits_per_byte": ratio(sums["nll"], sums["bytes"]) / np.log(2)}
        return values


class ExtractingMetric(MeanMetric):
    """Base of metrics that compare an answer found within the text, if the settings say where it stands."""

    def __init__(self, extraction: str | None = None) -> None:
        super().__init__()
        self._extraction = extraction

    def misfit(self, reference: str) -> str | None:
        """A reference needs an answer where the extraction looks for it."""
        if self._extraction is None or extracted(reference, self._extraction) is not None:
            return None
        return f"the extraction {self._extraction} needs an answer in every reference"

    def score(self, prediction: str, reference: str) -> dict[str, float]:
        """1 where the answer is right; with an extraction also whether one was found."""
        name = str(self.name_in_settings)
        if self._extraction is None:
            return {name: float(self.equal(prediction, reference))}
        given, wanted = extracted(prediction, self._extraction), extracted(reference, self._extraction)
        right = given is not None and wanted is not None and same_answer(given, wanted)
        return {name: float(right), f"{name}_found": float(given is not None)}

    def equal(self, prediction: str, reference: str) -> bool:
        """Whether a whole text is the right one."""
        return prediction.strip() == reference.strip()


class Accuracy(ExtractingMetric):
    """Share of rows whose generated label is the reference, blanks around both stripped (sklearn's accuracy_score)."""

    name_in_settings = EvaluationMetric.ACCURACY


class ExactMatch(ExtractingMetric):
    """Share of rows answered exactly.

    Where the reference is a JSON object or array, the answer must parse to an equal value (order of keys and blanks
    do not count; 1 equals 1.0 but not true); elsewhere the texts must be equal, blanks around them stripped. With an
    extraction, what it finds in both is compared instead.
    """

    name_in_settings = EvaluationMetric.EXACT_MATCH

    def equal(self, prediction: str, reference: str) -> bool:
        """Whether the answer is exact."""
        wanted = parse_json(reference)
        if wanted is None:
            return super().equal(prediction, reference)
        given = parse_json(prediction)
        return given is not None and canonical(given) == canonical(wanted)


class Reward(RowMetric):
    """Mean of what a reward model gives the answers."""

    name_in_settings = EvaluationMetric.REWARD

    def _info(self) -> Any:
        return self._described({"rewards": datasets.Value("float64")})

    def columns(self, **rows: Sequence[Any]) -> Columns:
        """The rewards, and `rows` (1 each)."""
        given = np.asarray(rows["rewards"], float)
        return {"reward": given, "rows": np.ones(len(given))}

    def values(self, sums: Columns) -> Values:
        """`reward`."""
        return {"reward": ratio(sums["reward"], sums["rows"])}


METRICS: dict[EvaluationMetric, type[RowMetric]] = {
    metric.name_in_settings: metric
    for metric in (
        *(Perplexity, Accuracy, ExactMatch, TokenF1, FieldF1, ValidJson, Rouge, Bleu, Chrf, LabelF1, SetF1),
        *(ChoiceAccuracy, Calibration, JsonSchema, Length, Repetition, Reward, Custom),
    )
}


def make_metric(name: EvaluationMetric, settings: Mapping[str, Any]) -> RowMetric:
    """The metric as the resolved settings of an evaluation, or of a training run that measures answers, want it.

    Raises:
        ConfigError: if a schema, function or tokenizer that they name cannot be had.
    """
    if name in {EvaluationMetric.EXACT_MATCH, EvaluationMetric.ACCURACY}:
        return METRICS[name](settings.get("extraction"))  # type: ignore[call-arg]
    if name is EvaluationMetric.BLEU:
        return Bleu(settings.get("bleu_tokenizer", "13a"))
    if name is EvaluationMetric.JSON_SCHEMA:
        return JsonSchema(settings["json_schema"])
    if name is EvaluationMetric.CUSTOM:
        return Custom(settings["custom_functions"])
    return METRICS[name]()

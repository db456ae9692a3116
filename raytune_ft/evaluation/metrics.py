"""The metrics: perplexity, and scores of answers over rouge-score, sacrebleu and our reading of JSON; all offline.

Those of choices, of labels and of an answer's surface lie beside; `make_metric` gives any of them.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray

from raytune_ft.core.errors import ConfigError, DataError
from raytune_ft.core.words import unspaced_share
from raytune_ft.evaluation.answers import canonical, extracted, fields, parse_json, same_answer, words
from raytune_ft.evaluation.choice_metrics import Calibration, ChoiceAccuracy
from raytune_ft.evaluation.config import BleuTokenizer
from raytune_ft.evaluation.label_metrics import LabelF1, SetF1
from raytune_ft.evaluation.metric_names import EvaluationMetric
from raytune_ft.evaluation.row_metric import Columns, MeanMetric, RowMetric, Values, counted, ratio
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


class TokenF1(RowMetric):
    """Mean over rows of precision, recall and F1 of the words shared by answer and reference, and the F1 over all
    words (micro).

    Words as SQuAD takes them: lower case, without ASCII punctuation and English articles, split at blanks; characters
    of scripts that write no spaces are words of their own.
    """

    name_in_settings = EvaluationMetric.F1
    citation = "Rajpurkar et al. 2016, SQuAD: 100,000+ Questions for Machine Comprehension of Text"

    def misfit(self, reference: str) -> str | None:
        """A reference needs words."""
        return None if words(reference) else "it compares words"

    def columns(self, **rows: Sequence[Any]) -> Columns:
        """Words shared, given and wanted, and each row's own precision, recall and F1 (0 where no word is shared)."""
        both = (
            (Counter(words(answer)), Counter(words(reference)))
            for answer, reference in zip(rows["predictions"], rows["references"], strict=True)
        )
        counts = (((g & w).total(), g.total(), w.total()) for g, w in both)
        table = counted(["shared", "given", "wanted"], counts)
        precision, recall = ratio(table["shared"], table["given"]), ratio(table["shared"], table["wanted"])
        own = {"precision": precision, "recall": recall, "f1": ratio(2 * precision * recall, precision + recall)}
        return {**own, **table, "rows": np.ones(len(precision))}

    def values(self, sums: Columns) -> Values:
        """`f1`, `f1_precision`, `f1_recall`, means of rows, and `f1_micro`."""
        return {
            "f1": ratio(sums["f1"], sums["rows"]),
            "f1_precision": ratio(sums["precision"], sums["rows"]),
            "f1_recall": ratio(sums["recall"], sums["rows"]),
            "f1_micro": ratio(2 * sums["shared"], sums["given"] + sums["wanted"]),
        }


MOST_FIELDS = 100
"""Fields of JSON objects that are looked at one by one: a column a row takes memory, and a line of the report."""


class FieldF1(RowMetric):
    """Precision, recall and F1 over the key-value pairs of JSON objects (micro), and the accuracy of each field.

    A pair counts when key and value are equal. An answer that is not a JSON object has no pairs. Where the reference is
    ``{}``, the same is right, with 1, and any other answer wrong, with 0; pairs are then too many. The accuracy of a
    field is taken over the rows whose reference has it. Of more than 100 fields only the 100 that most references have
    stand for themselves, and for the macro F1; the others are counted as ``field_others``.
    """

    name_in_settings = EvaluationMetric.FIELD_F1

    def misfit(self, reference: str) -> str | None:
        """A reference is an object."""
        return None if isinstance(parse_json(reference), dict) else "it compares the fields of JSON objects"

    def check(self, references: Iterable[str]) -> None:
        """Refuses references of which one is no object, or none has fields."""
        has_fields = False

        def seen() -> Iterator[str]:
            nonlocal has_fields
            for reference in references:
                has_fields = has_fields or bool(fields(reference))
                yield reference

        super().check(seen())
        if not has_fields:
            raise DataError(
                f"{self.name_in_settings}: does not fit this data: it compares the fields of JSON objects, and every "
                "reference is an empty one. Leave this metric out, or evaluate on other data."
            )

    def columns(self, **rows: Sequence[Any]) -> Columns:
        """Pairs shared, given and wanted, and whether both are ``{}``; per field the rows that have it, or right."""
        times = Counter(name for reference in rows["references"] for name in fields(reference))
        most = {name for name, _ in times.most_common(MOST_FIELDS)}
        kinds = ("present", "said", "right")
        places = {name: {kind: array("q") for kind in kinds} for name in times if name in most}

        def counts() -> Iterator[tuple[int, int, int, bool]]:
            for place, (answer, reference) in enumerate(zip(rows["predictions"], rows["references"], strict=True)):
                given, wanted = fields(answer), fields(reference)
                shared = given.items() & wanted.items()
                for kind, names in zip(kinds, (wanted, given, dict(shared)), strict=True):
                    for name in most.intersection(names):
                        places[name][kind].append(place)
                yield len(shared), len(given), len(wanted), not wanted and parse_json(answer) == {}

        table = counted(["shared", "given", "wanted", "nothing"], counts())
        for name, found in places.items():
            for kind in kinds:
                table[f"{kind}.{name}"] = np.zeros(len(table["shared"]))
                table[f"{kind}.{name}"][found[kind]] = 1
        if len(times) > len(most):
            table["others"] = np.zeros(len(table["shared"]))
            table["others"][0] = len(times) - len(most)  # a number of all rows: only their sum means something
        return table

    def values(self, sums: Columns) -> Values:
        """`field_f1`, `field_precision`, `field_recall`, the mean F1 of fields (macro), and each field's accuracy."""
        found: Values = {
            "field_f1": _of_pairs(2 * sums["shared"], sums["given"] + sums["wanted"], sums),
            "field_precision": _of_pairs(sums["shared"], sums["given"], sums),
            "field_recall": _of_pairs(sums["shared"], sums["wanted"], sums),
        }
        names = [key.removeprefix("present.") for key in sums if key.startswith("present.")]
        each = [ratio(2 * sums[f"right.{n}"], sums[f"present.{n}"] + sums[f"said.{n}"]) for n in names]
        found["field_f1_macro"] = np.mean(each, axis=0) if each else found["field_f1"]
        if "others" in sums:
            found["field_others"] = sums["others"]
        for name in names:
            found[f"field_accuracy.{name}"] = ratio(sums[f"right.{name}"], sums[f"present.{name}"])
        return found


def _of_pairs(above: Any, below: Any, sums: Columns) -> NDArray[np.float64]:
    """`above / below`, but 1 where no pairs are wanted, none given, and an object without any said."""
    without = (sums["given"] == 0) & (sums["wanted"] == 0) & (sums["nothing"] > 0)
    return np.where(without, 1.0, ratio(above, below))


class ValidJson(MeanMetric):
    """Share of answers that parse as a JSON object or array, whole and strict (no text around it, no NaN)."""

    name_in_settings = EvaluationMetric.VALID_JSON

    def misfit(self, reference: str) -> str | None:
        """Where a reference is no JSON, an answer need not be."""
        return None if parse_json(reference) is not None else "it asks for JSON objects or arrays"

    def score(self, prediction: str, reference: str) -> dict[str, float]:
        """1 where the answer parses."""
        return {"valid_json": float(parse_json(prediction) is not None)}


class Rouge(MeanMetric):
    """ROUGE-1, -2 and -L: mean F-measure of rows, as rouge-score gives it without stemming."""

    name_in_settings = EvaluationMetric.ROUGE
    citation = "Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries"

    @cached_property
    def _scorer(self) -> Any:
        from rouge_score.rouge_scorer import RougeScorer
        from rouge_score.tokenizers import DefaultTokenizer

        return RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=DefaultTokenizer(use_stemmer=False))

    def misfit(self, reference: str) -> str | None:
        """rouge-score's tokenizer drops everything but a-z and 0-9, so most of a reference has to be of these."""
        kept = len(re.findall(r"[a-z0-9]", reference.lower()))
        if kept and 2 * kept >= sum(character.isalnum() for character in reference):
            return None
        return "its tokenizer keeps only words of a-z and 0-9 (chrf fits any script)"

    def score(self, prediction: str, reference: str) -> dict[str, float]:
        """The three F-measures."""
        return {name: float(score.fmeasure) for name, score in self._scorer.score(reference, prediction).items()}


class Bleu(RowMetric):
    """Corpus BLEU from 0 to 100, as sacrebleu gives it (by default with 13a tokens, exponential smoothing)."""

    name_in_settings = EvaluationMetric.BLEU
    citation = "Post 2018, A Call for Clarity in Reporting BLEU Scores"

    def __init__(self, tokenizer: BleuTokenizer = "13a") -> None:
        """BLEU of a tokenizer's words.

        Raises:
            ConfigError: if the tokenizer's package is not installed.
        """
        super().__init__()
        from sacrebleu.metrics import BLEU

        self._tokenizer = tokenizer
        try:
            self._sentence = BLEU(tokenize=tokenizer, effective_order=True)
        except (RuntimeError, ImportError):
            extra = tokenizer.partition("-")[0]
            raise ConfigError(
                f"bleu_tokenizer: {tokenizer} needs a package that is not installed: pip install 'sacrebleu[{extra}]', "
                "or take char, which needs none"
            ) from None

    def misfit(self, reference: str) -> str | None:
        """Scripts without blanks need a tokenizer that tells their words, or characters, apart."""
        fitting = "chrf and bleu_tokenizer: char fit any script"
        unspaced = unspaced_share(reference)
        if self._tokenizer in {"13a", "intl"} and unspaced > 0.5:
            return f"its tokens ({self._tokenizer}) need blanks between words ({fitting}, zh fits Chinese)"
        if self._tokenizer == "none" and unspaced > 0.5 and len(reference.split()) < 2:
            return f"its tokens (none) are what blanks part ({fitting})"
        if self._tokenizer == "zh" and unspaced > 0.5:
            together = "".join(word for word in self._sentence.tokenizer(reference).split() if len(word) > 1)
            if unspaced_share(together) * _letters(together) > 0.5 * _letters(reference):
                return f"its tokens (zh) tell only Chinese characters apart ({fitting})"
        return None

    def columns(self, **rows: Sequence[Any]) -> Columns:
        """Matched and possible n-grams, lengths, and the BLEU of the row alone (of the n-gram orders that it has)."""
        score = self._sentence.sentence_score
        scored = (score(a, [r]) for a, r in zip(rows["predictions"], rows["references"], strict=True))
        names = [f"{kind}.{n}" for kind in ("correct", "total") for n in range(4)]
        return counted(
            [*names, "answer_length", "reference_length", "alone"],
            ([*one.counts, *one.totals, one.sys_len, one.ref_len, one.score] for one in scored),
        )

    def values(self, sums: Columns) -> Values:
        """`bleu`."""
        from sacrebleu.metrics import BLEU

        def bleu(*sums: float) -> float:
            counts = [int(count) for count in sums]
            return float(BLEU.compute_bleu(counts[:4], counts[4:8], *counts[8:], smooth_method="exp").score)

        names = [f"{kind}.{n}" for kind in ("correct", "total") for n in range(4)]
        names += ["answer_length", "reference_length"]
        return {"bleu": np.asarray(np.vectorize(bleu, otypes=[float])(*(sums[name] for name in names)))}

    def row_scores(self, columns: Columns) -> NDArray[np.float64]:
        """Sentence BLEU with effective order, since few sentences share four words in a row."""
        alone: NDArray[np.float64] = columns["alone"]
        return alone


def _letters(text: str) -> int:
    return sum(character.isalnum() for character in text)


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

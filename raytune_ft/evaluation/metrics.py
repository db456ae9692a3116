"""The metrics: perplexity, and scores of answers over rouge-score, sacrebleu and our reading of JSON; all offline."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray

from raytune_ft.core.errors import DataError
from raytune_ft.evaluation.answers import canonical, fields, parse_json, words
from raytune_ft.evaluation.config import EvaluationMetric
from raytune_ft.evaluation.row_metric import Columns, MeanMetric, RowMetric, Values, ratio


class Perplexity(RowMetric):
    """exp of the mean negative log-likelihood per supervised token, over the tokens of all rows."""

    name_in_settings = EvaluationMetric.PERPLEXITY

    def _info(self) -> Any:
        return self._described({"nll": datasets.Value("float64"), "tokens": datasets.Value("int64")})

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
        return {"nll": nll, "tokens": tokens}

    def values(self, sums: Columns) -> Values:
        """`perplexity`, and `nll_per_token` in nats."""
        mean = ratio(sums["nll"], sums["tokens"])
        with np.errstate(over="ignore"):
            return {"perplexity": np.exp(mean), "nll_per_token": mean}


class Accuracy(MeanMetric):
    """Share of rows whose generated label is the reference, blanks around both stripped (sklearn's accuracy_score)."""

    name_in_settings = EvaluationMetric.ACCURACY

    def score(self, prediction: str, reference: str) -> dict[str, float]:
        """1 where the labels are equal."""
        return {"accuracy": float(prediction.strip() == reference.strip())}


class ExactMatch(MeanMetric):
    """Share of rows answered exactly.

    Where the reference is a JSON object or array, the answer must parse to an equal value (order of keys and blanks
    do not count; 1 equals 1.0 but not true); elsewhere the texts must be equal, blanks around them stripped.
    """

    name_in_settings = EvaluationMetric.EXACT_MATCH

    def score(self, prediction: str, reference: str) -> dict[str, float]:
        """1 where the answer is exact."""
        wanted = parse_json(reference)
        if wanted is None:
            return {"exact_match": float(prediction.strip() == reference.strip())}
        given = parse_json(prediction)
        return {"exact_match": float(given is not None and canonical(given) == canonical(wanted))}


class TokenF1(MeanMetric):
    """Mean over rows of precision, recall and F1 of the words shared by answer and reference.

    Words as SQuAD takes them: lower case, without ASCII punctuation and English articles, split at blanks.
    """

    name_in_settings = EvaluationMetric.F1
    citation = "Rajpurkar et al. 2016, SQuAD: 100,000+ Questions for Machine Comprehension of Text"

    def misfit(self, reference: str) -> str | None:
        """A reference needs words."""
        return None if words(reference) else "it compares words"

    def score(self, prediction: str, reference: str) -> dict[str, float]:
        """Precision, recall and their harmonic mean; 0 where no word is shared."""
        given, wanted = Counter(words(prediction)), Counter(words(reference))
        shared = (given & wanted).total()
        precision = shared / given.total() if given else 0.0
        recall = shared / wanted.total() if wanted else 0.0
        f1 = 2 * precision * recall / (precision + recall) if shared else 0.0
        return {"f1": f1, "f1_precision": precision, "f1_recall": recall}


class FieldF1(RowMetric):
    """Precision, recall and F1 over the key-value pairs of JSON objects (micro), and the accuracy of each field.

    A pair counts when key and value are equal. An answer that is not a JSON object has no pairs. The accuracy of a
    field is taken over the rows whose reference has it.
    """

    name_in_settings = EvaluationMetric.FIELD_F1

    def misfit(self, reference: str) -> str | None:
        """A reference needs fields."""
        parsed = parse_json(reference)
        return None if isinstance(parsed, dict) and parsed else "it compares the fields of JSON objects"

    def columns(self, **rows: Sequence[Any]) -> Columns:
        """Pairs shared, given and wanted; per field the rows that have it, and those that have it right."""
        given = [fields(text) for text in rows["predictions"]]
        wanted = [fields(text) for text in rows["references"]]
        both = list(zip(given, wanted, strict=True))
        table = {
            "shared": [len(g.items() & w.items()) for g, w in both],
            "given": [len(g) for g in given],
            "wanted": [len(w) for w in wanted],
        }
        for name in dict.fromkeys(name for row in wanted for name in row):
            table[f"present.{name}"] = [int(name in w) for w in wanted]
            table[f"right.{name}"] = [int(name in w and name in g and g[name] == w[name]) for g, w in both]
        return {name: np.array(column, float) for name, column in table.items()}

    def values(self, sums: Columns) -> Values:
        """`field_f1`, `field_precision`, `field_recall`, and `field_accuracy.<name>` of each field."""
        found: Values = {
            "field_f1": ratio(2 * sums["shared"], sums["given"] + sums["wanted"]),
            "field_precision": ratio(sums["shared"], sums["given"]),
            "field_recall": ratio(sums["shared"], sums["wanted"]),
        }
        for name in (key.removeprefix("present.") for key in sums if key.startswith("present.")):
            found[f"field_accuracy.{name}"] = ratio(sums[f"right.{name}"], sums[f"present.{name}"])
        return found


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
        """rouge-score's tokenizer drops everything but a-z and 0-9."""
        return None if re.search(r"[a-z0-9]", reference.lower()) else "its tokenizer keeps only words of a-z and 0-9"

    def score(self, prediction: str, reference: str) -> dict[str, float]:
        """The three F-measures."""
        return {name: float(score.fmeasure) for name, score in self._scorer.score(reference, prediction).items()}


class Bleu(RowMetric):
    """Corpus BLEU from 0 to 100, as sacrebleu gives it with its defaults (13a tokens, exponential smoothing)."""

    name_in_settings = EvaluationMetric.BLEU
    citation = "Post 2018, A Call for Clarity in Reporting BLEU Scores"

    def columns(self, **rows: Sequence[Any]) -> Columns:
        """Matched and possible n-grams, lengths, and the BLEU of the row alone (of the n-gram orders that it has)."""
        from sacrebleu.metrics import BLEU

        sentence = BLEU(effective_order=True)
        scored = [sentence.sentence_score(a, [r]) for a, r in zip(rows["predictions"], rows["references"], strict=True)]
        table = {f"correct.{n}": [score.counts[n] for score in scored] for n in range(4)}
        table |= {f"total.{n}": [score.totals[n] for score in scored] for n in range(4)}
        table |= {"answer_length": [score.sys_len for score in scored], "reference_length": [s.ref_len for s in scored]}
        table["alone"] = [score.score for score in scored]
        return {name: np.array(column, float) for name, column in table.items()}

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


METRICS: dict[EvaluationMetric, type[RowMetric]] = {
    metric.name_in_settings: metric
    for metric in (Perplexity, Accuracy, ExactMatch, TokenF1, FieldF1, ValidJson, Rouge, Bleu)
}

"""Scores of the words and word sequences that an answer shares with the reference; over rouge-score and sacrebleu."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytune_ft.core.errors import ConfigError
from raytune_ft.core.words import unspaced_share
from raytune_ft.evaluation.answers import words
from raytune_ft.evaluation.config import BleuTokenizer
from raytune_ft.evaluation.metric_names import EvaluationMetric
from raytune_ft.evaluation.row_metric import Columns, MeanMetric, RowMetric, Values, counted, ratio


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

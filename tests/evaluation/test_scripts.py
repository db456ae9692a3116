"""Metrics whose tokenizer cannot read a script refuse it; others compare what is there."""

from __future__ import annotations

import pytest

from raytune_ft.core.errors import DataError
from raytune_ft.evaluation.answered import Unanswered, refuse_missing
from raytune_ft.evaluation.config import BleuTokenizer
from raytune_ft.evaluation.overlap_metrics import Bleu, Rouge, TokenF1


@pytest.mark.parametrize("metric", [Rouge(), Bleu()])
def test_a_tokenizer_that_cannot_read_the_reference_is_refused(metric: Rouge | Bleu) -> None:
    with pytest.raises(DataError, match="chrf"):
        metric.check(["今天天气很好 3"])
    metric.check(["un café près d'ici", "plain words, 3"])


@pytest.mark.parametrize(
    ("tokenizer", "reference", "fits"),
    [
        ("zh", "今天天气很好，我们去公园。", True),
        ("zh", "今日はとてもいい天気ですね。", False),
        ("zh", "วันนี้อากาศดีมาก", False),
        ("char", "今日はとてもいい天気ですね。", True),
        ("char", "วันนี้อากาศดีมาก", True),
        ("intl", "今天天气很好，我们去公园。", False),
        ("none", "今天天气很好，我们去公园。", False),
        ("none", "今天 天气 很 好", True),
        ("13a", "오늘 날씨가 아주 좋아요.", True),
        ("zh", "A fine day.", True),
    ],
)
def test_bleu_takes_the_scripts_that_its_tokenizer_reads(tokenizer: BleuTokenizer, reference: str, fits: bool) -> None:
    assert (Bleu(tokenizer).misfit(reference) is None) == fits


def test_token_f1_compares_the_characters_of_unspaced_scripts() -> None:
    found = TokenF1().columns(predictions=["今天很好"], references=["今天不好"])
    assert found["f1"].tolist() == [0.75]


def test_without_any_answer_there_is_nothing_to_measure() -> None:
    missing = [Unanswered(label="m", position=n, reason="no", fault="RunError") for n in range(2)]
    with pytest.raises(Exception, match="nothing to measure"):
        refuse_missing(missing, 2, 5)
    refuse_missing(missing, 3, 5)
    refuse_missing([], 0, 0)

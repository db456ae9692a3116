"""Numbers worked out by hand, and equality with the libraries that others trust."""

from __future__ import annotations

import json
import math

import evaluate
import pytest

from raytune_ft.core.errors import DataError
from raytune_ft.evaluation.config import EvaluationMetric
from raytune_ft.evaluation.metrics import METRICS

ANSWERS = [
    "the cat sat on the mat",
    "a quick brown fox jumps over a lazy dog",
    "nothing of the kind",
    "",
    "It is guilty, I say: the party of the first part!",
]
REFERENCES = [
    "the cat is on the mat",
    "the quick brown fox jumped over the lazy dog",
    "yes",
    "an answer is here",
    "It is the guilty party of the first part.",
]


def test_every_metric_of_the_settings_is_an_evaluate_metric() -> None:
    assert set(METRICS) == set(EvaluationMetric)
    assert all(issubclass(metric, evaluate.Metric) for metric in METRICS.values())


def test_the_headline_of_every_metric_is_among_its_values() -> None:
    rows = {"predictions": ['{"a": 1}'], "references": ['{"a": 1}'], "nll": [1.0], "tokens": [2]}
    for name, kind in METRICS.items():
        metric = kind()
        found = metric.compute(**{key: rows[key] for key in metric.features})
        assert name.facts.headline in found
        if name.facts.best is not None and name is not EvaluationMetric.BLEU:  # one word is too short for a BLEU of 100
            assert found[name.facts.headline] == name.facts.best


def test_perplexity_weighs_tokens_not_rows() -> None:
    # 3 nats over 1 token and 1 nat over 9: exp(4 / 10), not the mean of exp(3) and exp(1 / 9).
    found = METRICS[EvaluationMetric.PERPLEXITY]().compute(nll=[3.0, 1.0], tokens=[1, 9])
    assert found == {"perplexity": pytest.approx(math.exp(0.4), rel=1e-15), "nll_per_token": pytest.approx(0.4)}


@pytest.mark.parametrize(("nll", "tokens"), [(float("nan"), 3), (float("inf"), 3), (1.0, 0)])
def test_a_row_without_a_finite_score_is_refused(nll: float, tokens: int) -> None:
    with pytest.raises(DataError, match="1 of 2 rows have no finite score; row 2"):
        METRICS[EvaluationMetric.PERPLEXITY]().compute(nll=[1.0, nll], tokens=[1, tokens])


def test_accuracy_strips_blanks_and_equals_sklearn() -> None:
    from sklearn.metrics import accuracy_score

    predictions, references = [" yes\n", "no", "Yes", "maybe"], ["yes", "yes", "yes", "maybe"]
    found = METRICS[EvaluationMetric.ACCURACY]().compute(predictions=predictions, references=references)
    assert found == {"accuracy": 0.5}
    assert found["accuracy"] == accuracy_score(references, [prediction.strip() for prediction in predictions])


def test_exact_match_compares_json_as_values_and_text_as_text() -> None:
    predictions = ['{"b":2, "a":"x"}', '{"a":"x","b":true}', "Paris ", "paris", 'Sure: {"a":1}', "2"]
    references = ['{"a": "x", "b": 2}', '{"a": "x", "b": 1}', "Paris", "Paris", '{"a":1}', "2"]
    metric = METRICS[EvaluationMetric.EXACT_MATCH]()
    assert metric.compute(predictions=predictions, references=references) == {"exact_match": 0.5}
    columns = metric.columns(predictions=predictions, references=references)
    assert columns["exact_match"].tolist() == [1, 0, 1, 0, 0, 1]


def test_token_f1_by_hand() -> None:
    # Row 1: "cat sat on mat" against "cat is on mat": 3 of 4 words both ways. Row 2: 2 of 4 given, 2 of 2 wanted.
    found = METRICS[EvaluationMetric.F1]().compute(
        predictions=["the cat sat on the mat", "red red big bus"], references=["The cat is on the mat.", "a red bus"]
    )
    assert found["f1_precision"] == pytest.approx((3 / 4 + 2 / 4) / 2)
    assert found["f1_recall"] == pytest.approx((3 / 4 + 1) / 2)
    assert found["f1"] == pytest.approx((3 / 4 + 2 / 3) / 2)


def test_field_f1_by_hand() -> None:
    references = [{"name": "Ada", "n": 2}, {"name": "Bo", "n": 3}, {"name": "Cy"}]
    predictions = [{"name": "Ada", "n": 3}, {"name": "Bo", "n": 3, "extra": 1}, "not JSON"]
    found = METRICS[EvaluationMetric.FIELD_F1]().compute(
        predictions=[p if isinstance(p, str) else json.dumps(p) for p in predictions],
        references=[json.dumps(reference) for reference in references],
    )
    # Shared pairs: Ada; Bo and 3. Given: 2 + 3 + 0. Wanted: 2 + 2 + 1.
    assert found["field_precision"] == pytest.approx(3 / 5)
    assert found["field_recall"] == pytest.approx(3 / 5)
    assert found["field_f1"] == pytest.approx(3 / 5)
    assert found["field_accuracy.name"] == pytest.approx(2 / 3)
    assert found["field_accuracy.n"] == pytest.approx(1 / 2)


def test_field_f1_equals_sklearn_on_the_pairs() -> None:
    from sklearn.metrics import precision_recall_fscore_support
    from sklearn.preprocessing import MultiLabelBinarizer

    references = [{"a": 1, "b": 2}, {"a": 3, "c": 4, "d": 5}, {"b": 6}]
    predictions = [{"a": 1, "b": 9}, {"a": 3, "c": 4}, {"b": 6, "d": 7, "e": 8}]
    binarizer = MultiLabelBinarizer().fit([row.items() for row in references + predictions])
    expected = precision_recall_fscore_support(
        binarizer.transform([row.items() for row in references]),
        binarizer.transform([row.items() for row in predictions]),
        average="micro",
    )[:3]
    found = METRICS[EvaluationMetric.FIELD_F1]().compute(
        predictions=list(map(json.dumps, predictions)), references=list(map(json.dumps, references))
    )
    assert [found["field_precision"], found["field_recall"], found["field_f1"]] == pytest.approx(expected, rel=1e-12)


def test_valid_json_is_strict() -> None:
    predictions = ['{"a": 1}', "[1, 2]", '{"a": NaN}', 'Here: {"a": 1}']
    metric = METRICS[EvaluationMetric.VALID_JSON]()
    assert metric.compute(predictions=predictions, references=['{"a": 1}'] * 4) == {"valid_json": 0.5}


def test_rouge_equals_rouge_score() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    names = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(names)
    scores = [scorer.score(reference, answer) for answer, reference in zip(ANSWERS, REFERENCES, strict=True)]
    found = METRICS[EvaluationMetric.ROUGE]().compute(predictions=ANSWERS, references=REFERENCES)
    assert found == {name: sum(score[name].fmeasure for score in scores) / len(scores) for name in names}
    assert 0 < found["rouge2"] < found["rougeL"] < found["rouge1"] < 1


def test_bleu_equals_sacrebleu() -> None:
    from sacrebleu.metrics import BLEU

    expected = BLEU().corpus_score(ANSWERS, [REFERENCES]).score
    found = METRICS[EvaluationMetric.BLEU]().compute(predictions=ANSWERS, references=REFERENCES)
    assert found == {"bleu": expected}
    assert 10 < expected < 90


@pytest.mark.parametrize(
    ("metric", "reference", "reason"),
    [
        (EvaluationMetric.FIELD_F1, "plain text", "it compares the fields of JSON objects"),
        (EvaluationMetric.FIELD_F1, "[1, 2]", "it compares the fields of JSON objects"),
        (EvaluationMetric.FIELD_F1, "{}", "it compares the fields of JSON objects"),
        (EvaluationMetric.VALID_JSON, "Paris", "it asks for JSON objects or arrays"),
        (EvaluationMetric.ROUGE, "Привет, мир", "its tokenizer keeps only words of a-z and 0-9"),
        (EvaluationMetric.F1, "...", "it compares words"),
    ],
)
def test_a_metric_that_does_not_fit_is_refused_with_the_reason(
    metric: EvaluationMetric, reference: str, reason: str
) -> None:
    with pytest.raises(DataError, match=rf"{metric}: does not fit this data: {reason}, but the reference of row 2 is"):
        METRICS[metric]().compute(predictions=["x", "y"], references=['{"a": 1}', reference])


def test_no_rows_are_refused() -> None:
    with pytest.raises(DataError, match="there are no rows to measure"):
        METRICS[EvaluationMetric.ACCURACY]().compute(predictions=[], references=[])

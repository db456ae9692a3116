"""Numbers worked out by hand, and equality with the libraries that others trust."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import evaluate
import pytest

from raytune_ft.core.errors import ConfigError, DataError
from raytune_ft.evaluation.answers import extracted
from raytune_ft.evaluation.config import EvaluationMetric
from raytune_ft.evaluation.json_metrics import MOST_FIELDS
from raytune_ft.evaluation.metrics import METRICS, make_metric
from raytune_ft.evaluation.statistics import interval

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
    same = '{"a": 1}'
    choices = [{"text": same, "nll": 0.0, "bytes": 8}, {"text": "no", "nll": 50.0, "bytes": 2}]
    rows = {
        "predictions": [same],
        "references": [same],
        "nll": [1.0],
        "tokens": [2],
        "bytes": [3],
        "choices": [choices],
        "rewards": [0.5],
    }
    settings = {"json_schema": {"type": "object"}, "custom_functions": {"same": "operator:eq"}}
    for name in METRICS:
        metric = make_metric(name, settings)
        found = metric.compute(**{key: rows[key] for key in metric.features})
        assert name.facts.headline in found
        if name.facts.best is not None and name is not EvaluationMetric.BLEU:  # one word is too short for a BLEU of 100
            assert found[name.facts.headline] == name.facts.best


def test_perplexity_weighs_tokens_not_rows() -> None:
    # 3 nats over 1 token and 1 nat over 9: exp(4 / 10), not the mean of exp(3) and exp(1 / 9).
    found = METRICS[EvaluationMetric.PERPLEXITY]().compute(nll=[3.0, 1.0], tokens=[1, 9], bytes=[6, 10])
    assert found == {
        "perplexity": pytest.approx(math.exp(0.4), rel=1e-15),
        "nll_per_token": pytest.approx(0.4),
        "bits_per_byte": pytest.approx(4 / 16 / math.log(2)),
    }


@pytest.mark.parametrize(("nll", "tokens"), [(float("nan"), 3), (float("inf"), 3), (1.0, 0)])
def test_a_row_without_a_finite_score_is_refused(nll: float, tokens: int) -> None:
    with pytest.raises(DataError, match="1 of 2 rows have no finite score; row 2"):
        METRICS[EvaluationMetric.PERPLEXITY]().compute(nll=[1.0, nll], tokens=[1, tokens], bytes=[4, 4])


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
    assert found["f1_micro"] == pytest.approx(2 * (3 + 2) / (4 + 4 + 4 + 2))


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
    # name: 2 right, said twice, wanted 3 times; n: 1 right, said twice, wanted twice.
    assert found["field_f1_macro"] == pytest.approx((2 * 2 / 5 + 2 * 1 / 4) / 2)


def test_an_object_without_fields_is_right_where_the_reference_is_one() -> None:
    metric = make_metric(EvaluationMetric.FIELD_F1, {})
    answers, references = ["{}", "none", '{"a": 1}', "{}", '{"a": 1}'], ["{}", "{}", "{}", '{"a": 1}', '{"a": 1}']
    metric.check(references)
    columns = metric.columns(predictions=answers, references=references)
    assert metric.row_scores(columns).tolist() == [1, 0, 0, 0, 1]
    found = metric.summary(columns)  # shared 1, given 2, wanted 2
    assert [found[f"field_{name}"] for name in ("precision", "recall", "f1")] == [1 / 2, 1 / 2, 1 / 2]
    assert found["field_accuracy.a"] == 1 / 2


def test_field_f1_is_refused_where_no_reference_has_fields() -> None:
    with pytest.raises(DataError, match="compares the fields of JSON objects, and every reference is an empty one"):
        compute("field_f1", ["{}", "a"], ["{}", "{}"])


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


@pytest.mark.parametrize("tokenizer", ["intl", "zh", "char", "none"])
def test_bleu_of_another_tokenizer_equals_sacrebleu(tokenizer: Any) -> None:
    from sacrebleu.metrics import BLEU

    answers = ["今天天气非常好，我们去公园。", "他 花了 $3.50 买 一本 书"]
    references = ["今天天气很好，我们去公园。", "他 花了 $3.50 买 两本 书"]
    metric = make_metric(EvaluationMetric.BLEU, {"bleu_tokenizer": tokenizer})
    columns = metric.columns(predictions=answers, references=references)
    assert metric.summary(columns) == {"bleu": BLEU(tokenize=tokenizer).corpus_score(answers, [references]).score}
    alone = BLEU(tokenize=tokenizer, effective_order=True)
    assert metric.row_scores(columns).tolist() == [
        alone.sentence_score(answer, [reference]).score for answer, reference in zip(answers, references, strict=True)
    ]


def test_a_tokenizer_whose_package_is_not_there_is_refused_with_its_name() -> None:
    if importlib.util.find_spec("mecab_ko") is not None:
        pytest.skip("sacrebleu[ko] is installed here")
    with pytest.raises(ConfigError, match=r"bleu_tokenizer: ko-mecab needs .* 'sacrebleu\[ko\]'"):
        make_metric(EvaluationMetric.BLEU, {"bleu_tokenizer": "ko-mecab"})


@pytest.mark.parametrize(
    ("metric", "reference", "reason"),
    [
        (EvaluationMetric.FIELD_F1, "plain text", "it compares the fields of JSON objects"),
        (EvaluationMetric.FIELD_F1, "[1, 2]", "it compares the fields of JSON objects"),
        (EvaluationMetric.VALID_JSON, "Paris", "it asks for JSON objects or arrays"),
        (
            EvaluationMetric.ROUGE,
            "Привет, мир",
            r"its tokenizer keeps only words of a-z and 0-9 \(chrf fits any script\)",
        ),
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


def compute(name: str, predictions: list[str], references: list[str], **settings: object) -> dict[str, float]:
    return make_metric(EvaluationMetric(name), settings).compute(predictions=predictions, references=references)


def test_chrf_equals_sacrebleu_over_the_corpus_and_row_by_row() -> None:
    from sacrebleu.metrics import CHRF

    found = compute("chrf", ANSWERS, REFERENCES)
    assert found == {"chrf": CHRF().corpus_score(ANSWERS, [REFERENCES]).score}
    metric = make_metric(EvaluationMetric.CHRF, {})
    alone = metric.row_scores(metric.columns(predictions=ANSWERS, references=REFERENCES))
    assert alone.tolist() == [CHRF().sentence_score(a, [r]).score for a, r in zip(ANSWERS, REFERENCES, strict=True)]


def test_label_f1_equals_sklearn_over_the_labels_of_the_references() -> None:
    from sklearn.metrics import precision_recall_fscore_support

    references = ["cat", "dog", "cat", "bird", "dog", "cat"]
    predictions = ["cat", "cat ", "dog", "no idea", "dog", "cat"]
    found = compute("label_f1", predictions, references)
    stripped, labels = [text.strip() for text in predictions], ["bird", "cat", "dog"]
    for average in ("macro", "micro"):
        expected = precision_recall_fscore_support(
            references, stripped, labels=labels, average=average, zero_division=0
        )
        names = (f"label_precision_{average}", f"label_recall_{average}", f"label_f1_{average}")
        assert [found[name] for name in names] == pytest.approx(expected[:3], rel=1e-15)
    each = precision_recall_fscore_support(references, stripped, labels=labels, average=None, zero_division=0)[2]
    assert [found[f"label_f1.{label}"] for label in labels] == each.tolist()


def test_label_f1_is_refused_where_references_are_no_labels() -> None:
    with pytest.raises(DataError, match="it counts labels, but 60 of 60 references differ"):
        compute("label_f1", ["x"] * 60, [f"answer {n}" for n in range(60)])


def test_set_f1_equals_sklearn_whatever_the_order_and_the_way_of_listing() -> None:
    from sklearn.metrics import f1_score
    from sklearn.preprocessing import MultiLabelBinarizer

    references = ['["a", "b"]', "x, y, z", "- one\n- two"]
    predictions = ['["b", "c", "b"]', "Z; x", "1. two"]
    sets = [[{"a", "b"}, {"x", "y", "z"}, {"one", "two"}], [{"b", "c"}, {"z", "x"}, {"two"}]]
    found = compute("set_f1", predictions, references)
    binarizer = MultiLabelBinarizer().fit(sets[0] + sets[1])
    truth, said = (binarizer.transform(part) for part in sets)
    assert found["set_f1"] == pytest.approx(f1_score(truth, said, average="micro"), rel=1e-15)
    assert found["set_f1_rows"] == pytest.approx(f1_score(truth, said, average="samples"), rel=1e-15)


def test_an_empty_list_is_answered_by_an_empty_list_alone() -> None:
    # Items given, wanted, shared: 0, 0, 0; 1, 0, 0; 0, 2, 0; 2, 2, 1. Over all: 3, 4, 1, so F1 is 2 * 1 / 7.
    predictions, references = ["[]", '["a"]', "", "a, b"], ["[]", "[]", "a, b", "b, c"]
    found = compute("set_f1", predictions, references)
    assert found == {
        "set_f1": pytest.approx(2 / 7),
        "set_precision": pytest.approx(1 / 3),
        "set_recall": 0.25,
        "set_f1_rows": pytest.approx((1 + 0 + 0 + 0.5) / 4),
    }
    metric = make_metric(EvaluationMetric.SET_F1, {})
    columns = metric.columns(predictions=predictions, references=references)
    assert metric.row_scores(columns).tolist() == [1, 0, 0, 0.5]
    assert metric.summary({name: column[:1] for name, column in columns.items()}) == dict.fromkeys(found, 1)


def test_set_f1_is_refused_where_every_reference_is_empty() -> None:
    with pytest.raises(DataError, match="every reference is an empty one"):
        compute("set_f1", ["[]", "a"], ["[]", "[]"])


def choices(*nll: float, texts: str = "abc") -> list[dict[str, object]]:
    return [{"text": text, "nll": value, "bytes": 1} for text, value in zip(texts, nll, strict=False)]


def test_the_likeliest_choice_counts_and_longer_ones_get_their_bytes() -> None:
    rows = [choices(1.0, 2.0), choices(2.0, 1.0), [{**choices(1.0)[0]}, {"text": "long", "nll": 3.0, "bytes": 4}]]
    found = METRICS[EvaluationMetric.CHOICE_ACCURACY]().compute(choices=rows, references=["a", "a", "long"])
    # Row 3: 1 nat against 3, but 1 per byte against 0.75.
    assert found == {"choice_accuracy": pytest.approx(1 / 3), "choice_accuracy_per_byte": pytest.approx(2 / 3)}


def test_calibration_equals_sklearns_curve() -> None:
    import numpy as np
    from sklearn.calibration import calibration_curve
    from sklearn.metrics import brier_score_loss

    rng = np.random.default_rng(0)
    rows, references, right, confidence = [], [], [], []
    for _ in range(200):
        nll = rng.exponential(2, 3)
        shares = np.exp(-nll) / np.exp(-nll).sum()
        best = int(shares.argmax())
        answer = best if rng.random() < shares[best] * 0.8 else (best + 1) % 3
        rows.append(choices(*nll))
        references.append("abc"[answer])
        right.append(best == answer)
        confidence.append(shares[best])
    found = METRICS[EvaluationMetric.CALIBRATION]().compute(choices=rows, references=references)
    accuracy, mean = calibration_curve(right, confidence, n_bins=10, strategy="uniform")
    counts = np.histogram(confidence, np.linspace(0, 1, 11))[0]
    assert found["ece"] == pytest.approx(float((counts[counts > 0] / 200 * abs(accuracy - mean)).sum()), rel=1e-12)
    assert found["brier"] == pytest.approx(brier_score_loss(right, confidence), rel=1e-12)
    assert found["ece"] > 0.05


def test_a_reference_that_is_no_choice_is_refused() -> None:
    with pytest.raises(DataError, match=r"the reference of row 2, 'z', is none of its choices \(a, b\)"):
        METRICS[EvaluationMetric.CHOICE_ACCURACY]().compute(choices=[choices(1, 2)] * 2, references=["a", "z"])


def test_extraction_compares_what_it_finds_as_numbers() -> None:
    references = ["6 * 12 = 72\n#### 72", "#### 1,000", "#### 5", "#### 7"]
    predictions = ["so 70 + 2\n#### 72.0", "It is\n#### $1000", "the answer is 5", "#### 8\n#### 7"]
    found = compute("exact_match", predictions, references, extraction="gsm8k")
    assert found == {"exact_match": 0.5, "exact_match_found": 0.75}
    assert compute("exact_match", ["It is 4, no, 5."], ["#### 5"], extraction="last_number")["exact_match"] == 1
    assert compute("accuracy", ["Label: Yes!"], ["label: Yes"], extraction=r"(?i)label: (\w+)")["accuracy"] == 1
    boxed = compute("exact_match", [r"\boxed{1} or \boxed{\frac{1}{2}}"], [r"\boxed{\frac{1}{2}}"], extraction="boxed")
    assert boxed["exact_match"] == 1


def test_an_extraction_that_a_reference_does_not_have_is_refused() -> None:
    with pytest.raises(DataError, match="the extraction gsm8k needs an answer in every reference, but the"):
        compute("exact_match", ["x"], ["seventy-two"], extraction="gsm8k")


def test_length_and_repetition_by_hand() -> None:
    found = compute("length", ["one two three", "a"], ["one two", "a b c d"])
    # |3 - 2| / 2 and |1 - 4| / 4.
    assert found["length_error"] == pytest.approx((0.5 + 0.75) / 2)
    assert found["length_words"] == 2
    assert found["length_ratio"] == pytest.approx(4 / 6)
    repeated = make_metric(EvaluationMetric.REPETITION, {}).compute(predictions=["a b c d a b c d", "short"])
    # abcd bcda cdab dabc abcd: one of five stood there before.
    assert repeated == {"repetition": pytest.approx(0.2 / 2)}


def test_a_schema_accepts_or_refuses_answers_as_jsonschema_does() -> None:
    import jsonschema

    schema = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}
    answers = [{"n": 1}, {"n": "1"}, {}, {"n": 2, "more": 0}]
    metric = make_metric(EvaluationMetric.JSON_SCHEMA, {"json_schema": schema})
    expected = [jsonschema.Draft202012Validator(schema).is_valid(answer) for answer in answers]
    found = metric.compute(predictions=[*map(json.dumps, answers), "no JSON"])
    assert found == {"json_schema": pytest.approx(sum(expected) / 5)}
    with pytest.raises(DataError, match="its schema accepts no such reference"):
        metric.check(['{"n": 1}', '{"n": null}'])
    with pytest.raises(ConfigError, match="is not a JSON schema"):
        make_metric(EvaluationMetric.JSON_SCHEMA, {"json_schema": {"type": 5}})


def test_functions_of_the_user_score_answers() -> None:
    functions = {"same": "operator:eq", "starts": "fnmatch:fnmatch"}
    found = compute("custom", ["abc", "x"], ["a*", "x"], custom_functions=functions)
    assert found == {"custom": 0.5, "custom.same": 0.5, "custom.starts": 1.0}


@pytest.mark.parametrize(
    ("function", "message"),
    [("nowhere:f", "cannot be imported"), ("math:pi", "is not a function"), ("operator:nothing", "cannot be imported")],
)
def test_a_function_that_is_none_is_refused(function: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_metric(EvaluationMetric.CUSTOM, {"custom_functions": {"f": function}})


def test_a_function_that_fails_is_told_with_the_answer() -> None:
    with pytest.raises(DataError, match="custom: f raised TypeError"):
        compute("custom", ["abc"], ["a"], custom_functions={"f": "operator:truediv"})


def test_a_label_that_some_rows_do_not_have_is_not_counted_among_them() -> None:
    import numpy as np

    metric = make_metric(EvaluationMetric.LABEL_F1, {})
    labels = [f"l{n % 10}" for n in range(20)]
    columns = metric.columns(predictions=labels, references=labels)
    assert interval(metric.headline, columns, best=1.0).low == pytest.approx(0.8316, abs=1e-4)  # as of 20 right rows
    half = {name: column[::2].sum() for name, column in columns.items()}  # the even rows have 5 of the 10 labels
    found = metric.values({name: np.asarray(total) for name, total in half.items()})
    names = ("label_f1_macro", "label_precision_macro", "label_recall_macro")
    assert [float(found[name]) for name in names] == [1.0, 1.0, 1.0]


def test_of_very_many_fields_the_most_frequent_are_looked_at_and_the_others_counted() -> None:
    references = [json.dumps({"name": n, f"own {n}": n, f"other {n}": n}) for n in range(60)]
    metric = make_metric(EvaluationMetric.FIELD_F1, {})
    columns = metric.columns(predictions=references, references=references)
    assert len(columns) == 4 + 3 * MOST_FIELDS + 1
    found = metric.summary(columns)
    assert (found["field_f1"], found["field_accuracy.name"], found["field_f1_macro"]) == (1.0, 1.0, 1.0)
    assert found["field_others"] == 121 - MOST_FIELDS
    few = metric.summary(metric.columns(predictions=references[:9], references=references[:9]))
    assert "field_others" not in few
    assert len(few) == 4 + 19


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (".5", ".5"),
        ("It is .75.", ".75"),
        ("x = -.5", "-.5"),
        ("1e-3", "1e-3"),
        ("about 2.5E+10", "2.5E+10"),
        ("3 eggs", "3"),
        ("2020-12", "12"),
        ("10 - 12", "12"),
        ("it fell to -12", "-12"),
        ("so $-5? no, -$5", "-$5"),
        ("version 1.2.3", "3"),
        ("well...5", "5"),
        ("1,000.50", "1,000.50"),
    ],
)
def test_the_last_number_is_read_whole_and_with_its_own_sign(text: str, number: str) -> None:
    assert extracted(text, "last_number") == number


def test_json_that_is_nested_beyond_all_reason_is_no_json() -> None:
    deep = "[" * 600 + "]" * 600
    assert compute("exact_match", [deep], [deep]) == {"exact_match": 1.0}  # as text
    assert compute("exact_match", [deep], ["[1]"]) == {"exact_match": 0.0}
    assert compute("valid_json", [deep, "[" * 90 + "]" * 90], ["[]", "[]"]) == {"valid_json": 0.5}


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"$ref": "#/definitions/missing"}, "a .ref leads nowhere: .*definitions/missing"),
        ({"properties": {"a": {"$ref": "#/definitions/missing"}}}, "a .ref leads nowhere"),
        ({"$ref": "#"}, "refers to itself without an end"),
    ],
)
def test_a_schema_whose_references_lead_nowhere_is_refused(schema: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_metric(EvaluationMetric.JSON_SCHEMA, {"json_schema": schema})


def test_a_schema_may_refer_to_itself_and_hold_what_only_looks_like_a_reference() -> None:
    node = {"properties": {"next": {"$ref": "#"}, "$ref": {"const": {"$ref": "#/nowhere"}}}}
    metric = make_metric(EvaluationMetric.JSON_SCHEMA, {"json_schema": {"type": "object", **node}})
    assert metric.compute(predictions=['{"next": {}}', '{"next": 1}']) == {"json_schema": 0.5}


def test_a_module_that_cannot_be_run_is_told_with_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_syntax.py").write_text("def f(a, b) return 1\n")
    (tmp_path / "broken_name.py").write_text("x = undefined_thing\n")
    for module, words in (
        ("broken_syntax", "SyntaxError: expected ':'"),
        ("broken_name", "NameError: name 'undefined"),
    ):
        with pytest.raises(ConfigError, match=f"custom_functions.f: '{module}:f' cannot be imported .{words}"):
            make_metric(EvaluationMetric.CUSTOM, {"custom_functions": {"f": f"{module}:f"}})

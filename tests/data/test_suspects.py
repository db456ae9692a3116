from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from raytune_ft.core.errors import DataError
from raytune_ft.core.records import Message, Record, records_to_table
from raytune_ft.data.corrections import Correction, applied_ids, correct, read_corrections, refuse_unknown
from raytune_ft.data.labels import label_values, targets
from raytune_ft.data.suspects import (
    Suspect,
    _out_of_fold,
    costly_answers,
    flag_rows,
    loss_histogram,
    loss_limit,
    to_correct,
    unlikely_labels,
    worst,
)

GOOD = ["lovely", "great", "wonderful", "superb", "charming", "delightful", "brilliant", "pleasant"]
BAD = ["awful", "dreadful", "boring", "terrible", "poor", "dull", "horrible", "weak"]


def reviews(count: int = 200, wrong: tuple[int, ...] = (7, 60, 121)) -> tuple[list[str], list[str]]:
    rng = random.Random(1)
    texts, labels = [], []
    for number in range(count):
        words = rng.sample(GOOD if number % 2 else BAD, 3)
        texts.append(f"The film number {number} was {words[0]}, {words[1]} and {words[2]}.")
        labels.append("good" if (number % 2 == 1) != (number in wrong) else "bad")
    return texts, labels


def row(asked: str, answer: str, **fields: object) -> Record:
    return Record(messages=(Message("user", asked), Message("assistant", answer)), **fields)  # type: ignore[arg-type]


def test_planted_wrong_labels_are_found_and_no_others() -> None:
    texts, labels = reviews()
    ids = [str(number) for number in range(len(texts))]
    found, judged = unlikely_labels(texts, [{"answer": label} for label in labels], ids, below=0.3, seed=0)
    assert judged == 200
    assert {suspect.id for suspect in found} == {"7", "60", "121"}
    assert found[0].why.startswith("answer is 'bad' (probability 0.") and "expected 'good'" in found[0].why


def test_labels_that_cannot_be_learnt_are_not_judged() -> None:
    texts, labels = reviews()
    random.Random(0).shuffle(labels)
    assert unlikely_labels(texts, [{"a": v} for v in labels], texts, below=0.3, seed=0) == ([], 0)


def test_prompts_without_a_word_are_not_judged() -> None:
    texts = ["👍" * (n % 5 + 1) if n else "word" for n in range(100)]
    assert unlikely_labels(texts, [{"a": "xy"[n % 2]} for n in range(100)], texts, below=0.3, seed=0) == ([], 0)


def test_right_labels_are_not_suspected() -> None:
    texts, labels = reviews(wrong=())
    found, judged = unlikely_labels(texts, [{"a": v} for v in labels], texts, below=0.3, seed=0)
    assert (found, judged) == ([], 200)


def test_probabilities_come_from_a_classifier_that_has_not_seen_the_row() -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold

    texts, labels = reviews(60)
    own = np.array([label == "good" for label in labels]).astype(int)
    chance = _out_of_fold(texts, own, 3)
    train, held = next(iter(StratifiedKFold(5, shuffle=True, random_state=3).split(texts, own)))
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
    fitted = LogisticRegression(C=10.0, max_iter=200).fit(words.fit_transform([texts[n] for n in train]), own[train])
    np.testing.assert_allclose(chance[held], fitted.predict_proba(words.transform([texts[n] for n in held])), atol=1e-6)


def test_labels_are_short_answers_json_fields_and_given_labels_of_few_values() -> None:
    assert label_values(row("q", "yes", label=True)) == {"label": "true", "answer": "yes"}
    assert label_values(row("q", '{"a": "x", "n": 3, "l": [1]}')) == {"answer.a": "x", "answer.n": "3"}
    assert label_values(row("q", "a long answer that goes on and on and on and on and on")) == {}
    labels = [{"few": str(n % 3), "many": str(n), "one": "x"} for n in range(60)]
    labels[0]["few"] = "rare"
    assert targets(labels) == {"few": list(range(1, 60))}


def test_the_limit_of_losses_is_robust_deviations_above_the_median() -> None:
    losses = [0.905, 1.005, 1.105] * 5 + [9.0]
    histogram = loss_histogram([*losses, float("inf")])
    # Sorted: 5 x 0.905, 5 x 1.005, 5 x 1.105, 9: the eighth of 16 is 1.005; half lie within 0.1 of it.
    assert loss_limit(histogram, 4.0) == pytest.approx(1.005 + 4 * 1.4826 * 0.10, abs=1e-9)
    found = costly_answers([str(n) for n in range(17)], [*losses, None], histogram, 4.0)
    assert [suspect.id for suspect in found] == ["15"]
    assert found[0].why == "loss 9.00 nats per token, the median is 1.01"


def test_the_worst_are_kept_and_say_all_that_speaks_against_them() -> None:
    given = [Suspect("a", "x is wrong", 0.2), Suspect("b", "x is wrong", 0.9), Suspect("a", "loss 9", 7.0)]
    assert list(worst(given, 5)) == ["a", "b"]
    assert [suspect.why for suspect in worst(given, 5)["a"]] == ["loss 9", "x is wrong"]
    assert list(worst(given, 1)) == ["a"]


def test_flags_go_to_metadata_and_rows_to_a_file_that_comes_back_as_corrections(tmp_path: Path) -> None:
    rows = [row("2 + 2?", "5", metadata={"k": 1}), row("1 + 1?", "2"), row("Who?", "Me")]
    wrong, right, unsure = (record.id for record in rows)
    why = {wrong: "expected '4'", right: "odd", unsure: "odd"}
    table = records_to_table(rows)
    flagged = flag_rows(table, {wrong: "expected '4'"})
    assert json.loads(flagged.column("metadata")[0].as_py()) == {"k": 1, "suspect_label": "expected '4'"}
    assert flagged.drop_columns(["metadata"]).equals(table.drop_columns(["metadata"]))
    lines = [json.loads(line) for line in to_correct(flagged, why).column("line").to_pylist()]
    assert lines[0] == {"id": wrong, "prompt": "2 + 2?", "answer": "5", "why": "expected '4'", "corrected": ""}
    lines[0]["corrected"], lines[1]["corrected"] = "4", "2"
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    corrections = read_corrections(str(path))
    assert set(corrections) == {wrong, right}  # nobody decided on the third
    mended = [correct(record, corrections) for record in rows]
    assert [(record.answer, done) for record, done in mended] == [
        ("4", "correction"),
        ("2", "confirmation"),
        ("Me", None),
    ]
    assert mended[0][0].metadata == {"k": 1, "corrected_from": wrong, "label_confirmed": True}
    assert mended[1][0].id == right
    applied = applied_ids(records_to_table([record for record, _ in mended])).column("id").to_pylist()
    assert applied == sorted([wrong, right])
    refuse_unknown(corrections, applied)


def test_a_reference_goes_with_the_answer_that_it_was_taken_from() -> None:
    for reference, answer, corrected, wanted in [
        ("5", "2+2\n#### 5", "2+2\n#### 4", "4"),
        ("5", "5", "4", "4"),
        ("gold", "5", "4", "gold"),
    ]:
        record = row("q", answer, reference=reference)
        mended, _ = correct(record, {record.id: Correction(corrected, answer, "f:1")})
        assert (mended.answer, mended.reference) == (corrected, wanted)
    unanswered = Record(messages=(Message("user", "q"),), reference="5")
    mended, _ = correct(unanswered, {unanswered.id: Correction("4", "5", "f:1")})
    assert (mended.reference, mended.messages) == ("4", unanswered.messages)


def test_corrections_that_no_longer_fit_are_refused(tmp_path: Path) -> None:
    record = row("q", "5")
    with pytest.raises(
        DataError, match=r"f:1: row .* answers '5', the line says '4': write the right answer into corr"
    ):
        correct(record, {record.id: Correction("6", "4", "f:1")})
    text = Record(text="raw")
    with pytest.raises(DataError, match="has no answer that could be corrected"):
        correct(text, {text.id: Correction("6", None, "f:1")})
    masked = row("q", "5", metadata={"supervised_spans": [[0, 1]]})
    with pytest.raises(DataError, match="which another answer would shift"):
        correct(masked, {masked.id: Correction("6", "5", "f:1")})
    with pytest.raises(DataError, match=r"1 of 1 row is in no source: 00 \(f:1\)"):
        refuse_unknown({"00": Correction("6", None, "f:1")}, ["11"])
    for content, message in [
        ("{", r"mine.jsonl:1: malformed JSON"),
        ('{"id": "a", "corrected": "x", "id": "b"}', "mine.jsonl:1: repeated key: 'id'"),
        ('{"id": 3, "corrected": "x"}', "needs the fields id and corrected"),
        ('{"id": "a", "corrected": 3}', r"corrected must be text, the whole answer \(got 3\)"),
        ('{"id": "a", "corrected": "x"}\n{"id": "a", "corrected": "y"}', "mine.jsonl:2: row a is corrected otherwise"),
    ]:
        (tmp_path / "mine.jsonl").write_text(content)
        with pytest.raises(DataError, match=message):
            read_corrections(str(tmp_path / "mine.jsonl"))
    with pytest.raises(DataError, match="there is no such file"):
        read_corrections(str(tmp_path / "none.jsonl"))


def test_half_a_character_in_a_correction_is_replaced_as_in_a_source(tmp_path: Path) -> None:
    record = row("q", "5")
    (tmp_path / "mine.jsonl").write_text(json.dumps({"id": record.id, "corrected": "4\ud83d"}))
    mended, _ = correct(record, read_corrections(str(tmp_path / "mine.jsonl")))
    assert records_to_table([mended]).column("messages")[0][1]["content"].as_py() == "4?"


def test_a_correction_may_hold_any_kind_of_line_end_inside_its_text(tmp_path: Path) -> None:
    line = json.dumps({"id": "a", "answer": "x\u2028y", "corrected": "x\u2028z\x85"}, ensure_ascii=False)
    (tmp_path / "mine.jsonl").write_text(f"{line}\r\n{line}\n")
    (found,) = read_corrections(str(tmp_path / "mine.jsonl")).values()
    assert (found.answer, found.corrected, found.where) == (
        "x\u2028y",
        "x\u2028z\x85",
        f"{tmp_path}/mine.jsonl:1",
    )

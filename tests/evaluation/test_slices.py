from __future__ import annotations

from dataclasses import replace

import pytest

from raytune_ft.core.errors import DataError
from raytune_ft.evaluation.config import EvaluationMetric
from raytune_ft.evaluation.metrics import make_metric
from raytune_ft.evaluation.results import Answer, ModelScores
from raytune_ft.evaluation.slices import groups, slice_fields, sliced

METRICS = {EvaluationMetric.EXACT_MATCH: make_metric(EvaluationMetric.EXACT_MATCH, {})}


def answers(right: list[bool], metadata: list[dict[str, object]] | None = None) -> tuple[Answer, ...]:
    return tuple(
        Answer(str(n), "x" * (n + 1), "yes", "yes" if good else "no", metadata=(metadata or [{}] * len(right))[n])
        for n, good in enumerate(right)
    )


def test_rows_are_grouped_by_each_value_of_a_field_and_the_missing_ones_apart() -> None:
    rows = answers([True] * 5, [{"lang": "de"}, {"lang": "fr"}, {"lang": "de"}, {}, {"lang": None}])
    found = {group.name: list(group.places) for group in groups(rows)}
    assert found == {"de": [0, 2], "fr": [1], "(missing)": [3, 4]}


def test_lengths_are_cut_into_thirds() -> None:
    found = {
        group.name: list(group.places) for group in groups(answers([True] * 12)) if group.by == "prompt characters"
    }
    assert found == {
        "up to 4": [0, 1, 2, 3],
        "above 4 to 8": [4, 5, 6, 7],
        "above 8": [8, 9, 10, 11],
    }
    assert not [group for group in groups(answers([True] * 12)) if group.by == "reference characters"]  # all alike
    assert groups(answers([True] * 11)) == []  # too few rows


def test_numbers_with_many_values_are_cut_into_thirds_and_texts_with_many_left() -> None:
    rows = [{"score": n / 10, "name": f"n{n}", "tags": [n % 2]} for n in range(9)]
    assert {group.by for group in groups(answers([True] * 9, rows))} == {"score"}
    assert [group.name for group in groups(answers([True] * 9, rows))] == [
        "up to 0.2",
        "above 0.2 to 0.5",
        "above 0.5",
    ]


def test_a_field_that_was_asked_for_and_cannot_be_sliced_by_is_refused() -> None:
    rows = [{"name": f"n{n}", "lang": "de"} for n in range(9)]
    with pytest.raises(DataError, match=r"no row has a metadata field 'langs' \(fields: name, lang\)"):
        slice_fields(rows, ["langs"])
    for name in ("name", "lang"):
        with pytest.raises(DataError, match=f"'{name}' cannot be sliced by"):
            slice_fields(rows, [name])
    assert slice_fields(rows) == {}


def test_values_and_comparisons_of_a_slice_are_those_of_its_rows_alone() -> None:
    metadata = [{"lang": "de" if n < 10 else "fr"} for n in range(20)]
    base = ModelScores("base", "b", "0", {}, {}, answers([False] * 20, metadata))
    tuned = ModelScores("tuned", "t", "1", {}, {}, answers([True] * 10 + [False] * 10, metadata))
    found = {part.name: part for part in sliced([base, tuned], METRICS, seed=0, fields=["lang"]) if part.by == "lang"}
    assert {name: part.values["tuned"]["exact_match"] for name, part in found.items()} == {"de": 1.0, "fr": 0.0}
    german, french = (found[name].comparisons[0] for name in ("de", "fr"))
    assert (german.verdict, german.wins, german.rows) == ("better", 10, 10)
    assert french.verdict == "cannot tell"
    # Two slices by language and three by length are one family: 2 / 2^10 times 5.
    assert german.tests == 5
    assert german.p_adjusted == pytest.approx(5 * 2 / 2**10)


def test_one_model_has_slices_without_comparisons() -> None:
    alone = replace(ModelScores("model", "b", "0", {}, {}), answers=answers([True, False] * 10))
    assert all(part.comparisons == () for part in sliced([alone], METRICS, seed=0))

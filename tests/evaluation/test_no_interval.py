"""A comparison without an interval, as its report shows it and as it is read back."""

from __future__ import annotations

import json
import math
from typing import Any

from raytune_ft.evaluation import plots
from raytune_ft.evaluation.markdown import render_markdown
from raytune_ft.evaluation.report import render_html
from raytune_ft.evaluation.results import read_result, to_json
from raytune_ft.evaluation.tables import value_table


def test_an_interval_that_is_not_there_is_null_and_said_to_be_none(make_result: Any, make_report: Any) -> None:
    said = {"base": ["aaa"], "tuned": ["a"]}
    found = make_result(said, metrics=["perplexity", "exact_match"])
    perplexity, matches = json.loads(json.dumps(to_json(found), allow_nan=False))["comparisons"]
    assert (perplexity["low"], perplexity["high"]) == (None, None)
    assert (matches["low"], matches["high"]) == (-0.975, 0.975)  # of one row: 1 - 0.025
    assert found.comparisons[0].words.startswith("Perplexity: cannot tell tuned from base with 1 row")
    for text in (render_markdown(found), render_html(found)):
        assert "no 95% interval" in text
        assert "+nan" not in text
    assert "| none |" in render_markdown(found)
    assert all(plot.png() for plot in plots.draw(found).values())
    again = read_result(make_report("one", said, metrics=["perplexity", "exact_match"]).location)
    assert math.isnan(again.comparisons[0].low)
    assert again.comparisons[1] == found.comparisons[1]


def test_a_value_of_one_row_has_no_interval_on_an_open_scale(make_result: Any) -> None:
    found = make_result({"m": ["aaa"]}, metrics=["perplexity", "exact_match"])
    low, high = found.model.intervals["perplexity"]
    assert math.isnan(low) and math.isnan(high)
    assert found.model.intervals["exact_match"] == (0, 0.975)
    perplexity, _, matches = value_table(found)
    assert (perplexity["cells"][0]["interval"], matches["cells"][0]["interval"]) == ("", "[0.000, 0.975]")
    assert "nan" not in render_markdown(found)


def test_of_values_beyond_numbers_no_number_of_rows_is_promised(make_result: Any) -> None:
    for said in ("x" * 9000, "x"):  # as many nats a row: e to the 3000 is beyond numbers
        found = make_result({"base": ["x" * 9000] * 3, "tuned": [said] * 3}, metrics=["perplexity"]).comparisons[0]
        assert not math.isfinite(found.difference)
        assert found.rows_to_tell is None
        assert found.words.endswith("A value is beyond numbers, so no number of rows would tell.")

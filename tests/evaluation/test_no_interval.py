"""A comparison without an interval, as its report shows it and as it is read back."""

from __future__ import annotations

import json
import math
from typing import Any

from raytune_ft.evaluation import plots
from raytune_ft.evaluation.markdown import render_markdown
from raytune_ft.evaluation.report import render_html
from raytune_ft.evaluation.results import read_result, to_json


def test_an_interval_that_is_not_there_is_null_and_said_to_be_none(make_result: Any, make_report: Any) -> None:
    said = {"base": ["aaa"], "tuned": ["a"]}
    found = make_result(said, metrics=["perplexity", "exact_match"])
    perplexity, matches = json.loads(json.dumps(to_json(found), allow_nan=False))["comparisons"]
    assert (perplexity["low"], perplexity["high"]) == (None, None)
    assert (matches["low"], matches["high"]) == (-0.975, 0.975)  # of one row: 1 - 0.025
    assert found.comparisons[0].words.startswith("Perplexity: cannot tell tuned from base with 1 rows")
    for text in (render_markdown(found), render_html(found)):
        assert "no 95% interval" in text
        assert "+nan" not in text
    assert "| none |" in render_markdown(found)
    assert all(plot.png() for plot in plots.draw(found).values())
    again = read_result(make_report("one", said, metrics=["perplexity", "exact_match"]).location)
    assert math.isnan(again.comparisons[0].low)
    assert again.comparisons[1] == found.comparisons[1]

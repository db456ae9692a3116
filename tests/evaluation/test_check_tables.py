"""What was looked at beside the metrics stands in the page and in Markdown, and hostile text stays text there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from raytune_ft.evaluation.check_tables import check_tables
from raytune_ft.evaluation.markdown import render_markdown
from raytune_ft.evaluation.report import render_html
from raytune_ft.evaluation.results import to_json

SURFACE = {
    "prompts": 9, "words_low": 1.0, "words_median": 2.0, "words_high": 3.0, "with_question_mark": 0.5,
    "with_digits": 0.0, "with_several_lines": 0.0, "beyond_ascii": 0.1,
}  # fmt: skip
ABILITIES = {"answered": 0.5, "chosen": None, "perplexity": 12.345, "bits_per_byte": 0.9, "questions": 4, "passages": 2}
CHECKS: dict[str, Any] = {
    "leakage": {"base": {"known": False}, "tuned": {"known": True, "rows": 2, "datasets": ["runs/data"]}},
    "production": {"test": SURFACE, "production": SURFACE, "farthest": ["<script>alert(1)</script> | x"]},
    "forgetting": {"base": "base", "models": {"base": ABILITIES, "tuned": {**ABILITIES, "perplexity": None}}},
    "harness": {"models": {"base": {"arc": {"acc,none": 0.25}}, "tuned": {"arc": {}}}},
}


def test_checks_become_tables(make_result: Any) -> None:
    result = replace(
        make_result({"base": ["a"] * 3, "tuned": ["b"] * 3}), checks=CHECKS, notes=("Leak: <b>2</b> rows",)
    )
    tables = {table.title: table.rows for table in check_tables(result)}
    assert list(tables) == ["Leaks", "Test set and production", "General abilities", "lm-eval"]
    assert tables["Leaks"][1] == ("tuned", "2", "runs/data")
    assert tables["General abilities"] == (
        ("general questions answered", "50%", "50%"),
        ("perplexity of general text", "12.35", ""),
        ("bits per byte of general text", "0.900", "0.900"),
    )
    assert tables["lm-eval"] == (("arc: acc,none", "0.25", ""),)
    page, markdown = render_html(result), render_markdown(result)
    for text in (page, markdown):
        assert "Before believing the numbers" in text
        assert "General abilities" in text
        assert "<script>alert" not in text
        assert "<b>2</b>" not in text
    assert to_json(result)["checks"] == CHECKS
    assert to_json(result)["notes"] == ["Leak: <b>2</b> rows"]

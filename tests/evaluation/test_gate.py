from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from raytune_ft.cli import app
from raytune_ft.core.errors import ConfigError, DataError
from raytune_ft.evaluation.check_tables import check_tables
from raytune_ft.evaluation.gate import rows_to_see
from raytune_ft.evaluation.joining import joined
from raytune_ft.evaluation.markdown import render_markdown


def said(right: int, rows: int = 40) -> dict[str, list[str]]:
    return {"model": [f"answer {n}" if n < right else "?" for n in range(rows)]}


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_better_answers_beat_worse_ones_and_equal_ones_do_not(make_result: Any) -> None:
    good, bad = make_result(said(30)), make_result(said(20))
    found = good.beats(bad)
    assert found
    assert (found.gain, found.rows) == (pytest.approx(0.25), 40)
    assert 0 < found.least_gain < 0.25
    assert found.words.startswith("passed: Exact match: report 1 is better than report 2 (0.75 against 0.5 on 40 rows")
    assert not good.beats(good)
    assert not bad.beats(good)


def test_four_rows_more_are_not_enough_to_be_sure(make_result: Any) -> None:
    # One-sided sign test: 1 / 2^4 = 0.0625 is above 5%, 1 / 2^5 = 0.031 below.
    assert not make_result(said(24)).beats(make_result(said(20)))
    assert make_result(said(25)).beats(make_result(said(20)))
    assert make_result(said(24)).beats(make_result(said(20)), confidence=0.9)


def test_a_drop_within_the_allowed_one_passes_and_a_larger_one_fails(make_result: Any) -> None:
    good, close, bad = (make_result(said(right, rows=400)) for right in (380, 378, 340))
    assert close.beats(good, max_drop=0.05)
    found = bad.beats(good, max_drop=0.05)
    assert not found
    assert "not shown that report 1 is at most 0.05 worse than report 2" in found.words


def test_few_rows_without_a_difference_show_nothing_about_a_small_drop(make_result: Any) -> None:
    # 0.95^58 = 0.051, 0.95^59 = 0.0485: 59 rows see a drop of 5% at least once, at 95%.
    assert rows_to_see(0.05, 1.0, 0.95) == 59
    assert rows_to_see(5.0, 100.0, 0.95) == 59
    few, many = make_result(said(20, rows=58)), make_result(said(20, rows=59))
    assert "58 rows are too few to see a drop of 0.05; it takes 59" in few.beats(few, max_drop=0.05).words
    assert many.beats(many, max_drop=0.05)


def test_one_row_opens_no_gate_and_as_many_as_a_sign_test_takes_do(make_result: Any) -> None:
    for rows in (1, 4, 5):
        won, lost = make_result(said(rows, rows=rows)), make_result(said(0, rows=rows))
        for drop in (0.0, 0.05):
            found = won.beats(lost, max_drop=drop)
            assert bool(found) is (rows == 5), found.words  # 1 / 2^5 = 0.031
            assert found.least_gain == pytest.approx(2 * 0.05 ** (1 / rows) - 1)  # 1 - 2u, (1 - u)^rows = 0.05
    words = make_result(said(1, rows=1)).beats(make_result(said(0, rows=1)), max_drop=0.05).words
    assert words.endswith("on 1 row; with 95% confidence the gain is at least -0.900, that is not above -0.050).")


def test_on_an_open_scale_equal_rows_open_a_gate_with_a_drop_if_there_are_five(make_result: Any) -> None:
    for rows in (1, 4, 5):
        same = make_result({"model": ["a"] * rows}, metrics=["perplexity"])
        found = same.beats(same, "perplexity", max_drop=0.1)
        assert (bool(found), found.least_gain) == (rows == 5, 0.0), found.words
        assert not same.beats(same, "perplexity")


def test_where_lower_is_better_the_gain_is_how_much_lower(make_result: Any) -> None:
    short = make_result({"model": ["a"] * 20}, metrics=["perplexity"])
    long = make_result({"model": ["a" * (3 + n % 2) for n in range(20)]}, metrics=["perplexity"])
    found = short.beats(long, "perplexity")
    # nll 1 and (on average) 3.5 over 3 tokens: exp(3.5 / 3) - exp(1 / 3).
    assert found
    assert found.gain == pytest.approx(np.exp(3.5 / 3) - np.exp(1 / 3))
    assert not long.beats(short)


def test_rows_are_matched_by_id_in_any_order(make_result: Any) -> None:
    forth = make_result({"model": ["answer 0", "?", "?"]}, ids=["row0", "row1", "row2"])
    back = make_result({"model": ["?", "?", "answer 0"]}, ids=["row2", "row1", "row0"])
    found = forth.beats(back, max_drop=0.7, confidence=0.5)
    assert found  # the rows show no difference at all; 0.5^(1/3) of all, at least, are like them
    assert found.least_gain == pytest.approx(0.5 ** (1 / 3) - 1)


def test_other_rows_other_metrics_and_senseless_terms_are_refused(make_result: Any) -> None:
    one = make_result(said(3, rows=4))
    with pytest.raises(DataError, match=r"not measured on the same rows: of 4 rows of report 1, 1 are not among the 3"):
        one.beats(make_result(said(3, rows=3)))
    with pytest.raises(DataError, match="perplexity: was not measured of report 1"):
        one.beats(one.__class__(**vars(one)), "perplexity")
    with pytest.raises(ConfigError, match="there is no metric 'rogue'"):
        one.beats(one, "rogue")
    for terms, words in (({"max_drop": -0.1}, "max_drop: must be 0 or more"), ({"confidence": 1.0}, "confidence: ")):
        with pytest.raises(ConfigError, match=words):
            one.beats(one, **terms)


def test_the_command_opens_the_gate_or_exits_with_1(make_report: Any) -> None:
    good, close, bad = (
        str(make_report(name, said(right, rows=100)).location) for name, right in (("a", 70), ("b", 69), ("c", 40))
    )
    passed = invoke("compare", good, bad, "--gate")
    assert passed.exit_code == 0
    assert passed.stdout.startswith("passed: Exact match: a is better than c")
    failed = invoke("compare", bad, good, "--gate", "--metric", "exact_match")
    assert failed.exit_code == 1
    assert failed.stdout.startswith("failed: Exact match: not shown that c is better than a")
    assert invoke("compare", good, bad, close, "--gate").exit_code == 1
    assert invoke("compare", good, bad, close, "--gate", "--max-drop", "0.05").exit_code == 0
    assert invoke("compare", close, good, "--gate", "--max-drop", "0.05", "--confidence", "0.999").exit_code == 1


def test_the_commands_mistakes_are_messages(make_report: Any, tmp_path: Path) -> None:
    one, other = (str(make_report(name, said(3, rows=rows)).location) for name, rows in (("a", 3), ("b", 4)))
    for arguments, words in (
        ([one, other, "--gate"], "were not measured on the same rows"),
        ([one], "compare takes a settings file, or at least two reports"),
        ([one, one, "--gate"], "is named twice"),
        ([one, str(tmp_path / "none")], "there is no such folder"),
        ([one, other, "--metric", "f1"], "belong to --gate"),
    ):
        found = invoke("compare", *arguments)
        assert (found.exit_code, words in found.stderr) == (2, True), found.stderr


def test_reports_are_joined_into_one_with_their_base(make_report: Any, tmp_path: Path) -> None:
    base = [f"answer {n}" if n < 4 else "?" for n in range(30)]
    first = make_report("first", {"base": base, "tuned": [f"answer {n}" for n in range(30)]})
    second = make_report("second", {"base": base, "tuned": ["?"] * 30}, ids=[f"row{n}" for n in range(30)])
    paths = [str(report.location) for report in (first, second)]
    made = invoke("compare", *paths, "--output-dir", tmp_path / "joined")
    assert made.exit_code == 0, made.stderr
    assert "Exact match: first is better than base on 30 rows" in made.stdout
    assert "Exact match: second is worse than first on 30 rows" in made.stdout
    content = json.loads((tmp_path / "joined/results.json").read_text())
    assert [model["label"] for model in content["models"]] == ["base", "first", "second"]
    assert content["kind"] == "comparison"
    assert (tmp_path / "joined/report.html").exists()


def test_a_model_that_diverged_passes_no_gate(make_result: Any) -> None:
    good = make_result({"model": ["a" * (3 + n % 2) for n in range(20)]}, metrics=["perplexity"])
    bad = make_result({"model": ["a" * (3000 + n % 2) for n in range(20)]}, metrics=["perplexity"])
    assert bad.values["perplexity"] == np.inf
    for terms in ({}, {"max_drop": 0.5}):
        found = bad.beats(good, **terms)
        assert not found
        assert "which is no number to go by" in found.words
    assert not bad.beats(bad, max_drop=1)


def test_joined_reports_keep_their_notes_and_checks(make_result: Any) -> None:
    leaks = {"leakage": {"model": {"known": True, "rows": 2, "datasets": ["d"]}}}
    first, second = (
        replace(make_result(said(9, rows=10)), where=f"runs/{name}", notes=notes, checks=leaks)
        for name, notes in (("new", ("Leak: 2 rows",)), ("old", ()))
    )
    found = joined([first, second])
    assert found.notes == ("new: Leak: 2 rows",)
    assert found.checks == {"new: leakage": leaks["leakage"], "old: leakage": leaks["leakage"]}
    assert [table.title for table in check_tables(found)] == ["Leaks: new", "Leaks: old"]
    assert "new: Leak: 2 rows" in render_markdown(found)

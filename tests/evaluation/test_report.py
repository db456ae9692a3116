from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from raytune_ft.core.draft import begin
from raytune_ft.core.errors import ArtifactError, ConfigError
from raytune_ft.core.manifest import ArtifactKind
from raytune_ft.evaluation import plots
from raytune_ft.evaluation.config import ComparisonConfig, EvaluationConfig, EvaluationMetric
from raytune_ft.evaluation.markdown import cell, render_markdown
from raytune_ft.evaluation.measurement import compared, measured
from raytune_ft.evaluation.metrics import METRICS, make_metric
from raytune_ft.evaluation.report import generate_evaluation_report, render_html, write_report
from raytune_ft.evaluation.results import (
    Answer,
    ComparisonResult,
    EvaluationResult,
    ModelScores,
    read_result,
    to_json,
    write_answers,
)
from raytune_ft.evaluation.slices import sliced
from raytune_ft.evaluation.tables import number_text, value_table

HOSTILE = "<script>alert('owned')</script></pre><img src=x onerror=alert(1)>\n```\n# not a heading"
REFERENCE = '{"name": "Ada", "n": 2}'


def result(*, rows: int = 8, label: str = "tuned") -> EvaluationResult:
    config = EvaluationConfig(
        model_path="runs/tuned",
        base_model_path="base",
        dataset_path="d",
        metrics=["exact_match", "field_f1", "perplexity"],
    )
    metrics = {name: METRICS[name]() for name in config.metrics}
    models = []
    for name, said, nll in (("base", HOSTILE, 6.0), (label, REFERENCE, 0.6)):
        answers = tuple(
            Answer(
                str(n),
                f"order {n} <b>now</b>",
                REFERENCE,
                said,
                "length" if n == 0 else "stop",
                9 + n,
                nll,
                3,
                metadata={"city": ("Rome", "<i>Paris</i>")[n % 2]},
            )
            for n in range(rows)
        )
        models.append(measured(ModelScores(name, f"runs/{name}", "0123", {}, {}, answers), metrics, seed=0))
    dataset = {"path": "d", "split": "test", "rows": rows, "digest": "4567"}
    return EvaluationResult(
        config.resolved(),
        dataset,
        tuple(models),
        compared(models, metrics, seed=0),
        "2026-01-01T00:00:00+00:00",
        slices=sliced(models, metrics, seed=0),
    )


class Tags(HTMLParser):
    """Collects tags, attributes and text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def parsed(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    return tags


def test_values_of_bleu_say_by_which_tokens_they_were_counted(make_result: Any) -> None:
    found = make_result({"m": ["answer 0"]}, metrics=["bleu"])
    assert value_table(found)[0]["title"] == "BLEU"
    char = replace(found, settings={**found.settings, "bleu_tokenizer": "char"})
    assert value_table(char)[0]["title"] == "BLEU (char tokens)"


def test_hostile_output_stays_text_on_the_page() -> None:
    found = result(label="<script>evil()</script>")
    page = parsed(render_html(found))
    assert "script" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.text.count(HOSTILE) == 8 + 5  # every row, and the five that changed most
    assert "city: <i>Paris</i>" in page.text
    assert "<script>evil()</script>" in page.text


def test_the_page_needs_nothing_from_elsewhere_and_runs_no_scripts() -> None:
    page = parsed(render_html(result()))
    sources = [value or "" for name, value in page.attributes if name in {"src", "href"}]
    assert sources
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'; img-src data:") in page.attributes


def test_the_page_shows_every_row_of_every_model_and_what_is_right() -> None:
    page = render_html(result())
    every = page.partition('<div class="every">')[2]
    assert len(re.findall(r'<section class="row', every)) == 8
    assert every.count(">wrong<") == every.count(">right<") == 8
    assert "cut off after 9 tokens" in every


def test_the_rows_that_changed_most_come_first_and_are_not_all() -> None:
    page = render_html(result())
    changed = page.partition("Rows that changed most")[2].partition("Every row")[0]
    assert re.findall(r'class="rank">(\d+)', changed) == ["1", "2", "3", "4", "5"]
    assert "Gained" in changed
    assert "Lost" not in changed


def test_verdicts_and_intervals_stand_in_both_kinds_of_report() -> None:
    found = result()
    words = "Exact match: tuned is better than base on 8 rows (difference +1.000"
    for page in (render_html(found), render_markdown(found)):
        assert words in page
        assert "[0.631, 1.000]" in page  # eight of eight right, as Clopper and Pearson have it
        assert "city: " in page
        assert "corrected (Holm) for all 3 comparisons" in page


def test_markdown_cells_hold_no_link_or_image() -> None:
    assert cell("![a](http://x/y.png) [b] | <i>") == r"![a]\(http://x/y.png) [b] \| &lt;i>"


def test_markdown_answers_cannot_leave_their_fences() -> None:
    found = render_markdown(result())
    assert f"````text\n{HOSTILE}\n````" in found
    assert "\n# not a heading\n````" in found
    assert "&lt;script>evil" in render_markdown(result(label="<script>evil()</script>")).partition("## Every row")[0]


def test_the_suffix_decides_the_kind_of_report(tmp_path: Path) -> None:
    found = result()
    for suffix, start in ((".html", "<!doctype html>"), (".md", "# The tuned model"), (".json", "{")):
        path = generate_evaluation_report(found, tmp_path / f"report{suffix}")
        assert Path(path).read_text().startswith(start)
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["schema_version"] == 2
    assert content["comparisons"][0]["verdict"] == "better"
    assert content["slices"][0]["by"] == "city"
    assert content["models"][0]["answers"][0]["answer"] == HOSTILE
    with pytest.raises(ConfigError, match=r"must end with .html, .md, .json \(got '.pdf'\)"):
        generate_evaluation_report(found, tmp_path / "report.pdf")


def test_a_report_is_also_written_from_the_folder_of_a_finished_one(tmp_path: Path) -> None:
    found = result()
    draft = begin(tmp_path / "report", ArtifactKind.REPORT, settings=found.settings)
    with draft:
        write_report(draft.folder, found)
        for model in found.models:
            write_answers(draft.folder / model.file, model.answers)
    written = (tmp_path / "report" / "report.md").read_text()
    for number, given in enumerate((tmp_path / "report", str(tmp_path / "report"), draft.artifact)):
        path = generate_evaluation_report(given, tmp_path / f"{number}.md")
        assert Path(path).read_text() == written
    with pytest.raises(ArtifactError, match="nowhere"):
        generate_evaluation_report(tmp_path / "nowhere", tmp_path / "no.md")
    with pytest.raises(ConfigError, match=r"results: expected what .* or the folder of a finished report \(got None\)"):
        generate_evaluation_report(None, tmp_path / "no.md")


def test_a_result_is_read_back_from_its_files_as_it_was(tmp_path: Path) -> None:
    found = result()
    draft = begin(tmp_path / "report", ArtifactKind.REPORT, settings=found.settings)
    with draft:
        draft.write_json("results.json", to_json(found))
        for model in found.models:
            write_answers(draft.folder / model.file, model.answers)
    again = replace(read_result(tmp_path / "report"), where="")
    assert repr(again) == repr(found)  # a value that is no number equals itself only so


def test_a_report_of_another_schema_is_refused_with_what_to_do(tmp_path: Path) -> None:
    found = result()
    draft = begin(tmp_path / "report", ArtifactKind.REPORT, settings=found.settings)
    with draft:
        draft.write_json("results.json", {**to_json(found), "schema_version": 1})
    with pytest.raises(ArtifactError, match=r"schema version 1; this version of raytune-ft reads 2. Evaluate again"):
        read_result(tmp_path / "report")


def test_all_files_of_a_report_are_written_and_its_plots_in_both_formats(tmp_path: Path) -> None:
    write_report(tmp_path, result())
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    drawn = ("metrics", "perplexity", "differences", "fields", "lengths", "slices")
    plotted = {f"plots/{name}.{kind}" for name in drawn for kind in ("svg", "png")}
    assert names == {"results.json", "report.md", "report.html", *plotted}
    assert (tmp_path / "plots/slices.png").read_bytes().startswith(b"\x89PNG")


def test_plots_are_the_same_bytes_each_time_and_take_labels_literally() -> None:
    first, second = ({name: plot.svg() for name, plot in plots.draw(result(label="a$b$<c")).items()} for _ in "ab")
    assert list(first) == ["metrics", "perplexity", "differences", "fields", "lengths", "slices"]
    assert first == second
    assert "a$b$&lt;c" in first["metrics"]


def test_a_ranking_follows_the_direction_of_its_metric() -> None:
    found = result()
    config = ComparisonConfig(model_paths=["a", "b"], dataset_path="d", metrics=["perplexity", "exact_match"])
    ranked = ComparisonResult(config.resolved(), found.dataset, found.models, (), "")
    assert ranked.ranking("perplexity") == ranked.ranking(EvaluationMetric.EXACT_MATCH) == ["tuned", "base"]


def test_numbers_are_short_enough_for_a_table() -> None:
    assert [number_text(n) for n in (0.12345, 12.345, 1234.56, 123456.0)] == ["0.123", "12.3", "1,234.6", "1.23e+05"]


def test_of_many_comparisons_only_the_leading_metrics_open_the_report() -> None:
    found = result()
    many = replace(found, comparisons=found.comparisons * 3)
    opening = render_html(many).partition("<h2>Values")[0]
    assert opening.count("Exact match: tuned is better than base") == 3
    assert "Perplexity: tuned" not in opening
    assert "all 9 comparisons are in the table of differences" in opening
    assert "Perplexity: tuned" in render_html(found).partition("<h2>Values")[0]


def test_calibration_is_drawn_where_choices_were_measured() -> None:
    config = EvaluationConfig(model_path="m", dataset_path="d", metrics=["choice_accuracy", "calibration"])
    metrics = {name: make_metric(name, config.resolved()) for name in config.metrics}
    answers = tuple(
        Answer(
            str(n),
            f"question {n}",
            "yes",
            choices=[{"text": t, "nll": v, "bytes": 3} for t, v in (("yes", n), ("no", 3))],
        )
        for n in range(6)
    )
    model = measured(ModelScores("model", "m", "0123", {}, {}, answers), metrics, seed=0)
    dataset = {"path": "d", "split": "test", "rows": 6, "digest": "4567"}
    found = EvaluationResult(config.resolved(), dataset, (model,), (), "2026-01-01T00:00:00+00:00")
    assert list(plots.draw(found)) == ["metrics", "calibration"]
    assert "confidence in the likeliest choice" in plots.draw(found)["calibration"].svg()
    every = render_html(found).partition('<div class="every">')[2]
    assert (every.count(">right<"), every.count(">wrong<")) == (4, 2)  # nats 0, 1, 2 and the tie with 3


def scored(
    metric: str, rows: dict[str, list[float]], *, kind: type[EvaluationResult] = EvaluationResult
) -> EvaluationResult:
    """A result of one metric of numbers: a reward, or the nats of one token, of each row and model."""
    name = EvaluationMetric(metric)
    metrics = {name: make_metric(name, {})}
    models = []
    for label, given in rows.items():
        answers = [
            Answer(
                str(n), "p" * (1 + n % 3), "r", "x", nll=value, tokens=1, bytes=1, reward=value, metadata={"k": n % 2}
            )
            for n, value in enumerate(given)
        ]
        models.append(measured(ModelScores(label, label, "0", {}, {}, answers), metrics, seed=0))
    dataset = {"path": "d", "split": "t", "rows": len(answers), "digest": "1"}
    parts = sliced(models, metrics, seed=0)
    settings = {"metrics": [metric], "seed": 0}
    return kind(settings, dataset, tuple(models), compared(models, metrics, seed=0), "now", slices=parts)


def test_values_that_are_no_numbers_are_null_in_every_file_and_are_read_back_as_such(tmp_path: Path) -> None:
    found = scored("perplexity", {"base": [1 + n / 9 for n in range(30)], "tuned": [1000.0 + n for n in range(30)]})
    draft = begin(tmp_path / "report", ArtifactKind.REPORT, settings=found.settings)
    with draft:
        for model in found.models:
            write_answers(draft.folder / model.file, model.answers)
            draft.numbers[model.label] = model.values
        write_report(draft.folder, found)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    folder = tmp_path / "report"
    lines = (folder / "answers/tuned.jsonl").read_text().splitlines()
    for content in ((folder / "results.json").read_text(), (folder / "manifest.json").read_text(), *lines):
        json.loads(content, parse_constant=refuse)
    again = read_result(tmp_path / "report")
    assert again["base"] == found["base"]
    tuned = again["tuned"]
    assert math.isnan(tuned.values["perplexity"])
    assert tuned.values["nll_per_token"] == found["tuned"].values["nll_per_token"]
    assert all(map(math.isnan, tuned.intervals["perplexity"]))
    assert math.isnan(tuned.answers[0].scores["perplexity"])
    assert again.comparisons[0].verdict == "cannot tell"
    assert again.comparisons[0].p_value == 1.0
    assert not again.beats(found, "perplexity", max_drop=0.5)
    assert "nan" in render_markdown(again)
    assert "<html" in render_html(again)
    assert set(plots.draw(again)) == set(plots.draw(found)) == {"perplexity", "slices"}
    assert all(plot.png() for plot in plots.draw(again).values())


def test_a_model_without_a_number_is_ranked_last_and_never_the_best() -> None:
    rows = {"lost": [1000.0] * 3, "fair": [2.0] * 3, "good": [1.0] * 3}
    found = scored("perplexity", rows, kind=ComparisonResult)
    assert found.ranking("perplexity") == ["good", "fair", "lost"]
    nan = replace(found, models=(replace(found.models[0], values={"perplexity": math.nan}), *found.models[1:]))
    assert nan.ranking("perplexity") == ["good", "fair", "lost"]
    assert [cell["best"] for cell in value_table(nan)[0]["cells"]] == [False, False, True]


def test_plots_of_rewards_say_that_higher_is_better_and_show_those_below_zero() -> None:
    found = scored("reward", {"base": [n % 5 - 4.0 for n in range(20)], "tuned": [n % 5 - 1.0 for n in range(20)]})
    picture = plots.draw(found)["slices"].svg()
    assert "higher is better" in picture
    assert ">−2<" in picture  # the base's mean, on a scale that has it
    assert "lower is better" in plots.draw(scored("perplexity", {"m": [1.0] * 20}))["perplexity"].svg()

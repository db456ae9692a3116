"""Reports of an evaluation: one self-contained HTML page, Markdown, or JSON."""

from __future__ import annotations

import base64
import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

from raytune_ft.core.errors import ConfigError
from raytune_ft.core.storage import Location
from raytune_ft.evaluation import plots
from raytune_ft.evaluation.answers import fields
from raytune_ft.evaluation.config import EvaluationMetric
from raytune_ft.evaluation.results import Answer, ComparisonResult, EvaluationResult, to_json

MOST_ROWS_SHOWN = 2000
"""Rows whose answers stand in the page itself; beyond, a browser is no fit reader, and the answer files are."""

_CAPTIONS = {
    "metrics": "Value and 95% interval of each metric, as a share of the best possible.",
    "perplexity": "Perplexity and its 95% interval.",
    "fields": "Accuracy of each field of the JSON answers.",
}


def generate_evaluation_report(results: EvaluationResult, path: str | os.PathLike[str]) -> str:
    """Writes a report of `results` to `path` and returns the path; its suffix says what kind.

    Args:
        results: of `ModelEvaluator.evaluate` or `compare_models`.
        path: ends with ``.html`` (one self-contained page), ``.md`` or ``.json``.

    Raises:
        ConfigError: if the suffix is none of these.
    """
    target = Location.at(path)
    suffix = Path(target.name).suffix.lower()
    writers = {".html": render_html, ".md": render_markdown, ".json": _render_json}
    if suffix not in writers:
        raise ConfigError(
            f"{target}: a report's name must end with {', '.join(writers)} (got {suffix or 'no suffix'!r})"
        )
    target.write(writers[suffix](results).encode())
    return target.uri


def render_html(result: EvaluationResult) -> str:
    """The page; whatever models and data say stays text (autoescaped, and the page's policy runs no scripts)."""
    return str(page_template("raytune_ft.evaluation", "report.html.j2").render(**page_values(result)))


def page_values(result: EvaluationResult) -> dict[str, Any]:
    """What the page's template shows of `result`; a template that extends it shows the same and more."""
    return {
        "title": _title(result),
        "result": result,
        "colours": [plots.COLOURS[number % len(plots.COLOURS)] for number in range(len(result.models))],
        "table": value_table(result),
        "plots": [(image(svg), _CAPTIONS[name]) for name, svg in plots.draw(result).items()],
        "rows": _rows(result),
        "meanings": [(metric.facts.title, metric.facts.meaning) for metric in result.metrics],
        "settings": json.dumps(result.settings, indent=2, ensure_ascii=False),
    }


def image(svg: str) -> str:
    """An SVG document as the address of an image, so that nothing in it can run."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def render_markdown(result: EvaluationResult) -> str:
    """The same in Markdown; answers stand in fences that they cannot close."""
    labels = [model.label for model in result.models]
    lines = [f"# {_title(result)}", "", _subtitle(result), ""]
    lines += [f"- {_cell(comparison.words)}" for comparison in result.comparisons] + [""]
    lines += ["| | " + " | ".join(map(_cell, labels)) + " |", "|---|" + "---:|" * len(labels)]
    for row in value_table(result):
        name = f"**{row['title']}**" if row["headline"] else _cell(row["title"])
        cells = [f"{cell['value']} {cell['interval']}".strip() for cell in row["cells"]]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "In brackets: 95% bootstrap intervals. " + _correction(result), ""]
    lines += ["| model | path | content | answers cut off |", "|---|---|---|---:|"]
    lines += [f"| {_cell(m.label)} | {_cell(m.path)} | {m.digest} | {m.cut_off} |" for m in result.models]
    lines += ["", "## Every row", ""]
    for row in _rows(result):
        lines += [f"### Row {row['number']}", "", _fence(row["prompt"]), ""]
        if row["reference"] is not None:
            lines += ["Reference:", "", _fence(row["reference"]), ""]
        for label, cell in zip(labels, row["cells"], strict=True):
            said = [] if cell["answer"] is None else ["", _fence(cell["answer"])]
            lines += [f"{_cell(label)} ({', '.join(cell['notes']) or 'no score'}):", *said, ""]
    return "\n".join(lines).rstrip() + "\n"


def value_table(result: EvaluationResult) -> list[dict[str, Any]]:
    """A line a value: its title, whether it is a metric's headline, and value, interval and best mark per model."""
    headlines = {metric.facts.headline: metric for metric in result.metrics}
    lines = []
    for name in result.models[0].values:
        metric = headlines.get(name)
        numbers = [model.values[name] for model in result.models]
        best = None
        if metric is not None and len(set(numbers)) > 1:
            best = min(numbers) if metric.facts.lower_is_better else max(numbers)
        cells = []
        for model, number in zip(result.models, numbers, strict=True):
            low, high = model.intervals[metric] if metric else (None, None)
            span = f"[{number_text(low)}, {number_text(high)}]" if low is not None and high is not None else ""
            cells.append({"value": number_text(number), "interval": span, "best": number == best})
        title = name.replace("_", " ").replace("field accuracy.", "field accuracy: ")
        if metric is not None:
            title = metric.facts.title + (" (lower is better)" if metric.facts.lower_is_better else "")
        lines.append({"title": title, "headline": metric is not None, "cells": cells})
    return lines


def number_text(value: float) -> str:
    """A number for a table: three decimals below 10, else four digits."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}" if abs(value) < 1e4 else f"{value:.3g}"


def _rows(result: EvaluationResult) -> list[dict[str, Any]]:
    """What the rows' table shows: prompt, reference, and per model the answer, its scores and whether it is right."""
    judge = _judging_metric(result)
    rows = []
    for number, answers in enumerate(zip(*(model.answers for model in result.models), strict=True), start=1):
        if number > MOST_ROWS_SHOWN:
            break
        cells = [_answer_cell(answer, judge) for answer in answers]
        rights = [cell["right"] for cell in cells]
        rows.append(
            {
                "number": number,
                "prompt": answers[0].prompt,
                "reference": answers[0].reference,
                "cells": cells,
                "changed": len({answer.answer for answer in answers}) > 1,
                "wrong": rights[-1] is False,
            }
        )
    return rows


def _answer_cell(answer: Answer, judge: EvaluationMetric | None) -> dict[str, Any]:
    notes = []
    for name, score in answer.scores.items():
        notes.append(f"{EvaluationMetric(name).facts.title} {score:.3g}")
    wanted, given = fields(answer.reference or ""), fields(answer.answer or "")
    if wanted and given and wanted != given:
        differing = [key for key in {**wanted, **given} if wanted.get(key) != given.get(key)]
        notes.append("differs in " + ", ".join(differing))
    if answer.finish_reason == "length":
        notes.append(f"cut off after {answer.answer_tokens} tokens")
    right = None
    if judge is not None:
        right = answer.scores[judge] >= (judge.facts.best or 1.0) - 1e-9
    return {"answer": answer.answer, "notes": notes, "right": right}


def _judging_metric(result: EvaluationResult) -> EvaluationMetric | None:
    """The metric by which a row is called right: the strictest that was measured."""
    strict = (
        EvaluationMetric.EXACT_MATCH,
        EvaluationMetric.ACCURACY,
        EvaluationMetric.FIELD_F1,
        EvaluationMetric.F1,
        EvaluationMetric.VALID_JSON,
    )
    return next((metric for metric in strict if metric in result.metrics), None)


def _title(result: EvaluationResult) -> str:
    labels = [model.label for model in result.models]
    if isinstance(result, ComparisonResult):
        return f"Comparison of {', '.join(labels[:-1])} and {labels[-1]}"
    return "The tuned model against its base" if len(labels) == 2 else f"Evaluation of {Path(result.model.path).name}"


def _subtitle(result: EvaluationResult) -> str:
    split = f", split {result.dataset['split']}" if result.dataset["split"] else ""
    return f"{result.dataset['rows']} rows of {_cell(str(result.dataset['path']))}{split}. {result.created_at}"


def _correction(result: EvaluationResult) -> str:
    count = len(result.comparisons)
    return f"The {count} comparisons are not corrected for their number." if count > 1 else ""


def _render_json(result: EvaluationResult) -> str:
    return json.dumps(to_json(result, with_answers=True), indent=2, ensure_ascii=False) + "\n"


def _cell(text: str) -> str:
    """Text that stays inside a Markdown table cell and is not HTML."""
    return " ".join(text.split()).replace("|", r"\|").replace("<", "&lt;")


def _fence(text: str) -> str:
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


@cache
def page_template(package: str, name: str) -> Any:
    """The template `name` of `package`; it may extend ours as ``evaluation/report.html.j2``."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, PrefixLoader, StrictUndefined

    ours = PackageLoader("raytune_ft.evaluation", ".")
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package, "."), PrefixLoader({"evaluation": ours})]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number_text
    return environment.get_template(name)

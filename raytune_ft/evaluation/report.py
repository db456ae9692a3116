"""Reports of an evaluation: one self-contained HTML page, Markdown, or JSON, and the plots as files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raytune_ft.core.artifacts import Artifact
from raytune_ft.core.errors import ConfigError
from raytune_ft.core.figures import COLOURS, Plot
from raytune_ft.core.pages import image, template
from raytune_ft.core.storage import Location
from raytune_ft.evaluation import plots
from raytune_ft.evaluation.check_tables import check_tables
from raytune_ft.evaluation.examples import examples, most_changed
from raytune_ft.evaluation.markdown import render_markdown
from raytune_ft.evaluation.results import RESULTS, EvaluationResult, leading_metric, read_result, to_json
from raytune_ft.evaluation.tables import (
    comparison_table,
    number_text,
    slice_table,
    span_text,
    title,
    value_table,
    verdicts,
)

__all__ = [
    "generate_evaluation_report",
    "page_template",
    "page_values",
    "render_html",
    "write_plots",
    "write_report",
]


def generate_evaluation_report(
    results: EvaluationResult | Artifact | str | os.PathLike[str], path: str | os.PathLike[str]
) -> str:
    """Writes a report of `results` to `path` and returns the path; its suffix says what kind.

    Args:
        results: of `ModelEvaluator.evaluate` or `compare_models`, or the folder (or URI) of a finished report.
        path: ends with ``.html`` (one self-contained page), ``.md`` or ``.json``.

    Raises:
        ConfigError: if the suffix is none of these, or `results` something else.
        ArtifactError: if the folder holds no finished report.
    """
    target = Location.at(path)
    suffix = Path(target.name).suffix.lower()
    writers = {".html": render_html, ".md": render_markdown, ".json": _render_json}
    if suffix not in writers:
        raise ConfigError(
            f"{target}: a report's name must end with {', '.join(writers)} (got {suffix or 'no suffix'!r})"
        )
    found = results if isinstance(results, EvaluationResult) else _read(results)
    target.write(writers[suffix](found).encode())
    return target.uri


def _read(report: Any) -> EvaluationResult:
    if isinstance(report, Artifact | str | os.PathLike):
        return read_result(report)
    raise ConfigError(
        "results: expected what ModelEvaluator.evaluate or compare_models gives, or the folder of a finished report "
        f"(got {report!r:.80})"
    )


def write_report(folder: Path, result: EvaluationResult) -> None:
    """Writes ``results.json``, ``report.md``, ``report.html``, and the plots as SVG and PNG, into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULTS).write_text(json.dumps(to_json(result), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(render_markdown(result), encoding="utf-8")
    (folder / "report.html").write_text(render_html(result), encoding="utf-8")
    write_plots(folder, plots.draw(result))


def write_plots(folder: Path, drawn: Mapping[str, Plot]) -> None:
    """Writes plots, by their names, as SVG and PNG below a folder."""
    for name, plot in drawn.items():
        path = folder / "plots" / f"{name}.svg"
        path.parent.mkdir(exist_ok=True)
        path.write_text(plot.svg(), encoding="utf-8")
        path.with_suffix(".png").write_bytes(plot.png())


def render_html(result: EvaluationResult) -> str:
    """The page; whatever models and data say stays text (autoescaped, and the page's policy runs no scripts)."""
    return str(page_template("evaluation/report.html.j2").render(**page_values(result)))


def page_values(result: EvaluationResult) -> dict[str, Any]:
    """What the page's template shows of `result`; a template that extends it shows the same and more."""
    return {
        "title": title(result),
        "result": result,
        "colours": [COLOURS[number % len(COLOURS)] for number in range(len(result.models))],
        "table": value_table(result),
        "comparisons": comparison_table(result),
        "verdicts": verdicts(result),
        "slices": slice_table(result),
        "checks": check_tables(result),
        "plots": [(image(plot.svg()), plots.CAPTIONS[name]) for name, plot in plots.draw(result).items()],
        "changed": most_changed(result),
        "rows": examples(result),
        "leading": leading_metric(result).facts.title,
        "meanings": [(metric.facts.title, metric.facts.meaning) for metric in result.metrics],
        "settings": json.dumps(result.settings, indent=2, ensure_ascii=False),
    }


def _render_json(result: EvaluationResult) -> str:
    return json.dumps(to_json(result, with_answers=True), indent=2, ensure_ascii=False) + "\n"


def page_template(name: str) -> Any:
    """A template (`core.pages`) that shows numbers and intervals as our tables do."""
    return template(name, number=number_text, span=span_text)

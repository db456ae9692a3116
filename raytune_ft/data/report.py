"""The quality report of a dataset: its numbers, and the page that shows them."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from raytune_ft.core.errors import DataError
from raytune_ft.core.grammar import number_of
from raytune_ft.core.pages import image, template
from raytune_ft.core.storage import Location
from raytune_ft.data import plots
from raytune_ft.data.account import Account
from raytune_ft.data.assessment import Assessment
from raytune_ft.data.config import DataCollectionConfig
from raytune_ft.data.findings import Finding, advice, find, label_numbers
from raytune_ft.data.near import NEAR_REASON
from raytune_ft.data.quality import Statistics
from raytune_ft.data.sketches import Histogram, most_common
from raytune_ft.data.suspects import SUSPECTS_FILE, Suspect, loss_limit

logger = logging.getLogger("raytune_ft")

JSON_FILE, PAGE_FILE = "quality.json", "quality.html"
_SHOWN_SUSPECTS = 20
_LOSS_BARS = 60
_DUPLICATES = ("duplicate", NEAR_REASON)


def quality_numbers(
    statistics: Statistics,
    judgement: Mapping[str, Any],
    account: Account,
    *,
    task: str | None,
    suspects: Mapping[str, Sequence[Suspect]],
    losses: tuple[Histogram, float, int] | None,
) -> dict[str, Any]:
    """What ``quality.json`` says.

    Args:
        statistics: of all usable rows that sources had.
        judgement: of the sample (`judgement.judge_sample`).
        account: of the run.
        task: the task description.
        suspects: the rows that are flagged, with why.
        losses: where there is a suspect_model: its losses, the z of a suspect, and how many rows were judged.
    """
    repeated = statistics.repeated + sum(account.rejected[reason] for reason in _DUPLICATES)
    report: dict[str, Any] = {
        "rows": dict(account.splits),
        "measured": {"rows": statistics.rows, "train": statistics.splits["train"], "sample": judgement.get("rows", 0)},
        "task_description": task,
        "relevance": judgement.get("relevance"),
        "diversity": {
            "distinct_1": statistics.distinct(1),
            "distinct_2": statistics.distinct(2),
            "duplicate_rate": repeated / account.rows_in if account.rows_in else 0.0,
            "clusters": judgement.get("clusters"),
        },
        "balance": _balance(statistics),
        "consistency": _consistency(statistics),
        "suspects": _suspects(judgement, suspects, losses),
        "quirks": judgement.get("quirks", []),
        "telling_words": judgement.get("telling_words", []),
        "cut_by_embedder": judgement.get("cut_by_embedder"),
    }
    if "parameters" in judgement:
        verdict, text = advice(statistics.splits["train"], judgement["parameters"])
        report["quantity"] = {"parameters": judgement["parameters"], "verdict": verdict, "text": text}
    return report


def _balance(statistics: Statistics) -> dict[str, Any]:
    labels = {name: label_numbers(counts) for name, counts in sorted(statistics.labels.items())}
    sources = statistics.values["source"]
    return {
        "labels": {name: numbers for name, numbers in labels.items() if numbers is not None},
        "sources": {"values": dict(most_common(sources.counts, 50)), "evenness": sources.evenness},
        "lengths": {name: bins.tolist() for name, bins in statistics.lengths.items()},
    }


def _consistency(statistics: Statistics) -> dict[str, Any]:
    found: dict[str, Any] = {}
    names = {"format": "formats", "shape": "shapes", "ending": "endings", "casing": "casings"}
    for name, plural in names.items():
        counts = statistics.values[name]
        found[plural] = dict(most_common(counts.counts, 20))
        first = most_common(counts.counts, 1)
        found[f"{name}_rate"] = first[0][1] / counts.total if first else None
    return found


def _suspects(
    judgement: Mapping[str, Any], suspects: Mapping[str, Sequence[Suspect]], losses: tuple[Histogram, float, int] | None
) -> dict[str, Any] | None:
    judged = max(judgement.get("judged", 0), losses[2] if losses else 0)
    if not judged:
        return None
    shown = [{"id": row_id, "why": "; ".join(s.why for s in why)} for row_id, why in list(suspects.items())]
    found: dict[str, Any] = {"judged": judged, "found": len(suspects), "rate": len(suspects) / judged}
    found["worst"] = shown[:_SHOWN_SUSPECTS]
    if losses:
        histogram, z, _ = losses
        found["losses"] = {"median": histogram.median(), "limit": loss_limit(histogram, z), **_coarse(histogram)}
    return found


def _coarse(histogram: Histogram) -> dict[str, Any]:
    """The histogram in at most 60 bars, for a plot."""
    used = int(np.flatnonzero(histogram.counts).max(initial=0)) + 1
    step = -(-used // _LOSS_BARS)
    counts = np.add.reduceat(histogram.counts[:used], np.arange(0, used, step))
    return {"width": histogram.width * step, "counts": counts.tolist()}


def summary(report: Mapping[str, Any]) -> str:
    """The report in one line, for the terminal."""
    diversity = report["diversity"]
    said = [f"distinct-2 {diversity['distinct_2']:.2f}"] if diversity["distinct_2"] is not None else []
    said.append(f"duplicates {diversity['duplicate_rate']:.1%}")
    if report["relevance"]:
        said.append(f"relevance {report['relevance']['mean']:.2f}")
    if diversity["clusters"]:
        said.append(f"cluster evenness {diversity['clusters']['evenness']:.2f}")
    even = [label["evenness"] for label in report["balance"]["labels"].values()]
    if even:
        said.append(f"label evenness {min(even):.2f}")
    if report["consistency"]["shape_rate"] is not None:
        said.append(f"commonest answer shape {report['consistency']['shape_rate']:.0%}")
    if report["suspects"]:
        said.append(f"suspect labels {report['suspects']['found']} of {report['suspects']['judged']}")
    return "quality: " + ", ".join(said)


def render_page(report: Mapping[str, Any], findings: Sequence[Finding], account: Account) -> str:
    """The page; whatever the data says stays text (autoescaped, and the page's policy runs no scripts)."""
    drawn = [(image(svg), caption) for svg, caption in plots.draw(report)]
    page = template("data/report.html.j2", percent=_percent, figure=_figure)
    return str(page.render(title="Quality of the data", report=report, findings=findings, account=account, plots=drawn))


def publish(assessment: Assessment, account: Account, config: DataCollectionConfig, where: Location) -> list[Finding]:
    """Writes ``quality.json``, ``quality.html`` and, where labels look wrong, ``suspects.jsonl``; says it in short.

    Returns:
        All findings.
    """
    report = quality_numbers(
        assessment.statistics,
        assessment.judgement,
        account,
        task=config.task_description,
        suspects=assessment.suspects,
        losses=assessment.losses,
    )
    findings = find(report, config.quality)
    said = {**report, "findings": [asdict(finding) for finding in findings]}
    (where / JSON_FILE).write((json.dumps(said, indent=2, ensure_ascii=False) + "\n").encode())
    (where / PAGE_FILE).write(render_page(report, findings, account).encode())
    if assessment.lines:
        (where / SUSPECTS_FILE).write(("\n".join(assessment.lines) + "\n").encode())
    logger.info("prepare: %s", summary(report))
    for finding in findings:
        logger.log(logging.WARNING if finding.broken else logging.INFO, "prepare: quality: %s", finding.text)
    logger.info("prepare: quality report: %s", where / PAGE_FILE)
    return findings


def refuse_broken(findings: Sequence[Finding], where: Location) -> None:
    """Ends a run whose quality misses a threshold of the settings.

    Raises:
        DataError: naming all that are missed, and where the report lies.
    """
    broken = [finding.text for finding in findings if finding.broken]
    if broken:
        raise DataError(
            f"quality: {number_of(len(broken), 'threshold')} missed: {'; '.join(broken)}. The report is "
            f"{where / PAGE_FILE}; "
            "mend the data, or change the thresholds under quality."
        )


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"

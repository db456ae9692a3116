"""What a quality report says of its numbers: findings, those that stop the run, and the guide's advice on quantity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raytune_ft.core.grammar import number_of
from raytune_ft.data.config_quality import QualityConfig
from raytune_ft.data.labels import MOST_VALUES
from raytune_ft.data.sketches import most_common


@dataclass(frozen=True)
class Quantity:
    """A line of the guide's table: below how many parameters, the range of the minimum and the ideal range of rows."""

    size: str
    below: float
    minimum: tuple[int, int]
    ideal: tuple[int, int]


QUANTITIES = (
    Quantity("small (<1B parameters)", 1e9, (500, 1_000), (1_000, 5_000)),
    Quantity("medium (1B-10B parameters)", 1e10 + 1, (1_000, 2_000), (2_000, 10_000)),
    Quantity("large (>10B parameters)", float("inf"), (2_000, 5_000), (5_000, 20_000)),
)


def quantity_of(parameters: int) -> Quantity:
    """The guide's line for a model of this size."""
    return next(line for line in QUANTITIES if parameters < line.below)


def advice(rows: int, parameters: int) -> tuple[str, str]:
    """A verdict (``too few``, ``few``, ``ideal``, ``many``) on the number of training rows, and a sentence."""
    line = quantity_of(parameters)
    (least, enough), (low, high) = line.minimum, line.ideal
    ideal = f"the guide's ideal for a {line.size} model is {low:,} to {high:,}"
    if rows < least:
        return "too few", f"{rows:,} training rows: below the minimum of {least:,} to {enough:,}; {ideal}"
    if rows < low:
        return "few", f"{rows:,} training rows: at the minimum; {ideal}"
    if rows <= high:
        return "ideal", f"{rows:,} training rows: {ideal}"
    return "many", f"{rows:,} training rows: more than ideal, which costs time; {ideal}"


@dataclass(frozen=True)
class Finding:
    """Something to say of a dataset; a `broken` one misses a threshold of the settings and stops the run."""

    text: str
    broken: bool = False


def find(report: Mapping[str, Any], config: QualityConfig) -> list[Finding]:
    """All findings of a report's numbers, broken thresholds first.

    A threshold whose number could not be measured is broken, too: nothing shows that it is met.
    """
    return [*_broken(report, config), *_remarks(report)]


def _broken(report: Mapping[str, Any], config: QualityConfig) -> list[Finding]:
    relevance, diversity = report.get("relevance") or {}, report["diversity"]
    even = {name: label["evenness"] for name, label in report["balance"]["labels"].items()}
    quirks = [quirk["gain"] for quirk in report.get("quirks", ())]
    suspects = report.get("suspects") or {}
    limits: list[tuple[str, str, float | None]] = [
        ("min_rows", "training rows", report["measured"]["train"]),
        ("min_relevance", "mean relevance to the task description", relevance.get("mean")),
        ("max_irrelevant_rate", "share of rows off the task", relevance.get("irrelevant_rate")),
        ("max_duplicate_rate", "share of duplicates", diversity["duplicate_rate"]),
        ("min_distinct_2", "distinct word pairs over all", diversity["distinct_2"]),
        ("min_cluster_entropy", "evenness of clusters", (diversity.get("clusters") or {}).get("evenness")),
        ("min_balance", "evenness of the least even label", min(even.values(), default=None)),
        ("min_consistency", "share of the commonest shape of answers", report["consistency"]["shape_rate"]),
        ("max_suspect_rate", "share of labels that look wrong", suspects.get("rate")),
        ("max_quirk", "accuracy above chance by the surface alone", max(quirks, default=None)),
    ]
    found = []
    for name, words, value in limits:
        limit = getattr(config, name)
        if limit is None:
            continue
        if value is None:
            found.append(
                Finding(
                    f"{name}: {words} could not be measured: {_WHY.get(name, 'there is nothing to measure it on')}",
                    True,
                )
            )
        elif value < limit if name.startswith("min_") else value > limit:
            wanted = "at least" if name.startswith("min_") else "at most"
            found.append(Finding(f"{name}: {words} is {value:.4g}, wanted {wanted} {limit:g}", True))
    return found


_WHY = {
    "min_balance": "no answer is a label",
    "max_suspect_rate": "no answer is a label, and there is no suspect_model",
    "max_quirk": "no answer is a label",
}


def _remarks(report: Mapping[str, Any]) -> list[Finding]:
    found = []
    quantity = report.get("quantity")
    if quantity and quantity["verdict"] != "ideal":
        found.append(Finding(quantity["text"]))
    suspects = report.get("suspects")
    if suspects and suspects["found"]:
        found.append(
            Finding(
                f"{suspects['found']} of {suspects['judged']} labels that were judged look wrong; fill in `corrected` "
                "in suspects.jsonl and prepare again with corrections: suspects.jsonl"
            )
        )
    for quirk in report.get("quirks", ()):
        if quirk["is_quirk"]:
            best = max(quirk["parts"], key=lambda part: quirk["parts"][part])
            found.append(
                Finding(
                    f"the instruction's surface alone tells {quirk['target']} in {quirk['accuracy']:.0%} of the rows "
                    f"(the commonest value: {quirk['chance']:.0%}), {best} alone in {quirk['parts'][best]:.0%}"
                )
            )
    telling = report.get("telling_words", ())
    if telling:
        first = telling[0]
        found.append(
            Finding(
                f"{number_of(len(telling), 'word sequence gives', 'word sequences give')} a label away: "
                f"{first['words']!r} means {first['target']} "
                f"{first['value']!r} in {first['hits']} of {first['support']} rows ({first['lift']:.1f} times as often)"
            )
        )
    return found


def label_numbers(counts: Any) -> dict[str, Any] | None:
    """What is said of one label's values (`sketches.ValueCount`); None where they are too many to be labels."""
    if not counts.complete or not 2 <= len(counts) <= MOST_VALUES:
        return None
    return {"rows": counts.total, "values": dict(most_common(counts.counts, len(counts))), "evenness": counts.evenness}

"""What a report's checks found, as tables: leaks, production, general abilities, and lm-eval's numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from raytune_ft.evaluation.results import EvaluationResult
from raytune_ft.evaluation.tables import TextTable


def check_tables(result: EvaluationResult) -> list[TextTable]:
    """One table for each check that was made and has something to show; joined reports have a check of each part's."""
    tables = []
    for name, make in _TABLES.items():
        for key, found in result.checks.items():
            label, _, check = key.rpartition(": ")
            if check == name:
                table = make(found)
                tables.append(replace(table, title=f"{table.title}: {label}") if label else table)
    return [table for table in tables if table.rows]


def _leakage(found: Mapping[str, Any]) -> TextTable:
    rows = []
    for label, leak in found.items():
        if leak["known"]:
            rows.append((label, str(leak["rows"]), ", ".join(leak["datasets"]) or "none"))
        else:
            rows.append((label, "not known", "no manifest says what it was trained on"))
    note = "Test rows that are in a model's training data: the same row, the same prompt, or nearly the same text."
    return TextTable("Leaks", ("model", "rows trained on", "looked into"), tuple(rows), note)


def _production(found: Mapping[str, Any]) -> TextTable:
    names = {
        "prompts": "prompts compared",
        "words_low": "words, lower quartile",
        "words_median": "words, median",
        "words_high": "words, upper quartile",
        "with_question_mark": "share with a question mark",
        "with_digits": "share with digits",
        "with_several_lines": "share with several lines",
        "beyond_ascii": "share with letters beyond ASCII",
    }
    rows = [(title, f"{found['test'][name]:.3g}", f"{found['production'][name]:.3g}") for name, title in names.items()]
    note = "Production's prompts farthest from any test prompt: " + " · ".join(found["farthest"])
    return TextTable("Test set and production", ("", "test set", "production"), tuple(rows), note)


def _forgetting(found: Mapping[str, Any]) -> TextTable:
    models = found["models"]
    names = {
        "answered": ("general questions answered", ".0%"),
        "chosen": ("right choice likeliest", ".0%"),
        "perplexity": ("perplexity of general text", ".2f"),
        "bits_per_byte": ("bits per byte of general text", ".3f"),
    }
    rows = []
    for name, (title, how) in names.items():
        values = [model[name] for model in models.values()]
        if any(value is not None for value in values):
            rows.append((title, *("" if value is None else format(value, how) for value in values)))
    first = next(iter(models.values()))
    note = f"{first['questions']} shipped questions, {first['passages']} passages; compared with {found['base']}."
    return TextTable("General abilities", ("", *models), tuple(rows), note)


def _harness(found: Mapping[str, Any]) -> TextTable:
    models = found["models"]
    keys = dict.fromkeys((task, name) for tasks in models.values() for task, values in tasks.items() for name in values)
    rows = []
    for task, name in keys:
        values = [tasks.get(task, {}).get(name) for tasks in models.values()]
        rows.append((f"{task}: {name}", *("" if value is None else f"{value:.4g}" for value in values)))
    return TextTable("lm-eval", ("", *models), tuple(rows), "Numbers and names are lm-eval's own.")


_TABLES: dict[str, Callable[[Mapping[str, Any]], TextTable]] = {
    "leakage": _leakage,
    "production": _production,
    "forgetting": _forgetting,
    "harness": _harness,
}

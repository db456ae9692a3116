"""The report in Markdown; whatever models and data say stays inside its cell or fence."""

from __future__ import annotations

import re
from collections.abc import Sequence

from raytune_ft.core.grammar import number_of
from raytune_ft.evaluation.check_tables import check_tables
from raytune_ft.evaluation.examples import MOST_ROWS_SHOWN, Example, examples, most_changed
from raytune_ft.evaluation.judging import Judging
from raytune_ft.evaluation.results import EvaluationResult
from raytune_ft.evaluation.tables import comparison_table, correction, slice_table, title, value_table, verdicts


def render_markdown(result: EvaluationResult) -> str:
    """The same as the page."""
    lines = [f"# {cell(title(result))}", "", _subtitle(result), ""]
    lines += [f"- {cell(comparison.words)}" for comparison in verdicts(result)] + [""]
    if result.notes:
        lines += ["**Before believing the numbers:**", "", *(f"- {cell(note)}" for note in result.notes), ""]
    if result.judging is not None:
        lines += _judging(result.judging)
    lines += _values(result)
    for part in (comparison_table(result), slice_table(result), *check_tables(result)):
        if part.rows:
            lines += [f"## {part.title}", "", *_table(part.heads, part.rows), "", cell(part.note), ""]
    lines += ["## Models", ""]
    models = [[m.label, m.path, m.digest, str(m.cut_off)] for m in result.models]
    lines += [*_table(["model", "path", "content", "answers cut off"], models), ""]
    labels = [model.label for model in result.models]
    changed = most_changed(result)
    if changed is not None:
        lines += [f"## Rows that changed most: {cell(changed.model)} against {cell(changed.other)}", ""]
        for word, some in (("Gained", changed.gained), ("Lost", changed.lost)):
            for row in some:
                lines += _example(row, labels, f"{word}: row")
    lines += ["## Every row", ""]
    every = examples(result)
    if len(every) < result.dataset["rows"]:
        said = f"The first {MOST_ROWS_SHOWN} of {result.dataset['rows']} rows; all are in the answer files."
        lines += [said, ""]
    for row in every:
        lines += _example(row, labels, "Row")
    return "\n".join(lines).rstrip() + "\n"


def cell(text: str) -> str:
    """Text that stays inside a Markdown table cell and is neither HTML nor a link or image."""
    return " ".join(text.split()).replace("|", r"\|").replace("<", "&lt;").replace("](", r"]\(")


def fence(text: str) -> str:
    """Text in a fence that it cannot close."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    marks = "`" * max(3, longest + 1)
    return f"{marks}text\n{text}\n{marks}"


def _values(result: EvaluationResult) -> list[str]:
    labels = [model.label for model in result.models]
    rows = []
    for row in value_table(result):
        name = f"**{row['title']}**" if row["headline"] else row["title"]
        rows.append([name, *(f"{part['value']} {part['interval']}".strip() for part in row["cells"])])
    said = "In brackets: 95% bootstrap intervals. " + correction(result)
    return ["## Values", "", *_table(["", *labels], rows), "", said.strip(), ""]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(map(cell, heads)) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    return lines + ["| " + " | ".join(map(cell, row)) + " |" for row in rows]


def _judging(judging: Judging) -> list[str]:
    lines = ["## People's votes", "", *(f"- {cell(rate.words)}" for rate in judging.win_rates), ""]
    for agreement in judging.agreements:
        kappa = "undefined" if agreement.kappa is None else f"{agreement.kappa:.2f}"
        said = f"{agreement.judge} and {agreement.other} agree with Cohen's kappa {kappa} on {agreement.shared} pairs."
        lines.append(f"- {cell(said)}")
    for label, (chance, low, high) in sorted(judging.strengths.items(), key=lambda item: -item[1][0]):
        said = f"{label} wins against an average model with chance {chance:.0%} (interval {low:.0%} to {high:.0%})."
        lines.append(f"- {cell(said)}")
    return [*lines, ""]


def _example(row: Example, labels: Sequence[str], word: str) -> list[str]:
    lines = [f"### {word} {row.number}", "", fence(row.prompt), ""]
    if row.reference is not None:
        lines += ["Reference:", "", fence(row.reference), ""]
    for label, said in zip(labels, row.cells, strict=True):
        answer = [] if said.answer is None else ["", fence(said.answer)]
        lines += [f"{cell(label)} ({cell(', '.join(said.notes)) or 'no score'}):", *answer, ""]
    return lines


def _subtitle(result: EvaluationResult) -> str:
    split = f", split {result.dataset['split']}" if result.dataset["split"] else ""
    return (
        f"{number_of(result.dataset['rows'], 'row')} of {cell(str(result.dataset['path']))}{split}. {result.created_at}"
    )

"""The rows of a result side by side: what each model answered, whether it is right, and which rows changed most."""

from __future__ import annotations

import math
from dataclasses import dataclass

from raytune_ft.evaluation.answers import fields
from raytune_ft.evaluation.config import EvaluationMetric
from raytune_ft.evaluation.results import STRICT_METRICS, Answer, EvaluationResult, leading_metric

MOST_ROWS_SHOWN = 2000
"""Rows whose answers stand in the page itself; beyond, a browser is no fit reader, and the answer files are."""
MOST_CHANGED = 5
"""Rows shown of those that changed most, for the better and for the worse."""


@dataclass(frozen=True)
class Cell:
    """One model's answer to a row."""

    answer: str | None
    notes: tuple[str, ...]
    right: bool | None
    """None where no metric calls an answer right."""


@dataclass(frozen=True)
class Example:
    """A row as people read it."""

    number: int
    prompt: str
    reference: str | None
    cells: tuple[Cell, ...]
    """One a model."""
    changed: bool
    """Whether the models' answers differ."""
    wrong: bool
    """Whether the last model's answer is wrong."""


@dataclass(frozen=True)
class Changed:
    """The rows that one model does better or worse than another."""

    model: str
    other: str
    metric: EvaluationMetric
    gained: tuple[Example, ...]
    lost: tuple[Example, ...]


def examples(result: EvaluationResult) -> list[Example]:
    """The first `MOST_ROWS_SHOWN` rows."""
    return [example(result, place) for place in range(min(MOST_ROWS_SHOWN, len(result.models[0].answers)))]


def example(result: EvaluationResult, place: int) -> Example:
    """One row; `place` counts from 0."""
    answers = [model.answers[place] for model in result.models]
    judge = leading_metric(result)
    cells = tuple(_cell(answer, judge if judge in STRICT_METRICS else None) for answer in answers)
    return Example(
        number=place + 1,
        prompt=answers[0].prompt,
        reference=answers[0].reference,
        cells=cells,
        changed=len({answer.answer for answer in answers}) > 1,
        wrong=cells[-1].right is False,
    )


def most_changed(result: EvaluationResult) -> Changed | None:
    """Where the last model gained and lost most against the first, by a row's own score; None without a difference."""
    if len(result.models) < 2:
        return None
    metric = leading_metric(result)
    first, last = result.models[0], result.models[-1]
    if any(metric not in answer.scores for model in (first, last) for answer in model.answers):
        return None
    sign = -1 if metric.facts.lower_is_better else 1
    gains = [
        sign * (own.scores[metric] - their.scores[metric])
        for own, their in zip(last.answers, first.answers, strict=True)
    ]
    gains = [0.0 if math.isnan(gain) else gain for gain in gains]
    order = sorted(range(len(gains)), key=lambda place: (-gains[place], place))
    gained = [place for place in order[:MOST_CHANGED] if gains[place] > 1e-9]
    lost = [place for place in reversed(order[-MOST_CHANGED:]) if gains[place] < -1e-9]
    if not gained and not lost:
        return None
    gained_rows, lost_rows = (tuple(example(result, place) for place in places) for places in (gained, lost))
    return Changed(last.label, first.label, metric, gained_rows, lost_rows)


def _cell(answer: Answer, judge: EvaluationMetric | None) -> Cell:
    notes = [f"{EvaluationMetric(name).facts.title} {score:.3g}" for name, score in answer.scores.items()]
    wanted, given = fields(answer.reference or ""), fields(answer.answer or "")
    if wanted and given and wanted != given:
        differing = [key for key in {**wanted, **given} if wanted.get(key) != given.get(key)]
        notes.append("differs in " + ", ".join(differing))
    if answer.finish_reason == "length":
        notes.append(f"cut off after {answer.answer_tokens} tokens")
    right = None
    if judge is not None and judge in answer.scores:
        right = answer.scores[judge] >= (judge.facts.best or 1.0) - 1e-9
    return Cell(answer.answer, tuple(notes), right)

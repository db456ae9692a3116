"""From kept rows to the answers that metrics read, and what is said of rows that have none."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

from raytune_ft.core import errors
from raytune_ft.core.errors import DataError, RunError
from raytune_ft.core.grammar import agreeing, number_of
from raytune_ft.core.records import Record
from raytune_ft.evaluation.kept import KeptRows, Row, is_answered
from raytune_ft.evaluation.results import Answer, on_disk
from raytune_ft.evaluation.rows import prompt_text, prompt_turns

_FIELDS = ("answer", "finish_reason", "answer_tokens", "nll", "tokens", "bytes", "windows", "choices")


@dataclass(frozen=True)
class Unanswered:
    """A row that a model has no answer for, and why."""

    label: str
    position: int
    reason: str
    fault: str = "RaytuneError"


def missing_of(records: Sequence[Record], kept: KeptRows, label: str) -> list[Unanswered]:
    """What a target has not answered of the records, in their order."""
    there, failed = kept.all_answered(label), kept.all_failed(label)
    missing = []
    for place, record in enumerate(records):
        if not is_answered(record, there.get(place)):
            row = failed.get(place, {})
            reason = row.get("error", "it came back without an answer")
            missing.append(Unanswered(label, place, reason, row.get("fault", "RaytuneError")))
    return missing


def answers_of(records: Sequence[Record], kept: KeptRows, label: str, left_out: Set[int]) -> Sequence[Answer]:
    """What a target did with each record, but for those at some places; all others are answered."""
    there = kept.all_answered(label)
    return on_disk(_answer(record, there[place]) for place, record in enumerate(records) if place not in left_out)


def refuse_missing(missing: Sequence[Unanswered], rows: int, most: int) -> None:
    """Stops where more rows than `most` lack an answer, or all do.

    Raises:
        DataError: if rows do not fit a model.
        RunError: if an endpoint failed.
    """
    positions = {row.position for row in missing}
    if not positions or (len(positions) <= most and len(positions) < rows):
        return
    if len(positions) < rows:
        further = f"max_unanswered: {len(positions)} goes on without them."
    else:
        further = "without any answer there is nothing to measure."
    first = min(missing, key=lambda row: row.position)
    labels = ", ".join(dict.fromkeys(row.label for row in missing))
    kind = DataError if getattr(errors, first.fault, None) is DataError else RunError
    raise kind(
        f"{len(positions)} of {number_of(rows, 'row')} {agreeing(len(positions), 'has', 'have')} no answer of "
        f"{labels}; the first is row {first.position + 1}: "
        f"{first.reason}. The others are kept: the same command asks for the missing ones only; {further}"
    )


def missing_notes(missing: Sequence[Unanswered]) -> list[str]:
    """How many rows each model has no answer for, and the first reason, in words for a report."""
    notes = []
    for label in dict.fromkeys(row.label for row in missing):
        own = [row for row in missing if row.label == label]
        notes.append(
            f"{number_of(len(own), 'row has', 'rows have')} no answer of {label}, left out of every value; the first "
            f"is row {own[0].position + 1}: {own[0].reason}"
        )
    return notes


def _answer(record: Record, row: Row) -> Answer:
    return Answer(
        id=record.id,
        prompt=prompt_text(record),
        reference=record.answer,
        metadata=dict(record.metadata),
        turns=prompt_turns(record),
        tools=record.tools,
        **{name: row[name] for name in _FIELDS if name in row},
    )

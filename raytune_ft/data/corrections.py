"""Corrections that a person made: a file of suspects (``suspects.jsonl``) with answers filled in, merged by row id."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import pyarrow as pa

from raytune_ft.core.errors import DataError
from raytune_ft.core.grammar import agreeing, number_of
from raytune_ft.core.manifest import Parent
from raytune_ft.core.records import Record
from raytune_ft.core.storage import Location, source_digest
from raytune_ft.data.json_text import JsonFault, parse
from raytune_ft.data.suspects import confirmed

CORRECTED = "corrected_from"
"""Metadata of a corrected row: the id that it had before."""
SPANS = "supervised_spans"
_SHOWN = 3


@dataclass(frozen=True)
class Correction:
    """What a row is to answer, what it answered when the file was written (None: not said), and where that stands."""

    corrected: str
    answer: str | None
    where: str


def read_corrections(path: str | None) -> dict[str, Correction]:
    """Row id -> correction; lines whose ``corrected`` is empty are passed over, since nobody has decided on them.

    Raises:
        DataError: with file and line, at a line that is no JSON object with ``id`` and ``corrected``, or that says of a
            row something else than an earlier line.
    """
    if path is None:
        return {}
    location = Location.at(path)
    if not location.is_file():
        raise DataError(f"corrections: {location}: there is no such file")
    found: dict[str, Correction] = {}
    # Not splitlines: a text inside a line may hold U+2028 and the like.
    for number, line in enumerate(location.read().decode("utf-8-sig", errors="replace").split("\n"), 1):
        if not line.strip():
            continue
        where = f"{location}:{number}"
        row_id, correction = _parsed(line, where)
        if correction is None:
            continue
        earlier = found.setdefault(row_id, correction)
        if earlier.corrected != correction.corrected:
            raise DataError(f"{where}: row {row_id} is corrected otherwise at {earlier.where}; leave one of them")
    return found


def _parsed(line: str, where: str) -> tuple[str, Correction | None]:
    try:
        values = parse(line)
    except JsonFault as fault:
        raise DataError(f"{where}: {fault}; each line is one row of suspects.jsonl") from None
    if not isinstance(values, dict) or not isinstance(values.get("id"), str) or "corrected" not in values:
        raise DataError(f"{where}: a correction needs the fields id and corrected")
    corrected, answer = values["corrected"], values.get("answer")
    if isinstance(corrected, dict | list):  # a JSON answer that was written without quotes
        corrected = json.dumps(corrected, ensure_ascii=False)
    if corrected is None or corrected == "":
        return values["id"], None
    if not isinstance(corrected, str):
        raise DataError(f"{where}: corrected must be text, the whole answer (got {corrected!r})")
    return values["id"], Correction(corrected, answer if isinstance(answer, str) else None, where)


def correct(record: Record, corrections: Mapping[str, Correction]) -> tuple[Record, str | None]:
    """The record with its answer corrected, and what was done: ``correction``, ``confirmation`` or None.

    A correction equal to the answer confirms it. The reference goes with the answer where it was taken from it.

    Raises:
        DataError: if the correction was made for another answer, or the record has no answer to correct.
    """
    correction = corrections.get(record.id) if corrections else None
    if correction is None:
        return record, None
    answer = record.answer
    if answer is None or record.chosen:
        raise DataError(f"{correction.where}: row {record.id} has no answer that could be corrected")
    if SPANS in record.metadata:
        raise DataError(
            f"{correction.where}: row {record.id} says which parts of its answer are trained ({SPANS}), which another "
            "answer would shift: correct it in its source"
        )
    if correction.answer is not None and correction.answer != answer:
        raise DataError(
            f"{correction.where}: row {record.id} answers {answer[:60]!r}, the line says {correction.answer[:60]!r}: "
            "write the right answer into corrected and leave answer as it was"
        )
    if correction.corrected == answer:
        return confirmed(record), "confirmation"
    metadata = {**record.metadata, CORRECTED: record.id}
    reference = _reference(record.reference, answer, correction.corrected)
    if record.messages and record.messages[-1].role == "assistant":
        last = record.messages[-1]
        turn = replace(last, content=correction.corrected)
        record = replace(record, messages=(*record.messages[:-1], turn))
    else:
        reference = correction.corrected
    return confirmed(replace(record, reference=reference, metadata=metadata)), "correction"


def _reference(reference: str | None, answer: str, corrected: str) -> str | None:
    """The reference that belongs to the corrected answer: the whole of it, or what stands behind its ``####``."""
    if reference == answer:
        return corrected
    _, sign, final = corrected.rpartition("####")
    was = answer.rpartition("####")[2].strip()
    return final.strip() if reference is not None and sign and was == reference else reference


def applied_ids(rows: pa.Table) -> pa.Table:
    """The ids that rows of the table had before they were corrected or confirmed, each once, in column `id`."""
    found = set()
    for row_id, text in zip(rows.column("id").to_pylist(), rows.column("metadata").to_pylist(), strict=True):
        if text and '"label_confirmed"' in text:
            found.add(json.loads(text).get(CORRECTED) or row_id)
    return pa.table({"id": pa.array(sorted(found), pa.string())})


def refuse_unknown(corrections: Mapping[str, Correction], applied: Iterable[str]) -> None:
    """Refuses corrections of rows that are not there.

    Raises:
        DataError: naming some of them.
    """
    missing = sorted(set(corrections) - set(applied))
    if missing:
        shown = ", ".join(f"{row_id} ({corrections[row_id].where})" for row_id in missing[:_SHOWN])
        raise DataError(
            f"corrections: {len(missing)} of {number_of(len(corrections), 'row')} "
            f"{agreeing(len(missing), 'is', 'are')} in no source: {shown}. Corrections belong to "
            "the sources and cleaning that the suspects were found with; remove these lines, or restore those settings."
        )


def correction_parents(path: str | None) -> list[Parent]:
    """The manifest's entry for a file of corrections."""
    return (
        [] if path is None else [Parent(role="corrections", where=str(Location.at(path)), digest=source_digest(path))]
    )

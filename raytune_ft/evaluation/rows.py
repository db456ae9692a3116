"""The rows to evaluate on: a split of a dataset artifact, or a JSONL or Parquet file of conversations."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass

from raytune_ft.core.artifacts import has_manifest, open_artifact
from raytune_ft.core.digest import short_hash
from raytune_ft.core.errors import DataError
from raytune_ft.core.grammar import number_of
from raytune_ft.core.manifest import CLAIM, ArtifactKind, Parent
from raytune_ft.core.records import Record
from raytune_ft.core.spool import Spool
from raytune_ft.core.storage import Location, source_digest
from raytune_ft.evaluation.folders import files_of_split, split_files
from raytune_ft.evaluation.record_files import records_in

logger = logging.getLogger("raytune_ft")


@dataclass(frozen=True)
class EvaluationRows:
    """Records in the order of their files, and where they come from."""

    records: Sequence[Record]
    """On disk: see `core.spool`."""
    split: str | None
    parent: Parent


def read_rows(dataset_path: str, split: str, max_rows: int | None = None) -> EvaluationRows:
    """The rows of a split; of a single file, all rows.

    Args:
        dataset_path: a dataset artifact, a folder with ``<split>.jsonl`` (or ``.parquet``), or a file of these kinds.
        split: which split of an artifact or a folder.
        max_rows: only the first so many.

    Raises:
        DataError: if there is no such file or split, it is empty, or a row is not a record (with file and line).
        ArtifactError: if the dataset is unfinished or damaged.
    """
    location = Location.at(dataset_path)
    if not location.exists():
        raise DataError(f"{location}: there is no such dataset")
    if has_manifest(location) or (location / CLAIM).exists():
        artifact = open_artifact(location, ArtifactKind.DATASET)
        files, parent = split_files(location, sorted(artifact.manifest.files), split), artifact.as_parent("dataset")
        taken: str | None = split
    elif location.is_file():
        files, taken = [location], None
        parent = Parent(role="dataset", where=str(location), digest=source_digest(location))
    else:
        files, taken = files_of_split(location, split), split
        parent = Parent(role="dataset", where=str(location), digest="-".join(source_digest(file) for file in files))
    where = f"{location}, split {taken}" if taken else str(location)
    records = _liked(files, where, max_rows)
    if not records:
        raise DataError(f"{where}: holds no rows, so there is nothing to evaluate on")
    return EvaluationRows(records, taken, parent)


def _liked(files: Sequence[Location], where: str, max_rows: int | None) -> Sequence[Record]:
    """The records that people did not dislike, the first `max_rows` of them; says how many were disliked."""
    disliked = 0

    def liked() -> Iterator[Record]:
        nonlocal disliked
        for record in itertools.chain.from_iterable(map(records_in, files)):
            if record.label is False:
                disliked += 1
            else:
                yield record

    records = Spool(itertools.islice(liked(), max_rows), Record.to_row, Record.from_row)
    if disliked:
        logger.warning(
            "%s: %s that people disliked: left out as no references",
            where,
            number_of(disliked, "row is an answer", "rows are answers"),
        )
    return records


def check_rows(
    rows: EvaluationRows, *, needs_answers: bool, needs_references: bool = True, needs_choices: bool = False
) -> None:
    """Refuses rows that cannot be measured: none may lack a reference, a prompt or choices, where they are needed.

    Raises:
        DataError: with how many rows lack what, and the first of them.
    """
    found: dict[str, list[int]] = {name: [0, 0] for name in _LACKS}  # how many rows, and which is the first
    for number, record in enumerate(rows.records, start=1):
        raw = record.text is not None and not record.messages
        silent = needs_references and not raw and not (record.answer or "").strip()
        calls = silent and bool(record.messages and record.messages[-1].tool_calls)
        lacks = {
            "question": needs_answers and raw,
            "reference": silent and not calls,
            "words": needs_answers and calls,
            "choices": needs_choices and not record.metadata.get("choices"),
            "prompt": (needs_answers or needs_choices) and not record.prompt,
        }
        for name in (name for name, lacking in lacks.items() if lacking):
            found[name] = [found[name][0] + 1, found[name][1] or number]
    for name, (count, first) in found.items():
        if count:
            total = len(rows.records)
            raise DataError(f"{rows.parent.where}: {count} of {total} rows (the first is row {first}) {_LACKS[name]}")


_LACKS = {
    "question": "are raw text, with no question and no answer; only perplexity can be measured on it",
    "reference": "have no reference: neither a last assistant message nor a `reference` says what the right answer is",
    "words": "end with a call of a tool and no text; only perplexity can be measured on it",
    "choices": "have no `choices`: give each row the answers to choose from, or leave the metrics of choices out",
    "prompt": "have no prompt: nothing comes before the answer",
}
"""What a row may lack, the gravest first, in words."""


def without(records: Sequence[Record], places: Set[int]) -> Sequence[Record]:
    """The records but for those at some places."""
    if not places:
        return records
    others = (record for place, record in enumerate(records) if place not in places)
    return Spool(others, Record.to_row, Record.from_row)


def prompt_text(record: Record) -> str:
    """The prompt for people: what the user says, with the roles named where there are several turns."""
    if not record.messages:
        return record.text or ""
    turns = [message for message in record.prompt if message.role != "system"]
    if len(turns) == 1:
        return turns[0].content
    return "\n".join(f"{message.role}: {message.content}" for message in turns)


def prompt_turns(record: Record) -> tuple[dict[str, str], ...]:
    """Roles, contents and tool calls of the prompt, where `prompt_text` does not show all of it; else nothing."""
    turns = [{key: value for key, value in vars(message).items() if value is not None} for message in record.prompt]
    return () if [turn["role"] for turn in turns] == ["user"] else tuple(turns)


def files_digest(files: Sequence[Location]) -> str:
    """What identifies the content of input files: their `source_digest`s, or, of more than 64, a hash over these."""
    digests = "-".join(source_digest(file) for file in files)
    return digests if len(files) <= 64 else short_hash(digests)

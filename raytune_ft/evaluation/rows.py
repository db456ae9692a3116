"""The rows to evaluate on: a split of a dataset artifact, or a JSONL or Parquet file of conversations."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from raytune_ft.core.artifacts import has_manifest, open_artifact
from raytune_ft.core.errors import DataError
from raytune_ft.core.manifest import CLAIM, ArtifactKind, Parent
from raytune_ft.core.records import ROLES, Message, Record
from raytune_ft.core.storage import Location, source_digest

logger = logging.getLogger("raytune_ft")

COLUMNS = ("messages", "text", "reference", "tools", "metadata", "choices", "label")
"""Columns of a file that a record is made of."""


@dataclass(frozen=True)
class EvaluationRows:
    """Records in the order of their files, and where they come from."""

    records: tuple[Record, ...]
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
        files, taken = split_files(location, list(location.files()), split), split
        parent = Parent(role="dataset", where=str(location), digest="-".join(source_digest(file) for file in files))
    records: list[Record] = []
    disliked = 0
    for file in files:
        found = _read(file)
        liked = [record for record in found if record.label is not False]
        disliked += len(found) - len(liked)
        records += liked
        if max_rows is not None and len(records) >= max_rows:
            break
    where = f"{location}, split {taken}" if taken else str(location)
    if disliked:
        logger.warning(
            "%s: %d rows are answers that people disliked: left out, since they are no references", where, disliked
        )
    if not records:
        raise DataError(f"{where}: holds no rows, so there is nothing to evaluate on")
    return EvaluationRows(tuple(records[:max_rows]), taken, parent)


def check_rows(
    rows: EvaluationRows, *, needs_answers: bool, needs_references: bool = True, needs_choices: bool = False
) -> None:
    """Refuses rows that cannot be measured: none may lack a reference, a prompt or choices, where they are needed.

    Raises:
        DataError: with how many rows lack what, and the first of them.
    """
    texts = [record.text is not None and not record.messages for record in rows.records]
    if needs_answers and any(texts):
        raise DataError(
            f"{rows.parent.where}: {_first(texts)} are raw text, with no question and no answer; only perplexity can "
            "be measured on it"
        )
    missing = [not text and not (record.answer or "").strip() for text, record in zip(texts, rows.records, strict=True)]
    if needs_references and any(missing):
        raise DataError(
            f"{rows.parent.where}: {_first(missing)} have no reference: neither a last assistant message nor a "
            "`reference` says what the right answer is"
        )
    unchosen = [needs_choices and not record.metadata.get("choices") for record in rows.records]
    if any(unchosen):
        raise DataError(
            f"{rows.parent.where}: {_first(unchosen)} have no `choices`: give each row the answers to choose from, or "
            "leave the metrics of choices out"
        )
    silent = [(needs_answers or needs_choices) and not record.prompt for record in rows.records]
    if any(silent):
        raise DataError(f"{rows.parent.where}: {_first(silent)} have no prompt: nothing comes before the answer")


def prompt_text(record: Record) -> str:
    """The prompt for people: what the user says, with the roles named where there are several turns."""
    if not record.messages:
        return record.text or ""
    turns = [message for message in record.prompt if message.role != "system"]
    if len(turns) == 1:
        return turns[0].content
    return "\n".join(f"{message.role}: {message.content}" for message in turns)


def prompt_turns(record: Record) -> tuple[dict[str, str], ...]:
    """Roles and contents of the prompt, where `prompt_text` does not show all of it; else nothing."""
    turns = [{"role": message.role, "content": message.content} for message in record.prompt]
    return () if [turn["role"] for turn in turns] == ["user"] else tuple(turns)


def _first(marks: Sequence[bool]) -> str:
    return f"{sum(marks)} of {len(marks)} rows (the first is row {list(marks).index(True) + 1})"


def split_files(folder: Location, names: Sequence[str], split: str) -> list[Location]:
    """The files of a split among the names in a folder.

    Raises:
        DataError: if there are none.
    """
    kept = [name for name in names if name.endswith((".parquet", ".jsonl"))]
    splits: dict[str, list[Location]] = {}
    for name in kept:
        top = name.partition("/")[0]
        splits.setdefault(top.rpartition(".")[0] if top == name else top, []).append(folder / name)
    splits.pop("rejected", None)
    if split not in splits:
        found = ", ".join(sorted(splits)) or "none"
        raise DataError(f"{folder}: has no split {split!r} (splits with rows: {found})")
    return splits[split]


def _read(file: Location) -> list[Record]:
    if file.name.endswith(".parquet"):
        return _read_parquet(file)
    if file.name.endswith(".jsonl"):
        lines = file.read().decode("utf-8", errors="replace").split("\n")
        return [_line(line, f"{file}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    raise DataError(
        f"{file}: expected a dataset folder or a .jsonl or .parquet file with a `messages` column; "
        "run `raytune-ft prepare` on other formats first"
    )


def _read_parquet(file: Location) -> list[Record]:
    try:
        with file.filesystem.open_input_file(file.path) as stream:
            parquet = pq.ParquetFile(stream)
            columns = [name for name in COLUMNS if name in parquet.schema_arrow.names]
            rows = parquet.read(columns=columns).to_pylist()
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read as Parquet ({error})") from None
    return [record_of(row, f"{file}, row {number}") for number, row in enumerate(rows, 1)]


def _line(line: str, where: str) -> Record:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: is not valid JSON ({error})") from None
    return record_of(row, where)


def record_of(row: Any, where: str) -> Record:
    """A row of a file as a record.

    Raises:
        DataError: naming `where` and what is wrong.
    """
    if not isinstance(row, dict) or not any(row.get(name) for name in ("messages", "text")):
        raise DataError(f"{where}: has neither `messages` nor `text`; run `raytune-ft prepare` on other formats first")
    text, reference, turns = row.get("text"), row.get("reference"), row.get("messages") or []
    for name, value in (("text", text), ("reference", reference)):
        if value is not None and not isinstance(value, str):
            raise DataError(f"{where}: `{name}` must be text (got {value!r})")
    if not isinstance(turns, list):
        raise DataError(f"{where}: `messages` must be a list of messages (got {turns!r})")
    messages = tuple(_message(turn, where) for turn in turns)
    tools, metadata = _json_text(row.get("tools")), _metadata(row.get("metadata"), where)
    if row.get("choices") is not None:
        metadata = {**metadata, "choices": _choices(row["choices"], where)}
    label = row["label"] if isinstance(row.get("label"), bool) else None  # other files have labels of other kinds
    return Record(messages=messages, text=text, label=label, reference=reference, tools=tools, metadata=metadata)


def _message(turn: Any, where: str) -> Message:
    wanted = f"{where}: a message needs a role ({', '.join(ROLES)}) and a content that is text"
    if not isinstance(turn, dict):
        raise DataError(f"{wanted} (got {turn!r})")
    calls = _json_text(turn.get("tool_calls"))
    content = "" if turn.get("content") is None and calls else turn.get("content")
    if turn.get("role") not in ROLES or not isinstance(content, str):
        raise DataError(f"{wanted} (got {turn!r})")
    return Message(turn["role"], content, calls)


def _metadata(value: Any, where: str) -> dict[str, Any]:
    """Of a row of ours JSON text, of others a mapping."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        found = value
    if found is not None and not isinstance(found, dict):
        raise DataError(f"{where}: `metadata` must be a mapping of fields (got {value!r:.60})")
    return found or {}


def _choices(value: Any, where: str) -> list[str]:
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(choice, str) for choice in value):
        raise DataError(f"{where}: `choices` must be a list of two texts or more (got {value!r:.60})")
    return value


def _json_text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)

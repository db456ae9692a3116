"""Rows of a dataset as training sees them: every token, and whether it is supervised; for a terminal and as HTML."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

import pyarrow as pa

from raytune_ft.core.artifacts import Artifact, open_artifact
from raytune_ft.core.errors import DataError
from raytune_ft.core.manifest import ArtifactKind
from raytune_ft.core.pages import template
from raytune_ft.core.row_files import rows_of
from raytune_ft.data.prepared import PreparedDataset
from raytune_ft.data.tokenize import chat_for, template_beside
from raytune_ft.models.chat import Chat

_COLUMNS = ("id", "source", "position", "metadata", "label", "input_ids", "supervised")
_REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class Piece:
    """One token, or the few that make up a character, as text."""

    text: str
    ids: tuple[int, ...]
    supervised: bool
    special: bool


@dataclass(frozen=True)
class Side:
    """The tokens of a row; `name` says which answer of a preference (empty for other rows)."""

    name: str
    pieces: tuple[Piece, ...]

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return sum(len(piece.ids) for piece in self.pieces)

    @property
    def supervised(self) -> int:
        """Number of supervised tokens."""
        return sum(len(piece.ids) for piece in self.pieces if piece.supervised)


@dataclass(frozen=True)
class InspectedRow:
    """A row of a split: where it came from, and its tokens."""

    number: int
    id: str
    origin: str
    notes: str
    sides: tuple[Side, ...]


def inspect_rows(dataset_path: str, *, rows: int, split: str = "train", model: str | None = None) -> list[InspectedRow]:
    """The first rows of a split of a prepared dataset.

    Args:
        dataset_path: a dataset artifact that was prepared for a model.
        rows: how many.
        split: which split.
        model: whose tokenizer shows them; by default that of the model which the dataset was prepared for.

    Raises:
        ArtifactError: if there is no such dataset.
        DataError: if it has no such split, or no tokens, or the tokenizer is another than the one they were made with.
    """
    dataset = open_artifact(dataset_path, ArtifactKind.DATASET)
    names = PreparedDataset(dataset).files
    if split not in names:
        raise DataError(f"{dataset.location}: has no split {split!r}; it has {', '.join(names) or 'none'}")
    chat = _chat(dataset, model)
    found = _first_rows(dataset, names[split], rows)
    return [_inspected(chat, number, row) for number, row in enumerate(found, start=1)]


def _chat(dataset: Artifact, model: str | None) -> Chat:
    fingerprint = dataset.numbers.get("chat_fingerprint")
    if fingerprint is None:
        raise DataError(
            f"{dataset.location}: was prepared without a model, so it has no tokens to show; set model_path and run "
            "prepare again"
        )
    parents = [parent.where for parent in dataset.manifest.parents if parent.role == "tokenizer"]
    model = model or next(iter(parents), None)
    if model is None:
        raise DataError(f"{dataset.location}: does not say for which model it was prepared; name it with --model")
    chat = chat_for(model, template_beside(dataset.location))
    if chat.fingerprint != fingerprint:
        raise DataError(
            f"{dataset.location}: its tokens were made with another tokenizer or chat template than {model} has; name "
            "the right model with --model"
        )
    return chat


def _first_rows(dataset: Artifact, names: Sequence[str], rows: int) -> Iterator[dict[str, Any]]:
    return islice((row for name in names for row, _ in rows_of(dataset / name, _shown)), rows)


def _shown(schema: pa.Schema) -> list[str]:
    return [name for name in schema.names if name.removeprefix("rejected_") in _COLUMNS]


def _inspected(chat: Chat, number: int, row: dict[str, Any]) -> InspectedRow:
    sides = [Side("", tuple(pieces(chat, row["input_ids"], row["supervised"])))]
    if row.get("rejected_input_ids") is not None:
        rejected = tuple(pieces(chat, row["rejected_input_ids"], row["rejected_supervised"]))
        sides = [Side("chosen", sides[0].pieces), Side("rejected", rejected)]
    label = "" if row["label"] is None else f"label {str(row['label']).lower()}"
    metadata = row["metadata"] if row["metadata"] not in {None, "{}"} else ""
    notes = " · ".join(part for part in (label, metadata) if part)
    return InspectedRow(number, row["id"], f"{row['source']}:{row['position'] + 1}", notes, tuple(sides))


def pieces(chat: Chat, ids: Sequence[int], supervised: Sequence[bool]) -> Iterator[Piece]:
    """The tokens as text; bytes that make up a character only together are one piece (if their masks agree)."""
    special = set(chat.tokenizer.all_special_ids)
    start = 0
    for end in range(1, len(ids) + 1):
        text = chat.tokenizer.decode(ids[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        unfinished = text.endswith(_REPLACEMENT) and end - start < 4
        if unfinished and end < len(ids) and supervised[end] == supervised[start] and ids[end] not in special:
            continue
        yield Piece(text, tuple(ids[start:end]), bool(supervised[start]), ids[start] in special)
        start = end


def print_rows(rows: Sequence[InspectedRow], console: Any) -> None:
    """Writes the rows to a rich console: supervised text green and underlined, special tokens bold."""
    from rich.text import Text

    for row in rows:
        console.print(
            Text(f"row {row.number}  {row.id}  {visible(row.origin)}  {visible(row.notes)}", style="bold cyan")
        )
        for side in row.sides:
            share = f"{side.supervised} of {side.tokens} tokens supervised"
            console.print(Text(f"{side.name + ': ' if side.name else ''}{share}", style="dim"))
            text = Text()
            for (kept, special), run in groupby(side.pieces, key=lambda piece: (piece.supervised, piece.special)):
                style = ("green underline" if kept else "dim") + (" bold" if special else "")
                text.append("".join(visible(piece.text) for piece in run), style=style)
            console.print(text)
        console.print()


def visible(text: str) -> str:
    """Text with control characters (a terminal would obey them) shown as symbols; newlines and tabs stay."""
    return "".join(
        char if char in "\n\t" or char.isprintable() else chr(0x2400 + ord(char)) if ord(char) < 32 else _REPLACEMENT
        for char in text
    )


def to_html(rows: Sequence[InspectedRow], *, title: str) -> str:
    """A page that needs nothing else: the rows with their masks in colour, every text escaped."""
    return str(template("data/inspection.html.j2").render(rows=rows, title=title))

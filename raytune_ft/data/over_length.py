"""Rows with more tokens than fit: cut, or split into records of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from raytune_ft.core.records import Message, Record
from raytune_ft.data.config import OverLength
from raytune_ft.models.chat import Chat, TokenRow

PIECE = "piece"
"""Metadata of a piece: its number and how many there are (``02/10``)."""
SPLIT_FROM = "split_from"
"""Metadata of a piece: the id of the record that was split."""


def truncated(row: TokenRow, max_length: int, side: OverLength, *, bos: int | None, cut: int | None = None) -> TokenRow:
    """The row without its last tokens, or without its first ones; a BOS in front stays there.

    Args:
        row: the tokens.
        max_length: most tokens that are left.
        side: `OverLength.TRUNCATE_LEFT` or `OverLength.TRUNCATE_RIGHT`.
        bos: id of the token that texts begin with, if any.
        cut: tokens to take away on the left, by default as many as are too many; the two answers of a preference lose
            the same, so that their prompts stay the same.
    """
    if side is OverLength.TRUNCATE_RIGHT:
        return TokenRow(row.ids[:max_length], row.supervised[:max_length])
    cut = max(0, len(row.ids) - max_length) if cut is None else cut
    kept = 1 if cut and bos is not None and row.ids[0] == bos else 0
    places = [*range(kept), *range(kept + cut, len(row.ids))]
    return TokenRow(row.ids[places], row.supervised[places])


def can_split(record: Record) -> bool:
    """Whether `split_record` would make more than one record of one that is too long."""
    if record.chosen or record.label is not None:
        return False  # the judgement is about the whole
    return not record.messages or sum(message.role == "user" for message in record.messages) > 1


def split_record(chat: Chat, record: Record, max_length: int) -> list[Record]:
    """The records that a record is split into, in order; the record alone where it cannot be split.

    A conversation is cut between exchanges, as many to a piece as fit, with its system turn before each; an exchange
    that does not fit is a piece that is still too long. A raw text is cut between tokens, never inside a character.
    """
    if not can_split(record):
        return [record]
    parts = list(_exchanges(chat, record, max_length) if record.messages else _texts(chat, record, max_length))
    if len(parts) == 1:
        return [record]
    width = len(str(len(parts)))
    last = len(parts)
    whole = {key: value for key, value in record.metadata.items() if key != "supervised_spans"}
    return [
        replace(
            part,
            reference=record.reference if number == last else None,
            metadata={
                **(record.metadata if number == last else whole),
                PIECE: f"{number:0{width}}/{last}",
                SPLIT_FROM: record.id,
            },
        )
        for number, part in enumerate(parts, start=1)
    ]


def ends_here(record: Record) -> bool:
    """Whether the end of the record's text is the end of the text it came from."""
    if SPLIT_FROM not in record.metadata:
        return True  # a source may have a column `piece` of its own
    number, _, last = str(record.metadata.get(PIECE, "1/1")).partition("/")
    return number == last


def _exchanges(chat: Chat, record: Record, max_length: int) -> Iterator[Record]:
    head = record.messages[:1] if record.messages[0].role == "system" else ()
    turns = record.messages[len(head) :]
    starts = [place for place, message in enumerate(turns) if message.role == "user"] or [0]
    starts[0] = 0
    exchanges = [turns[start:end] for start, end in zip(starts, [*starts[1:], len(turns)], strict=True)]
    piece: tuple[Message, ...] = ()
    for exchange in exchanges:
        if piece and _length(chat, record, (*head, *piece, *exchange)) > max_length:
            yield replace(record, messages=(*head, *piece))
            piece = ()
        piece = (*piece, *exchange)
    yield replace(record, messages=(*head, *piece))


def _length(chat: Chat, record: Record, messages: Sequence[Message]) -> int:
    text = chat.render(messages, tools=record.tools)
    return len(chat.tokenizer(text, add_special_tokens=False)["input_ids"])


def _texts(chat: Chat, record: Record, max_length: int) -> Iterator[Record]:
    text = record.text or ""
    begins = [begin for begin, _ in chat.text_offsets(text)]
    start = 0
    while start < len(begins):
        end = min(start + max_length, len(begins))
        while True:
            while start + 1 < end < len(begins) and begins[end] == begins[end - 1]:
                end -= 1  # a character of several tokens
            piece = text[begins[start] if start else 0 : begins[end] if end < len(begins) else len(text)]
            closed = end == len(begins) and ends_here(record)
            excess = len(chat.encode_text(piece, closed=closed).input_ids) - max_length
            if excess <= 0 or end - start <= 1:
                break
            end = max(start + 1, end - excess)  # room for the tokens that begin and end a text
        yield replace(record, text=piece)
        start = end

"""The record that all data stages share, as a row and as an Arrow schema.

A record is one conversation (or one raw text) with what belongs to it. Its `id` is the hash of its content, so the
same content has the same id in every source, split and report.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from raytune_ft.core.digest import short_hash

ROLES = ("system", "user", "assistant", "tool")
_SELDOM = ("tool_call_id", "name", "weight")
_BESIDE_CONTENT = ("tool_calls", *_SELDOM)

MESSAGE_TYPE = pa.struct(
    [
        ("role", pa.string()),
        ("content", pa.string()),
        ("tool_calls", pa.string()),
        ("tool_call_id", pa.string()),
        ("name", pa.string()),
        ("weight", pa.int8()),
    ]
)
"""As `Message`; what a message has none of is null. Datasets written before have its first three fields alone."""

RECORD_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("messages", pa.list_(MESSAGE_TYPE)),
        ("text", pa.string()),
        ("chosen", pa.list_(MESSAGE_TYPE)),
        ("rejected", pa.list_(MESSAGE_TYPE)),
        ("label", pa.bool_()),
        ("reference", pa.string()),
        ("tools", pa.string()),
        ("source", pa.string()),
        ("position", pa.int64()),
        ("metadata", pa.string()),
    ]
)
"""One row a record. `metadata` and `tools` are JSON text; `position` is the row's place in its source (from 0)."""

REJECTED_SCHEMA = RECORD_SCHEMA.append(pa.field("reason", pa.string())).append(pa.field("raw", pa.string()))
"""A row that was not used, why, and (where it could not be made a record) its raw text."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `tool_calls` is JSON text (the OpenAI list).

    `tool_call_id` and `name` say of a tool's turn which call it answers, and which tool it comes from. A `weight` of 0
    says of an assistant's turn that it does not count for the loss.
    """

    role: str
    content: str
    tool_calls: str | None = None
    tool_call_id: str | None = None
    name: str | None = None
    weight: int | None = None


@dataclass(frozen=True)
class Record:
    """One example: a conversation, or a raw text, or a preference between two continuations of `messages`."""

    messages: tuple[Message, ...] = ()
    text: str | None = None
    chosen: tuple[Message, ...] = ()
    rejected: tuple[Message, ...] = ()
    label: bool | None = None
    reference: str | None = None
    tools: str | None = None
    source: str = ""
    position: int = 0
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """16 hex digits of the sha256 of the content (source, position and metadata do not count)."""
        content = [
            [_identity(m) for m in self.messages],
            self.text,
            [_identity(m) for m in self.chosen],
            [_identity(m) for m in self.rejected],
            self.label,
            self.reference,
            self.tools,
        ]
        return short_hash(json.dumps(content, ensure_ascii=False))

    def to_row(self) -> dict[str, Any]:
        """The record as a row of `RECORD_SCHEMA`."""
        return {
            "id": self.id,
            "messages": [dict(vars(m)) for m in self.messages],
            "text": self.text,
            "chosen": [dict(vars(m)) for m in self.chosen],
            "rejected": [dict(vars(m)) for m in self.rejected],
            "label": self.label,
            "reference": self.reference,
            "tools": self.tools,
            "source": self.source,
            "position": self.position,
            "metadata": json.dumps(dict(self.metadata), ensure_ascii=False, sort_keys=True),
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Record:
        """The record in a row of `RECORD_SCHEMA`; other columns are passed over."""
        return cls(
            messages=_messages(row.get("messages")),
            text=row.get("text"),
            chosen=_messages(row.get("chosen")),
            rejected=_messages(row.get("rejected")),
            label=row.get("label"),
            reference=row.get("reference"),
            tools=row.get("tools"),
            source=row.get("source") or "",
            position=row.get("position") or 0,
            metadata=json.loads(row.get("metadata") or "{}"),
        )

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The conversation up to, and without, the last assistant turn."""
        return self.messages[:-1] if self.messages and self.messages[-1].role == "assistant" else self.messages

    @property
    def answer(self) -> str | None:
        """What the last assistant turn says, or the reference; None where there is neither."""
        if self.messages and self.messages[-1].role == "assistant":
            return self.messages[-1].content
        return self.reference


def records_to_table(records: Sequence[Record]) -> pa.Table:
    """A table of `RECORD_SCHEMA`, one row a record, in order."""
    return pa.Table.from_pylist([record.to_row() for record in records], schema=RECORD_SCHEMA)


def table_to_records(table: pa.Table) -> list[Record]:
    """The records in a table that has the columns of `RECORD_SCHEMA`."""
    return [Record.from_row(row) for row in table.to_pylist()]


def plain_metadata(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields as JSON has them: dates as text, and NaN, by which tables say that there is no number, as null.

    Raises:
        ValueError: if a number among them is infinite, which JSON cannot say.
    """
    plain: dict[str, Any] = json.loads(json.dumps(fields, default=str), parse_constant=_null_or_fault)
    return plain


def _null_or_fault(constant: str) -> None:
    if constant != "NaN":
        raise ValueError(f"a number that JSON cannot say: {constant}")


def _messages(value: Any) -> tuple[Message, ...]:
    return tuple(Message(m["role"], m["content"], *(m.get(name) for name in _BESIDE_CONTENT)) for m in value or ())


def _identity(message: Message) -> dict[str, Any]:
    """What of a message counts for its record's id; a field that says nothing does not."""
    return {name: value for name, value in vars(message).items() if value is not None or name not in _SELDOM}

"""Cleaning of one record: mends its texts, then says why it cannot be used, if it cannot.

Reasons start with a short name and a colon where details follow, so that they can be counted by name.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from raytune_ft.core.records import Message, Record
from raytune_ft.data.config import DataCollectionConfig

_CONTROLS = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\ufeff]")


def clean(record: Record, config: DataCollectionConfig) -> tuple[Record, str | None]:
    """The record with its texts mended, and the reason why it is rejected (None: it is not)."""
    mended = mend(record, _menders(config.fix_encoding, config.remove_control_characters, config.strip_whitespace))
    return mended, wrong_roles(mended) or (empty(mended) if config.drop_empty else None)


def mend(record: Record, menders: Sequence[Callable[[str], str]]) -> Record:
    """The record with every text passed through `menders`, in order."""

    def text(value: str) -> str:
        for mender in menders:
            value = mender(value)
        return value

    def turns(messages: tuple[Message, ...]) -> tuple[Message, ...]:
        mended = tuple(replace(m, content=text(m.content)) for m in messages)
        return mended[1:] if mended and mended[0].role == "system" and not mended[0].content else mended

    return replace(
        record,
        messages=turns(record.messages),
        chosen=turns(record.chosen),
        rejected=turns(record.rejected),
        text=(text(record.text) or None) if record.text is not None else None,
        reference=(text(record.reference) or None) if record.reference is not None else None,
    )


@functools.cache
def _menders(encoding: bool, controls: bool, whitespace: bool) -> tuple[Callable[[str], str], ...]:
    wanted: list[tuple[bool, Callable[[str], str]]] = [
        (encoding, fix_encoding),
        (controls, remove_control_characters),
        (whitespace, str.strip),
    ]
    return tuple(mender for switch, mender in wanted if switch)


def fix_encoding(text: str) -> str:
    """Text with mojibake repaired and Unicode in NFC (ftfy); quotes, width and HTML entities stay as they are."""
    return text if text.isascii() else _ftfy()(text)


@functools.cache
def _ftfy() -> Callable[[str], str]:
    import ftfy

    config = ftfy.TextFixerConfig(
        unescape_html=False,
        uncurl_quotes=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        fix_line_breaks=False,
        remove_control_chars=False,
        remove_terminal_escapes=False,
        explain=False,
    )
    return functools.partial(ftfy.fix_text, config=config)


def remove_control_characters(text: str) -> str:
    """Text without control characters and terminal escapes; every kind of line end becomes a newline, tabs stay."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\u2028", "\n").replace("\u2029", "\n")
    return _CONTROLS.sub("", text)


def wrong_roles(record: Record) -> str | None:
    """Why the turns of a record are in no order that a chat can have; None if they are.

    After an optional system turn, user and assistant alternate, tools answer assistants, and the last turn is the
    assistant's (in a preference: the user's or a tool's, and both continuations are the assistant's).
    """
    if not record.messages:
        return None if record.text is not None or not record.chosen else "role order: no prompt"
    fault = _first_fault(record.messages)
    if fault:
        return f"role order: {fault}"
    last = record.messages[-1].role
    if record.chosen or record.rejected:
        if last not in {"user", "tool"}:
            return f"role order: the prompt of a preference ends with {last}"
        for name, side in (("chosen", record.chosen), ("rejected", record.rejected)):
            if not side or side[0].role != "assistant" or side[-1].role != "assistant":
                return f"role order: {name} is not the assistant's"
    elif last != "assistant" and record.reference is None:
        return f"role order: the last turn is {last}'s"
    return None


_MAY_FOLLOW = {
    None: {"system", "user"},
    "system": {"user"},
    "user": {"assistant"},
    "assistant": {"user", "tool", "assistant"},
    "tool": {"assistant", "tool"},
}


def _first_fault(messages: Sequence[Message]) -> str | None:
    before: Message | None = None
    for message in messages:
        role = before.role if before else None
        if message.role not in _MAY_FOLLOW[role]:
            return f"{message.role} follows {role}" if role else f"{message.role} comes first"
        # A call is a turn of its own in some sources, so an assistant may speak and then call.
        if role == "assistant" and message.role == "assistant" and not message.tool_calls:
            return "assistant follows assistant"
        if role == "assistant" and message.role == "tool" and before and not before.tool_calls:
            return "tool follows an assistant that called none"
        before = message
    return None


def empty(record: Record) -> str | None:
    """Which part of a record says nothing; None if all say something."""
    if record.chosen or record.rejected:
        if not all(_speaks(message) for message in record.chosen + record.rejected):
            return "empty answer"
        if record.chosen == record.rejected:
            return "same answers: chosen and rejected do not differ"
    if not record.messages:
        return None if record.text else "empty text"
    for message in record.messages:
        if not _speaks(message):
            return "empty answer" if message.role == "assistant" else "empty prompt"
    return None


def _speaks(message: Message) -> bool:
    return bool(message.content.strip() or message.tool_calls or message.role == "tool")

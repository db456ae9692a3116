"""Cleaning of one record: mends its texts, then says why it cannot be used, if it cannot.

Reasons start with a short name and a colon where details follow, so that they can be counted by name.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from raytune_ft.core.records import Message, Record
from raytune_ft.data.config import DataCollectionConfig, Measure, PersonalData
from raytune_ft.data.language import foreign
from raytune_ft.data.mending import STEPS
from raytune_ft.data.redaction import redact_text, redact_value
from raytune_ft.data.refusals import refuses
from raytune_ft.data.rows import UNANSWERED
from raytune_ft.data.tool_calls import unbalanced_tool_calls


@dataclass(frozen=True)
class Cleaned:
    """A record after cleaning, why it is rejected (None: it is not), and what was done to it.

    `changed` are the steps that changed a text of it, `redacted` counts replacements by kind, `undecided` are the
    checks that could not tell.
    """

    record: Record
    reason: str | None = None
    changed: tuple[str, ...] = ()
    redacted: Mapping[str, int] = field(default_factory=dict)
    undecided: tuple[str, ...] = ()

    @property
    def notes(self) -> str | None:
        """What was done to it as JSON text, so that equal notes are equal texts; None where nothing was."""
        named = {"changed": self.changed, "redacted": dict(self.redacted), "undecided": self.undecided}
        said = {name: value for name, value in named.items() if value}
        return json.dumps(said, sort_keys=True) if said else None


def clean(record: Record, config: DataCollectionConfig) -> Cleaned:
    """The record with its texts mended and personal data replaced, and the first reason to reject it, if any."""
    mended, changed = mend(record, _menders(config))
    redacted: Counter[str] = Counter()
    if config.redact:
        mended = redact_record(mended, config.redact, redacted)
    reason = _reason(mended, config)
    undecided = False
    if reason is None and config.languages:
        reason, undecided = foreign(mended, config.languages)
    return Cleaned(mended, reason, changed, redacted, ("language",) if undecided else ())


def _reason(record: Record, config: DataCollectionConfig) -> str | None:
    return (
        (unbalanced_tool_calls(record) if config.drop_unbalanced_tool_calls else None)
        or wrong_roles(record, may_ask=config.unanswered == "keep")
        or (empty(record) if config.drop_empty else None)
        or same_answers(record)
        or (out_of_bounds(record, config.length_bounds) if config.length_bounds else None)
        or (refuses(record) if config.drop_refusals else None)
    )


def mend(record: Record, menders: Mapping[str, Callable[[str], str]]) -> tuple[Record, tuple[str, ...]]:
    """The record with every text passed through `menders` in order, and the names of those that changed one."""
    changed: dict[str, None] = {}

    def text(value: str) -> str:
        for name, mender in menders.items():
            before = value
            value = mender(value)
            if value != before:
                changed[name] = None
        return value

    def turns(messages: tuple[Message, ...]) -> tuple[Message, ...]:
        mended = tuple(replace(m, content=text(m.content)) for m in messages)
        return mended[1:] if mended and mended[0].role == "system" and not mended[0].content else mended

    mended = replace(
        record,
        messages=turns(record.messages),
        chosen=turns(record.chosen),
        rejected=turns(record.rejected),
        text=(text(record.text) or None) if record.text is not None else None,
        reference=(text(record.reference) or None) if record.reference is not None else None,
    )
    return mended, tuple(changed)


def _menders(config: DataCollectionConfig) -> dict[str, Callable[[str], str]]:
    return {name: mender for name, mender in STEPS.items() if getattr(config, name)}


def redact_record(record: Record, kinds: Sequence[PersonalData], found: Counter[str]) -> Record:
    """The record with personal data replaced in every text, tool call, tool and metadata; counts go to `found`."""

    def text(value: str | None) -> str | None:
        return value and redact_text(value, kinds, found)

    def turns(messages: tuple[Message, ...]) -> tuple[Message, ...]:
        return tuple(
            replace(m, content=text(m.content) or "", tool_calls=text(m.tool_calls), name=text(m.name))
            for m in messages
        )

    return replace(
        record,
        messages=turns(record.messages),
        chosen=turns(record.chosen),
        rejected=turns(record.rejected),
        text=text(record.text),
        reference=text(record.reference),
        tools=text(record.tools),
        metadata=redact_value(dict(record.metadata), kinds, found),
    )


def wrong_roles(record: Record, *, may_ask: bool = False) -> str | None:
    """Why the turns of a record are in no order that a chat can have; None if they are.

    After an optional system turn, user and assistant alternate, tools answer assistants, and the last turn is the
    assistant's (in a preference: the user's or a tool's, and both continuations are the assistant's). Without an answer
    a record has a reference, or `may_ask` lets it end with what is asked.
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
    elif last == "system" or (last != "assistant" and record.reference is None and not may_ask):
        return f"{'role order' if last == 'system' else UNANSWERED}: the last turn is {last}'s"
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
    if not all(_speaks(message) for message in record.chosen + record.rejected):
        return "empty answer"
    if not record.messages:
        return None if record.text else "empty text"
    for message in record.messages:
        if not _speaks(message):
            return "empty answer" if message.role == "assistant" else "empty prompt"
    return None


def same_answers(record: Record) -> str | None:
    """Why a preference prefers nothing; None if it does, or is none."""
    if record.chosen and record.chosen == record.rejected:
        return "same answers: chosen and rejected do not differ"
    return None


def _speaks(message: Message) -> bool:
    return bool(message.content.strip() or message.tool_calls or message.role == "tool")


def out_of_bounds(record: Record, bounds: Mapping[Measure, tuple[int | None, int | None]]) -> str | None:
    """Which of `bounds` a record does not keep; None if it keeps all. Both sides of a preference must keep them."""
    for measure, (least, most) in bounds.items():
        for length in _lengths(record, measure):
            if least is not None and length < least:
                return f"too few {measure}: {length}, at least {least}"
            if most is not None and length > most:
                return f"too many {measure}: {length}, at most {most}"
    return None


def _lengths(record: Record, measure: Measure) -> list[int]:
    part, _, unit = measure.rpartition("_")
    sides = [side for side in (record.chosen, record.rejected) if side]
    prompt = record.messages if sides else record.prompt
    answers = sides or ([record.messages[-1:]] if len(prompt) < len(record.messages) else [])
    if record.text is not None:
        texts = [] if part else [[record.text]]
    elif part == "prompt":
        texts = [[m.content for m in prompt]]
    elif part == "answer":
        texts = [[m.content for m in answer] for answer in answers]
    else:
        texts = [[m.content for m in (*prompt, *answer)] for answer in answers or [()]]
    count = len if unit == "characters" else _words
    return [sum(map(count, text)) for text in texts]


def _words(text: str) -> int:
    return len(text.split())

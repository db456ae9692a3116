"""Rows of the usual data formats to records: which format a row has is told from its columns, with the reason."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from raytune_ft.core.records import Message, Record, plain_metadata
from raytune_ft.data.config import RecordFormat
from raytune_ft.data.conversations import (
    Columns,
    FormatFault,
    asked,
    continuation,
    conversation,
    decoded,
    text_of,
    tools_of,
    with_system,
)  # fmt: skip
from raytune_ft.data.feedback import JUDGEMENTS, NothingToLearnError, feedback_fields, is_feedback

__all__ = [
    "FormatFault", "NothingToLearnError", "detect", "format_of", "format_of_row", "only_metadata", "passed_over",
    "renamed", "to_record",
]  # fmt: skip

_BASES: dict[RecordFormat, tuple[str, str | None]] = {
    RecordFormat.MESSAGES: ("messages", None),
    RecordFormat.SHAREGPT: ("conversations", None),
    RecordFormat.ALPACA: ("instruction", "output"),
    RecordFormat.PROMPT_COMPLETION: ("prompt", "completion"),
    RecordFormat.QUESTION_ANSWER: ("question", "answer"),
    RecordFormat.TEXT: ("text", None),
}
"""Column that asks (or holds all), and column that answers."""
_PROMPTS = ("prompt", "question", "instruction")
_PREFERENCE_PROMPTS = ("prompt", "messages", "conversations", "question", "instruction")
"""In the order in which a preference takes its prompt."""
_RECORD_COLUMNS = frozenset({"id", "messages", "text", "chosen", "rejected", "source", "position", "metadata"})
_DERIVED = frozenset({"id", "source", "position", "input_ids", "supervised"})
"""Columns of our own datasets that are worked out anew."""
_BESIDE_A_PROMPT = frozenset({"input", "system", "tools", "id", "metadata"})
"""Columns that a prompt alone may have beside it; with others, one of these may be an answer under another name."""
_FINAL_ANSWER = re.compile(r"\n####\s*(\S[^\n]*?)\s*\Z")


def detect(columns: Collection[str]) -> tuple[RecordFormat, str]:
    """The format that a row with these columns has, and the reason in words.

    Raises:
        FormatFault: if no format fits, or more than one does; names the columns found.
    """
    present = set(columns)
    if present >= _RECORD_COLUMNS:
        return RecordFormat.RECORD, "the columns of our own records"
    fitting = [
        base for base, (ask, answer) in _BASES.items() if ask in present and (answer is None or answer in present)
    ]
    if {"chosen", "rejected"} <= present:
        prompts = [name for name in _PREFERENCE_PROMPTS if name in present]
        if len(prompts) > 1:
            raise FormatFault(
                f"ambiguous columns: {_listed(columns)}; each of {', '.join(prompts)} could be the prompt of "
                f"'chosen' and 'rejected'; input_format: preference takes {prompts[0]} and keeps the rest as metadata"
            )
        return RecordFormat.PREFERENCE, "columns 'chosen' and 'rejected'"
    if is_feedback(present):
        _refuse_ambiguous([RecordFormat.FEEDBACK, *(b for b in fitting if b is not RecordFormat.MESSAGES)], columns)
        judged = sorted(present & {"rating", "correction", "preferred"})
        return RecordFormat.FEEDBACK, f"column {judged[0]!r} beside an answer"
    unanswered = None if fitting else _unanswered(present)
    if unanswered is not None:
        return unanswered
    _refuse_ambiguous(fitting, columns)
    if not fitting:
        raise FormatFault(_unknown(columns))
    names = " and ".join(repr(name) for name in _BASES[fitting[0]] if name)
    if "label" in present and fitting[0] is not RecordFormat.TEXT:
        return RecordFormat.KTO, f"column 'label' beside {names}"
    return fitting[0], f"column{'s' if 'and' in names else ''} {names}"


def _unanswered(present: Collection[str]) -> tuple[RecordFormat, str] | None:
    """The format of a row with columns of which none answers, and the reason; None if none of them asks either."""
    asking = [name for name in _PROMPTS if name in present]
    if "reference" in present and asking:
        _refuse_several(asking, present)
        return RecordFormat.PROMPT_REFERENCE, f"columns {asking[0]!r} and 'reference', and no answer"
    if len(asking) == 1 and set(present) <= {asking[0], *_BESIDE_A_PROMPT}:
        return RecordFormat.PROMPT, f"column {asking[0]!r} alone"
    return None


def format_of(columns: Collection[str], stated: RecordFormat | None) -> tuple[RecordFormat, str]:
    """The stated format where its column is there, else the one that `detect` tells.

    Raises:
        FormatFault: as `detect`, or if the stated format's column is missing.
    """
    if stated is None:
        return detect(columns)
    wanted = _TELLING.get(stated) or (_BASES[stated][0],)
    if not any(name in columns for name in wanted):
        names = " or ".join(map(repr, wanted))
        raise FormatFault(f"unknown columns: {_listed(columns)}; input_format {stated} needs a column {names}")
    return stated, "stated in input_format"


def format_of_row(values: Mapping[str, Any], stated: RecordFormat | None) -> tuple[RecordFormat, str]:
    """The format of a row: of those columns that are not null or empty, or where these tell none, of all.

    Files with rows of several formats (Parquet above all) have the columns of all in each row, most of them null. A
    prompt beside the empty column of its answer is no prompt alone.

    Raises:
        FormatFault: as `format_of`, about all columns.
    """
    if stated is not None or values.keys() >= _RECORD_COLUMNS:
        return format_of(values.keys(), stated)
    filled = {
        name for name, value in values.items() if value is not None and value not in ("", []) and not _is_nan(value)
    }
    if len(filled) == len(values):
        return detect(values)
    told = _detected(filled | _halves(filled, values))
    whole = _detected(values)
    if told is None or (told[0] is RecordFormat.PROMPT and whole is not None and whole[0] in _BASES):
        told = whole or told or _detected(filled)
    return told or detect(values)


def _is_nan(value: Any) -> bool:
    """Whether a value is how tables of numbers write that there is none."""
    return isinstance(value, float) and value != value  # noqa: PLR0124 - only NaN is not itself


def _detected(columns: Collection[str]) -> tuple[RecordFormat, str] | None:
    try:
        return detect(columns)
    except FormatFault:
        return None


def _halves(filled: Collection[str], present: Collection[str]) -> set[str]:
    """Columns that belong to a row though nothing is in them: the other side of a pair, the judgement of an answer."""
    wanted = set(JUDGEMENTS) if "response" in filled else set()
    if "chosen" in filled or "preferred" in filled:
        wanted.add("rejected")
    elif "rejected" in filled:
        wanted |= {"chosen", "preferred"}
    return wanted & set(present)


_TELLING: dict[RecordFormat, tuple[str, ...]] = {
    RecordFormat.PREFERENCE: ("chosen",),
    RecordFormat.KTO: ("label",),
    RecordFormat.RECORD: ("messages",),
    RecordFormat.PROMPT_REFERENCE: _PROMPTS,
    RecordFormat.PROMPT: _PROMPTS,
    RecordFormat.FEEDBACK: ("rating", "correction", "preferred"),
}


def renamed(values: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """`values` with the columns named in `columns` (standard name -> name here) under their standard names."""
    theirs = {name: standard for standard, name in columns.items() if name in values}
    if not theirs:
        return values
    kept = {f"{key} (source)" if key in theirs.values() else key: v for key, v in values.items() if key not in theirs}
    return {**kept, **{standard: values[name] for name, standard in theirs.items()}}


def _refuse_ambiguous(fitting: Collection[RecordFormat], columns: Collection[str]) -> None:
    if len(fitting) > 1:
        raise FormatFault(
            f"ambiguous columns: {_listed(columns)} fit {' and '.join(fitting)}; say which with `input_format`"
        )


def _refuse_several(asking: Collection[str], columns: Collection[str]) -> None:
    if len(asking) > 1:
        raise FormatFault(
            f"ambiguous columns: {_listed(columns)}; each of {', '.join(asking)} could be the prompt; say which with "
            "`columns` (for example question: <name>), or leave the others out"
        )


def _unknown(columns: Collection[str]) -> str:
    lacking = next((answer for ask, answer in _BASES.values() if answer and ask in columns), "prompt")
    meant = next((name for name in sorted(map(str, columns)) if name not in {*_PROMPTS, "label"}), "question")
    return (
        f"unknown columns: {_listed(columns)}; name them with `columns` (for example {lacking}: {meant}) or "
        "rename them; known are messages, conversations, instruction+output, prompt+completion, question+answer, "
        "text, chosen+rejected, prompt+reference, response+rating"
    )


def _listed(columns: Collection[str]) -> str:
    return ", ".join(sorted(map(str, columns))) or "none"


def to_record(values: Mapping[str, Any], kind: RecordFormat, *, source: str, position: int) -> Record:
    """The record that a row of format `kind` says; what the format does not use becomes metadata.

    Raises:
        FormatFault: if a column is missing or holds something else than the format wants.
        NothingToLearnError: if a feedback row has no judgement.
    """
    values = {name: None if _is_nan(value) else value for name, value in values.items()}
    take = Columns(values)
    fields = _CONVERTERS[kind](take)
    known: dict[str, Any] = {"source": source, "position": position}
    if kind is RecordFormat.RECORD:
        take.taken |= _DERIVED
    else:
        known["reference"] = _reference(take)
        known["tools"] = tools_of(take("tools"))
    extra = {key: value for key, value in values.items() if key not in take.taken and value is not None} | take.spare
    try:
        metadata = plain_metadata(fields.pop("metadata", {}) | extra)
    except ValueError as error:
        raise FormatFault(f"wrong value in the metadata: {error}") from None
    return Record(**{**known, **fields}, metadata=metadata)


def only_metadata(values: Mapping[str, Any], record: Record) -> list[str]:
    """The columns of a row that its record has as metadata alone, sorted."""
    return sorted(name for name in values.keys() & record.metadata.keys() if name not in _RECORD_COLUMNS)


def passed_over(columns: Collection[str], kind: RecordFormat) -> str | None:
    """Which of the columns beside a raw text would ask, answer or judge in another format; None: none would."""
    said = {name for names in _BASES.values() for name in names} | JUDGEMENTS | {"label", "response"}
    return next((name for name in sorted(columns) if name in said), None) if kind is RecordFormat.TEXT else None


def _messages_fields(take: Columns) -> dict[str, Any]:
    return {"messages": with_system(take, conversation(take, "messages"))}


def _sharegpt_fields(take: Columns) -> dict[str, Any]:
    return {"messages": with_system(take, conversation(take, "conversations"))}


def _alpaca_fields(take: Columns) -> dict[str, Any]:
    turns = []
    history = decoded(take("history") or "[]")
    for pair in history if isinstance(history, list | tuple) else [history]:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise FormatFault(f"wrong type in 'history': expected pairs of instruction and answer, found {pair!r:.40}")
        turns += [Message("user", text_of(pair[0], "history")), Message("assistant", text_of(pair[1], "history"))]
    return {"messages": with_system(take, (*turns, _instruction(take), *continuation(take, "output")))}


def _instruction(take: Columns) -> Message:
    parts = [text_of(take("instruction"), "instruction"), text_of(take("input"), "input")]
    return Message("user", "\n\n".join(part for part in parts if part))


def _prompt_fields(take: Columns) -> dict[str, Any]:
    return {"messages": with_system(take, (*asked(take, "prompt"), *continuation(take, "completion")))}


def _question_fields(take: Columns) -> dict[str, Any]:
    fields: dict[str, Any] = {"messages": with_system(take, (*asked(take, "question"), *continuation(take, "answer")))}
    final = _FINAL_ANSWER.search(fields["messages"][-1].content)
    if final and take.see("reference") is None:
        fields["reference"] = final[1]
    return fields


def _text_fields(take: Columns) -> dict[str, Any]:
    return {"text": text_of(take("text"), "text") or None}


def _prompt_reference_fields(take: Columns) -> dict[str, Any]:
    fields = _prompt_alone_fields(take)
    reference = _reference(take)
    if reference is None:
        raise FormatFault("no reference: a prompt without an answer needs one, in column 'reference'")
    return {**fields, "reference": reference}


def _prompt_alone_fields(take: Columns) -> dict[str, Any]:
    name = next((name for name in _PROMPTS if take.see(name) is not None), None)
    if name is None:
        raise FormatFault(f"no prompt: none of the columns {', '.join(_PROMPTS)} holds one")
    return {"messages": with_system(take, (_instruction(take),) if name == "instruction" else asked(take, name))}


def _reference(take: Columns) -> str | None:
    """The text of column ``reference``; a number is an answer as good as its digits."""
    value = take("reference")
    if isinstance(value, int | float) and not isinstance(value, bool):
        return json.dumps(value)
    return text_of(value, "reference") or None


def _preference_fields(take: Columns) -> dict[str, Any]:
    prompt: tuple[Message, ...] = ()
    for name in _PREFERENCE_PROMPTS:
        if not prompt and take.see(name) not in (None, ""):
            prompt = (_instruction(take),) if name == "instruction" else asked(take, name)
    chosen, rejected = continuation(take, "chosen"), continuation(take, "rejected")
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1  # an implicit prompt: both sides repeat the conversation and differ in the last turn
    if not prompt or chosen[:shared] == prompt:
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if not prompt:
        raise FormatFault("no prompt: neither a column with it nor turns that chosen and rejected share")
    return {"messages": with_system(take, prompt), "chosen": chosen, "rejected": rejected}


def _kto_fields(take: Columns) -> dict[str, Any]:
    label = take("label")
    if isinstance(label, str) and label.lower() in {"true", "false"}:
        label = label.lower() == "true"
    if not isinstance(label, bool):
        raise FormatFault(
            f"wrong type in 'label': expected true or false, found {label!r:.40}; if it is no judgement of the answer, "
            "state the `input_format` without it, and it is kept as metadata"
        )
    for base, (ask, answer) in _BASES.items():
        answered = answer is None or take.see(answer) is not None
        if base is not RecordFormat.TEXT and take.see(ask) is not None and answered:
            return {**_CONVERTERS[base](take), "label": label}
    raise FormatFault("no conversation beside 'label'")


def _record_fields(take: Columns) -> dict[str, Any]:
    sides = {name: conversation(take, name, take(name) or ()) for name in ("messages", "chosen", "rejected")}
    texts = {name: text_of(take(name), name) or None for name in ("text", "reference", "tools")}
    texts["tools"] = tools_of(texts["tools"])
    label, metadata = take("label"), decoded(take("metadata") or "{}")
    label = decoded(None if label == "" else label)
    if not isinstance(label, bool | None):
        raise FormatFault(f"wrong type in 'label': expected true or false, found {label!r:.40}")
    if not isinstance(metadata, Mapping):
        raise FormatFault(f"wrong type in 'metadata': expected an object, found {metadata!r:.40}")
    return {**sides, **texts, "label": label, "metadata": dict(metadata)}


_CONVERTERS: dict[RecordFormat, Callable[[Columns], dict[str, Any]]] = {
    RecordFormat.MESSAGES: _messages_fields,
    RecordFormat.SHAREGPT: _sharegpt_fields,
    RecordFormat.ALPACA: _alpaca_fields,
    RecordFormat.PROMPT_COMPLETION: _prompt_fields,
    RecordFormat.QUESTION_ANSWER: _question_fields,
    RecordFormat.TEXT: _text_fields,
    RecordFormat.PROMPT_REFERENCE: _prompt_reference_fields,
    RecordFormat.PROMPT: _prompt_alone_fields,
    RecordFormat.PREFERENCE: _preference_fields,
    RecordFormat.KTO: _kto_fields,
    RecordFormat.FEEDBACK: feedback_fields,
    RecordFormat.RECORD: _record_fields,
}

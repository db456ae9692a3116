"""Rows of the usual data formats to records: which format a row has is told from its columns, with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

from raytune_ft.core.records import ROLES, Message, Record
from raytune_ft.data.config import RecordFormat

_ROLE_NAMES = {
    "human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "model": "assistant", "function_call": "assistant", "observation": "tool", "function_response": "tool",
    "developer": "system",
}  # fmt: skip
_BASES: dict[RecordFormat, tuple[str, str | None]] = {
    RecordFormat.MESSAGES: ("messages", None),
    RecordFormat.SHAREGPT: ("conversations", None),
    RecordFormat.ALPACA: ("instruction", "output"),
    RecordFormat.PROMPT_COMPLETION: ("prompt", "completion"),
    RecordFormat.QUESTION_ANSWER: ("question", "answer"),
    RecordFormat.TEXT: ("text", None),
}
"""Column that asks (or holds all), and column that answers."""
_RECORD_COLUMNS = frozenset({"id", "messages", "text", "chosen", "rejected", "source", "position", "metadata"})


class FormatFault(ValueError):  # noqa: N818 - a finding about one row, turned into a reason or an error by policy
    """Why a row is no record."""


def detect(columns: Collection[str]) -> tuple[RecordFormat, str]:
    """The format that a row with these columns has, and the reason in words.

    Raises:
        FormatFault: if no format fits, or more than one does; names the columns found.
    """
    present = set(columns)
    if present >= _RECORD_COLUMNS:
        return RecordFormat.RECORD, "the columns of our own records"
    if {"chosen", "rejected"} <= present:
        asking = [base for base, (ask, _) in _BASES.items() if ask in present and base is not RecordFormat.TEXT]
        _refuse_ambiguous(asking, columns)
        return RecordFormat.PREFERENCE, "columns 'chosen' and 'rejected'"
    fitting = [
        base for base, (ask, answer) in _BASES.items() if ask in present and (answer is None or answer in present)
    ]
    _refuse_ambiguous(fitting, columns)
    if not fitting:
        raise FormatFault(
            f"unknown columns: {_listed(columns)}; name them with `columns` (for example prompt: {_first(columns)}) or "
            "rename them; known are messages, conversations, instruction+output, prompt+completion, question+answer, "
            "text, chosen+rejected"
        )
    names = " and ".join(repr(name) for name in _BASES[fitting[0]] if name)
    if "label" in present and fitting[0] is not RecordFormat.TEXT:
        return RecordFormat.KTO, f"column 'label' beside {names}"
    return fitting[0], f"column{'s' if 'and' in names else ''} {names}"


def format_of(columns: Collection[str], stated: RecordFormat | None) -> tuple[RecordFormat, str]:
    """The stated format where its column is there, else the one that `detect` tells.

    Raises:
        FormatFault: as `detect`, or if the stated format's column is missing.
    """
    if stated is None:
        return detect(columns)
    wanted = {RecordFormat.PREFERENCE: "chosen", RecordFormat.KTO: "label", RecordFormat.RECORD: "messages"}.get(stated)
    wanted = wanted or _BASES[stated][0]
    if wanted not in columns:
        raise FormatFault(f"unknown columns: {_listed(columns)}; input_format {stated} needs a column {wanted!r}")
    return stated, "stated in input_format"


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


def _listed(columns: Collection[str]) -> str:
    return ", ".join(sorted(map(str, columns))) or "none"


def _first(columns: Collection[str]) -> str:
    return next(iter(sorted(map(str, columns))), "question")


def to_record(values: Mapping[str, Any], kind: RecordFormat, *, source: str, position: int) -> Record:
    """The record that a row of format `kind` says; columns that the format does not use become metadata.

    Raises:
        FormatFault: if a column is missing or holds something else than the format wants.
    """
    used: set[str] = set()

    def take(name: str) -> Any:
        used.add(name)
        return values.get(name)

    fields = _CONVERTERS[kind](take)
    known: dict[str, Any] = {"source": source, "position": position}
    if kind is RecordFormat.RECORD:
        used |= {"id", "source", "position"}
    else:
        known["reference"] = _text(take("reference"), "reference") or None
        known["tools"] = _as_json(take("tools"))
    extra = {key: value for key, value in values.items() if key not in used and value is not None}
    metadata = fields.pop("metadata", {}) | json.loads(json.dumps(extra, default=str))
    return Record(**{**known, **fields}, metadata=metadata)


def _messages_fields(take: Callable[[str], Any]) -> dict[str, Any]:
    return {"messages": _with_system(take, _conversation(take("messages"), "messages"))}


def _sharegpt_fields(take: Callable[[str], Any]) -> dict[str, Any]:
    return {"messages": _with_system(take, _conversation(take("conversations"), "conversations"))}


def _alpaca_fields(take: Callable[[str], Any]) -> dict[str, Any]:
    turns = []
    for pair in take("history") or ():
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise FormatFault("wrong type in 'history': expected pairs of instruction and answer")
        turns += [Message("user", _text(pair[0], "history")), Message("assistant", _text(pair[1], "history"))]
    asked = [_text(take("instruction"), "instruction"), _text(take("input"), "input")]
    turns.append(Message("user", "\n\n".join(part for part in asked if part)))
    return {"messages": _with_system(take, (*turns, *_continuation(take("output"), "output")))}


def _prompt_fields(take: Callable[[str], Any]) -> dict[str, Any]:
    return {
        "messages": _with_system(
            take, (*_asked(take("prompt"), "prompt"), *_continuation(take("completion"), "completion"))
        )
    }


def _question_fields(take: Callable[[str], Any]) -> dict[str, Any]:
    return {
        "messages": _with_system(
            take, (*_asked(take("question"), "question"), *_continuation(take("answer"), "answer"))
        )
    }


def _text_fields(take: Callable[[str], Any]) -> dict[str, Any]:
    return {"text": _text(take("text"), "text") or None}


def _preference_fields(take: Callable[[str], Any]) -> dict[str, Any]:
    prompt: tuple[Message, ...] = ()
    for name in ("prompt", "messages", "conversations", "question"):
        if not prompt and take(name) is not None:
            prompt = _asked(take(name), name)
    if not prompt and take("instruction") is not None:
        parts = [_text(take("instruction"), "instruction"), _text(take("input"), "input")]
        prompt = (Message("user", "\n\n".join(part for part in parts if part)),)
    chosen, rejected = _continuation(take("chosen"), "chosen"), _continuation(take("rejected"), "rejected")
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1  # an implicit prompt: both sides repeat the conversation and differ in the last turn
    if not prompt or chosen[:shared] == prompt:
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if not prompt:
        raise FormatFault("no prompt: neither a column with it nor turns that chosen and rejected share")
    return {"messages": _with_system(take, prompt), "chosen": chosen, "rejected": rejected}


def _kto_fields(take: Callable[[str], Any]) -> dict[str, Any]:
    label = take("label")
    if isinstance(label, str) and label.lower() in {"true", "false"}:
        label = label.lower() == "true"
    if not isinstance(label, bool):
        raise FormatFault(f"wrong type in 'label': expected true or false, found {label!r:.40}")
    for base, (ask, answer) in _BASES.items():
        if base is not RecordFormat.TEXT and take(ask) is not None and (answer is None or take(answer) is not None):
            return {**_CONVERTERS[base](take), "label": label}
    raise FormatFault("no conversation beside 'label'")


def _record_fields(take: Callable[[str], Any]) -> dict[str, Any]:
    sides = {name: _conversation(take(name) or (), name) for name in ("messages", "chosen", "rejected")}
    texts = {name: _text(take(name), name) or None for name in ("text", "reference", "tools")}
    label = take("label")
    return {
        **sides,
        **texts,
        "label": _decoded(None if label == "" else label),
        "metadata": _decoded(take("metadata") or "{}"),
    }


_CONVERTERS: dict[RecordFormat, Callable[[Callable[[str], Any]], dict[str, Any]]] = {
    RecordFormat.MESSAGES: _messages_fields,
    RecordFormat.SHAREGPT: _sharegpt_fields,
    RecordFormat.ALPACA: _alpaca_fields,
    RecordFormat.PROMPT_COMPLETION: _prompt_fields,
    RecordFormat.QUESTION_ANSWER: _question_fields,
    RecordFormat.TEXT: _text_fields,
    RecordFormat.PREFERENCE: _preference_fields,
    RecordFormat.KTO: _kto_fields,
    RecordFormat.RECORD: _record_fields,
}


def _asked(value: Any, name: str) -> tuple[Message, ...]:
    return _conversation(value, name) if isinstance(value, list | tuple) else (Message("user", _text(value, name)),)


def _continuation(value: Any, name: str) -> tuple[Message, ...]:
    if isinstance(value, Mapping):
        return _conversation([value], name)
    return (
        _conversation(value, name) if isinstance(value, list | tuple) else (Message("assistant", _text(value, name)),)
    )


def _with_system(take: Callable[[str], Any], turns: tuple[Message, ...]) -> tuple[Message, ...]:
    system = _text(take("system"), "system")
    return (Message("system", system), *turns) if system and (not turns or turns[0].role != "system") else turns


def _conversation(value: Any, name: str) -> tuple[Message, ...]:
    value = _decoded(value)  # a CSV cell holds a conversation as JSON text
    if not isinstance(value, list | tuple):
        raise FormatFault(f"wrong type in {name!r}: expected a list of turns, found {value!r:.40}")
    return tuple(_turn(turn, name) for turn in value)


def _turn(turn: Any, name: str) -> Message:
    if not isinstance(turn, Mapping):
        raise FormatFault(f"wrong type in {name!r}: expected a turn with role and content, found {turn!r:.40}")
    said = turn.get("role", turn.get("from"))
    role = _ROLE_NAMES.get(str(said), str(said))
    if role not in ROLES:
        raise FormatFault(f"unknown role in {name!r}: {said!r:.40} (known: {', '.join(ROLES)})")
    content = _text(turn.get("content", turn.get("value")), f"{name}.{said}")
    if said == "function_call":
        return Message("assistant", "", _called(content, name))
    return Message(role, content, _as_json(turn.get("tool_calls")) if turn.get("tool_calls") else None)


def _called(content: str, name: str) -> str:
    """A sharegpt function call in OpenAI's form."""
    try:
        calls = json.loads(content)
    except ValueError:
        raise FormatFault(f"wrong type in {name!r}: a function_call that is not JSON: {content!r:.40}") from None
    calls = calls if isinstance(calls, list) else [calls]
    return json.dumps([{"type": "function", "function": call} for call in calls], ensure_ascii=False)


def _text(value: Any, name: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise FormatFault(f"wrong type in {name!r}: expected text, found {value!r:.40}")
    return value


def _decoded(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise FormatFault(f"wrong type: expected JSON, found {value!r:.40}") from None


def _as_json(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value or None
    return json.dumps(value, ensure_ascii=False)

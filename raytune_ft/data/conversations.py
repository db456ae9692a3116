"""Turns as the usual formats write them, to messages; whatever a turn says beyond that is set aside, not lost."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from raytune_ft.core.records import ROLES, Message
from raytune_ft.data.json_text import JsonFault, parse

_ROLE_NAMES = {
    "human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "model": "assistant", "ai": "assistant", "function_call": "assistant", "tool_call": "assistant",
    "observation": "tool", "function_response": "tool", "tool_response": "tool", "function": "tool",
    "developer": "system",
}  # fmt: skip
_CALLS = frozenset({"function_call", "tool_call"})
_TURN_FIELDS = frozenset({"role", "from", "content", "value", "tool_calls", "function_call"})
_CALL_FIELDS = ("tool_calls", "function_call")
_MAY_BE_NO_NUMBER = re.compile(r"NaN|Infinity|[eE]\+?\d{3}|\d{300}")
"""Text without any of it, if it is JSON, has no number that JSON cannot say."""
_NO_TOOLS = re.compile(r"\s*(?:\[\s*\]|null)?\s*")
REASONING_FIELDS = ("reasoning", "reasoning_content", "rationale", "thinking")
"""Columns, and fields of a turn, in which reasoning is looked for, in this order."""


class FormatFault(ValueError):  # noqa: N818 - a finding about one row, turned into a reason or an error by policy
    """Why a row is no record."""


class Columns:
    """The values of one row, with a note of what was taken, so that the rest can become metadata."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values
        self.taken: set[str] = set()
        self.spare: dict[str, Any] = {}

    def __call__(self, name: str) -> Any:
        """The value of a column (None if there is none), which counts as used from here on."""
        self.taken.add(name)
        return self._values.get(name)

    def see(self, name: str) -> Any:
        """The value of a column, which does not count as used."""
        return self._values.get(name)

    def set_aside(self, name: str, turn: int, fields: Mapping[str, Any]) -> None:
        """Keeps what a turn of column `name` has beyond role, content and tool calls."""
        self.spare.setdefault(f"{name} (other fields)", {})[str(turn)] = dict(fields)

    def lift(self, name: str, turn: int, fields: Sequence[str]) -> None:
        """Makes of `fields` that were set aside of a turn metadata of the row, where it has no such column."""
        column = f"{name} (other fields)"
        kept = self.spare.get(column, {}).get(str(turn), {})
        for field in fields:
            if field in kept and self._values.get(field) is None:
                self.spare[field] = kept.pop(field)
        if not kept:
            self.spare.get(column, {}).pop(str(turn), None)
        if not self.spare.get(column, True):
            del self.spare[column]


def conversation(take: Columns, name: str, value: Any = None) -> tuple[Message, ...]:
    """The turns in a column: a list of them, JSON text of one (a CSV cell), or a struct of lists.

    Raises:
        FormatFault: if it is something else, or a turn has no known role or no text.
    """
    value = decoded(take(name) if value is None else value)
    if isinstance(value, Mapping) and value and all(isinstance(part, list) for part in value.values()):
        lengths = {len(part) for part in value.values()}
        if len(lengths) == 1:  # how `datasets` stores a sequence of turns
            value = [dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=True)]
    if not isinstance(value, list | tuple):
        raise FormatFault(f"wrong type in {name!r}: expected a list of turns, found {value!r:.40}")
    turns = tuple(_turn(take, name, number, turn) for number, turn in enumerate(value))
    if turns and turns[-1].role == "assistant" and name not in {"chosen", "rejected"}:
        take.lift(name, len(turns) - 1, REASONING_FIELDS)
    return turns


def asked(take: Columns, name: str) -> tuple[Message, ...]:
    """What a column asks: its turns, or its text as the user's."""
    value = take(name)
    if isinstance(value, list | tuple) or name in {"messages", "conversations"}:
        return conversation(take, name)
    return (Message("user", text_of(value, name)),)


def continuation(take: Columns, name: str) -> tuple[Message, ...]:
    """What a column answers: its turns, its one turn, or its text as the assistant's."""
    value = take(name)
    if isinstance(value, Mapping):
        value = [value]
    if isinstance(value, list | tuple):
        return conversation(take, name, value)
    return (Message("assistant", text_of(value, name)),)


def with_system(take: Columns, turns: tuple[Message, ...]) -> tuple[Message, ...]:
    """The turns with the text of column ``system`` before them; beside a system turn of theirs it is metadata."""
    if turns and turns[0].role == "system" and take.see("system"):
        return turns
    system = text_of(take("system"), "system")
    return (Message("system", system), *turns) if system else turns


def text_of(value: Any, name: str) -> str:
    """A text value; nothing where there is null.

    Raises:
        FormatFault: if it is neither.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise FormatFault(f"wrong type in {name!r}: expected text, found {value!r:.40}")
    return value


def decoded(value: Any) -> Any:
    """What JSON text says; other values as they are.

    Raises:
        FormatFault: if a text is no JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return parse(value)
    except JsonFault:
        raise FormatFault(f"wrong type: expected JSON, found {value!r:.40}") from None


def as_json(value: Any) -> str | None:
    """A value as JSON text; text is taken to be that already, and nothing is None.

    Raises:
        FormatFault: if it holds a number that is infinite or NaN.
    """
    if value is None or isinstance(value, str):
        if value and _MAY_BE_NO_NUMBER.search(value):
            _refuse_no_number(value)
        return value or None
    return _written(value)


def _refuse_no_number(text: str) -> None:
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):  # of text that is no JSON, cleaning has a word
        return
    _written(said)


def _written(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, default=str, allow_nan=False)
    except ValueError:
        raise FormatFault(f"wrong value in tools or calls: no number that JSON can say in {value!r:.40}") from None


def tools_of(value: Any) -> str | None:
    """Tools as JSON text; None where there are none, an empty list included."""
    tools = as_json(value)
    return None if tools is None or _NO_TOOLS.fullmatch(tools) else tools


def without_filled_nulls(values: Mapping[str, Any]) -> dict[str, Any]:
    """A row of Parquet, Arrow or a hub without the fields that its tools and tool calls never had.

    There all structs of a column have the fields of each of them, and those that a struct lacks are null.
    """
    return {name: _filled(value) if name == "tools" else _calls_filled(value) for name, value in values.items()}


def _calls_filled(turns: Any) -> Any:
    """Turns (or one of them) with `_filled` applied to their calls; other values as they are."""
    if isinstance(turns, list):
        return [_calls_filled(turn) for turn in turns]
    if not isinstance(turns, Mapping) or not any(turns.get(name) for name in _CALL_FIELDS):
        return turns
    return {name: _filled(value) if name in _CALL_FIELDS else value for name, value in turns.items()}


def _filled(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _filled(part) for name, part in value.items() if part is not None}
    return [_filled(part) for part in value] if isinstance(value, list) else value


def _turn(take: Columns, name: str, number: int, turn: Any) -> Message:
    if not isinstance(turn, Mapping):
        raise FormatFault(f"wrong type in {name!r}: expected a turn with role and content, found {turn!r:.40}")
    said = turn.get("role") or turn.get("from")
    role = str(said).strip().lower()
    is_call = role in _CALLS
    role = _ROLE_NAMES.get(role, role)
    if role not in ROLES:
        raise FormatFault(f"unknown role in {name!r}: {said!r:.40} (known: {', '.join(ROLES)})")
    used = _TURN_FIELDS | ({"tool_call_id", "name"} if role == "tool" else set()) | {"weight"}
    spare = {key: value for key, value in turn.items() if key not in used and value is not None}
    if spare:
        take.set_aside(name, number, spare)
    written = turn.get("content")
    content = _content(turn.get("value") if written is None else written, f"{name}.{said}")
    weight = _weight(turn.get("weight"), name) if role == "assistant" else None
    if role == "tool":
        answered, tool = (_named(turn.get(field), f"{name}.{field}") for field in ("tool_call_id", "name"))
        return Message(role, content, tool_call_id=answered, name=tool)
    if is_call:
        return Message(role, "", _calls(content, name), weight=weight)
    given = turn.get("tool_calls") or ([turn["function_call"]] if turn.get("function_call") else None)
    return Message(role, content, _calls(given, name) if given else None, weight=weight)


def _weight(value: Any, name: str) -> int | None:
    """0 where a turn says that it is not to be trained on; a weight of 1 says nothing."""
    if value is None or value in (0, 1):
        return 0 if value == 0 else None
    raise FormatFault(f"wrong value in '{name}.weight': expected 0 (not trained on) or 1, found {value!r:.40}")


def _named(value: Any, name: str) -> str | None:
    return text_of(value, name) or None


def _content(value: Any, name: str) -> str:
    """The text of a turn; a list of parts, as OpenAI writes it, must be texts, which follow one another."""
    if not isinstance(value, list | tuple):
        return text_of(value, name)
    parts = []
    for part in value:
        if not isinstance(part, Mapping) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            raise FormatFault(f"wrong type in {name!r}: a part that is no text: {part!r:.40}")
        parts.append(part["text"])
    return "".join(parts)


def _calls(value: Any, name: str) -> str:
    """Tool calls as JSON text in OpenAI's form, with the arguments as they are written.

    Raises:
        FormatFault: if they are none, or hold a number that is infinite or NaN.
    """
    if isinstance(value, str):
        try:
            value = parse(value)
        except JsonFault:
            raise FormatFault(f"wrong type in {name!r}: a tool call that is not JSON: {value!r:.40}") from None
    calls = list(value) if isinstance(value, list | tuple) else [value]
    wrapped = []
    for call in calls:
        if not isinstance(call, Mapping):
            raise FormatFault(f"wrong type in {name!r}: a tool call that is no object: {call!r:.40}")
        bare = not isinstance(call.get("function"), Mapping)
        as_json((call if bare else call["function"]).get("arguments"))  # which may be JSON text in the JSON
        wrapped.append({"type": "function", "function": call} if bare else call)
    return _written(wrapped)

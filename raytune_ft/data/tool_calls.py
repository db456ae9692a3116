"""Whether the tool calls of a record and their results belong together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from raytune_ft.core.records import Message, Record
from raytune_ft.data.json_text import loads


def unbalanced_tool_calls(record: Record) -> str | None:
    """What is wrong with the tool calls of a record; None if nothing is.

    Calls must be answered before the assistant speaks or the user asks again, except in the last turn, which may be
    a call to train on: calls with ids by a result each, calls without by at least one and no more than there are.
    Arguments that are no JSON object, and (where the record lists its tools) calls of another tool are wrong, too.
    """
    turns = record.messages + record.chosen + record.rejected
    if not record.tools and not any(turn.tool_calls or turn.role == "tool" for turn in turns):
        return None
    try:
        known = tool_names(record.tools)
    except ValueError as error:
        return f"malformed tools: {error}"
    for side in (record.messages, record.messages + record.chosen, record.messages + record.rejected):
        fault = _fault(side, known)
        if fault:
            return fault
    return None


def tool_names(tools: str | None) -> frozenset[str] | None:
    """The names in a JSON list of tools (OpenAI's form, or bare functions); None where no tools are listed.

    Raises:
        ValueError: if it is no such list.
    """
    if not tools or not tools.strip():
        return None
    listed = _loaded(tools)
    listed = [listed] if isinstance(listed, Mapping) else listed
    if not isinstance(listed, list):
        raise ValueError("expected a list of tools")
    names = set()
    for tool in listed:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError("expected tools with a name")
        names.add(function["name"])
    return frozenset(names)


def _fault(turns: tuple[Message, ...], known: frozenset[str] | None) -> str | None:
    least = most = 0  # results that the calls so far must and may still have
    for turn in turns:
        if turn.role == "tool":
            if not most:
                return "tool result without a call"
            least, most = max(least - 1, 0), most - 1
            continue
        # An assistant may call in several turns of its own before the results come.
        if least and not (turn.role == "assistant" and turn.tool_calls):
            return f"tool call without a result: {turn.role} goes on before it"
        calls = list(_calls(turn))
        if not (least and calls):
            least = most = 0
        least += sum(1 for call in calls if call.get("id")) or bool(calls)
        most += len(calls)
        for call in calls:
            function = call.get("function", call)
            fault = _call_fault(function.get("name"), function.get("arguments"), known)
            if fault:
                return fault
    return None


def _call_fault(name: Any, arguments: Any, known: frozenset[str] | None) -> str | None:
    if not isinstance(name, str) or not name:
        return "malformed tool call: it names no tool"
    if isinstance(arguments, str):
        try:
            arguments = _loaded(arguments or "{}")
        except ValueError as error:
            return f"malformed tool call: the arguments of {name} are no JSON: {error}"
    if arguments is not None and not isinstance(arguments, Mapping):
        return f"malformed tool call: the arguments of {name} are no object"
    if known is not None and name not in known:
        return f"unknown tool: {name} is called; listed are {', '.join(sorted(known)) or 'none'}"
    return None


def _loaded(text: str) -> Any:
    try:
        return loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _calls(turn: Message) -> Iterator[Mapping[str, Any]]:
    yield from loads(turn.tool_calls) if turn.tool_calls else ()

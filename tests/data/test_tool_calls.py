from __future__ import annotations

import json

import pytest

from raytune_ft.core.records import Message, Record
from raytune_ft.data.tool_calls import tool_names, unbalanced_tool_calls

USER, SAID, RESULT = Message("user", "Q"), Message("assistant", "A"), Message("tool", "1")
TOOLS = json.dumps([{"type": "function", "function": {"name": "find"}}, {"name": "add"}])


def call(*names: str, arguments: object = "{}", ids: bool = False) -> Message:
    calls = [
        {**({"id": f"c{place}"} if ids else {}), "function": {"name": name, "arguments": arguments}}
        for place, name in enumerate(names)
    ]
    return Message("assistant", "", json.dumps(calls))


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ((USER, SAID), None),
        ((USER, call("find"), RESULT, SAID), None),
        ((USER, call("find")), None),
        ((USER, call("find"), call("add"), RESULT, RESULT, SAID), None),
        ((USER, call("find", "add"), RESULT, SAID), None),
        ((USER, call("find", "add", ids=True), RESULT, RESULT, SAID), None),
        (
            (USER, call("find", "add", ids=True), RESULT, SAID),
            "tool call without a result: assistant goes on before it",
        ),
        ((USER, call("find"), SAID), "tool call without a result: assistant goes on before it"),
        ((USER, call("find"), USER, SAID), "tool call without a result: user goes on before it"),
        ((USER, SAID, RESULT, SAID), "tool result without a call"),
        ((USER, call("find"), RESULT, RESULT, SAID), "tool result without a call"),
        ((USER, call("find"), RESULT, SAID, RESULT, SAID), "tool result without a call"),
        ((USER, call("find", arguments={"q": 1}), RESULT, SAID), None),
        (
            (USER, call("find", arguments="[1]"), RESULT, SAID),
            "malformed tool call: the arguments of find are no object",
        ),
        ((USER, call(""), RESULT, SAID), "malformed tool call: it names no tool"),
        ((USER, call("sing"), RESULT, SAID), "unknown tool: sing is called; listed are add, find"),
        ((USER, call("sing\ud83d"), RESULT, SAID), "unknown tool: sing? is called; listed are add, find"),
    ],
)
def test_calls_and_results_belong_together(turns: tuple[Message, ...], reason: str | None) -> None:
    assert unbalanced_tool_calls(Record(messages=turns, tools=TOOLS)) == reason


def test_arguments_must_be_json_and_any_tool_may_be_called_where_none_is_listed() -> None:
    broken = Record(messages=(USER, call("find", arguments='{"q": '), RESULT, SAID))
    assert (unbalanced_tool_calls(broken) or "").startswith("malformed tool call: the arguments of find are no JSON")
    assert unbalanced_tool_calls(Record(messages=(USER, call("sing"), RESULT, SAID))) is None


def test_both_sides_of_a_preference_are_looked_at() -> None:
    record = Record(messages=(USER,), chosen=(SAID,), rejected=(call("sing"),), tools=TOOLS)
    assert unbalanced_tool_calls(record) == "unknown tool: sing is called; listed are add, find"


@pytest.mark.parametrize("tools", ["{", '["find"]', "3", '[{"type": "function"}]'])
def test_tools_that_are_no_list_of_tools_are_said(tools: str) -> None:
    assert (unbalanced_tool_calls(Record(messages=(USER, SAID), tools=tools)) or "").startswith("malformed tools: ")


def test_no_tools_are_not_an_empty_list_of_them() -> None:
    assert tool_names(None) is tool_names(" ") is None
    assert tool_names("[]") == frozenset()

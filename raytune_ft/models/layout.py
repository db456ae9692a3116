"""A conversation laid out as text: what the template writes, and where in it the assistant speaks.

The places come from the template's skeleton where it has one, else from rendering the conversation up to each turn.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from raytune_ft.core.errors import DataError
from raytune_ft.core.records import Message
from raytune_ft.models import templates
from raytune_ft.models.config import TrainOn
from raytune_ft.models.skeleton import Skeleton, skeleton_of

_MOST_SKELETONS = 1024
_PROBE = "raytune_probe"


class ToolsIgnoredError(DataError):
    """A conversation has tools or calls that the chat template does not write; another template may."""


@dataclass(frozen=True)
class Conversation:
    """Messages with the tools (JSON text) that they may call.

    `supervised_spans` are the characters of the last assistant turn's content that count for the loss; None: all.
    """

    messages: tuple[Message, ...]
    tools: str | None = None
    supervised_spans: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True)
class Span:
    """An assistant turn in a text: from behind the generation prompt to where the next turn would begin.

    `parts` are the characters that count for the loss where that is not the whole turn.
    """

    start: int
    content_end: int
    end: int
    calls_tools: bool = False
    parts: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True)
class Layout:
    """The rendered text and the assistant turns in it that count for the loss (those of weight 0 do not)."""

    text: str
    spans: tuple[Span, ...]


class LayoutMaker:
    """Lays out conversations by one template; skeletons are kept for each order of roles that came."""

    def __init__(self, template: str, special_tokens: Mapping[str, str]) -> None:
        self._template, self._special_tokens = template, dict(special_tokens)
        self._skeletons: dict[tuple[tuple[str, bool], ...], Skeleton | None] = {}

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: str | None = None,
        add_generation_prompt: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation; `variables` are of the template's own.

        Raises:
            DataError: if the template refuses it, or does not write its tools.
        """
        if not messages:
            raise DataError("there is no message to render")
        self._check_tools(messages, tools)
        return self._written(messages, _tools(tools), add_generation_prompt, variables)

    def lay_out(self, conversation: Conversation, train_on: TrainOn) -> Layout:
        """The text with the places of the assistant turns that `train_on` names.

        Raises:
            DataError: as `render`, or if the template rewrites earlier turns so that no mask is right.
        """
        messages = conversation.messages
        skeleton = self._skeleton(conversation)
        if skeleton is None:
            return self._laid_out_by_prefixes(conversation, train_on)
        text, starts = skeleton.fill([message.content for message in messages])
        turns = skeleton.turns if train_on is TrainOn.ALL_ASSISTANT_TURNS else skeleton.turns[-1:]
        spans = []
        for places in turns:
            if messages[places.turn].weight == 0:
                continue
            content_end = starts[places.slot + 1]
            start = starts[places.start.piece] + places.start.offset
            end = starts[places.end.piece] + places.end.offset
            parts = None
            if conversation.supervised_spans is not None and places is turns[-1]:
                content, (_, left, _) = messages[places.turn].content, skeleton.slots[places.slot]
                begin = starts[places.slot] + len(skeleton.pieces[places.slot])
                begin -= len(content) - len(content.lstrip()) if left else 0
                parts = _clipped(conversation.supervised_spans, begin, content_end)
            spans.append(Span(start, content_end, end, parts=parts))
        return Layout(text, tuple(spans))

    def _skeleton(self, conversation: Conversation) -> Skeleton | None:
        if conversation.tools:
            return None
        key = tuple((message.role, bool(message.content)) for message in conversation.messages)
        of_tools = any(m.tool_calls or m.tool_call_id or m.name for m in conversation.messages)
        if not key or of_tools or any(m.content.isspace() for m in conversation.messages):
            return None
        if key not in self._skeletons:
            if len(self._skeletons) >= _MOST_SKELETONS:
                self._skeletons.clear()
            roles, filled = zip(*key, strict=True)
            self._skeletons[key] = skeleton_of(self._template, roles, filled, self._special_tokens)
        return self._skeletons[key]

    def _laid_out_by_prefixes(self, conversation: Conversation, train_on: TrainOn) -> Layout:
        messages, tools = conversation.messages, _tools(conversation.tools)
        text = self.render(messages, tools=conversation.tools)
        turns = [turn for turn, message in enumerate(messages) if message.role == "assistant"]
        if train_on is TrainOn.LAST_ASSISTANT_TURN:
            turns = turns[-1:]
        spans = []
        for turn in turns:
            if messages[turn].weight == 0:
                continue
            before = self._written(messages[:turn], tools, True)
            until = text if turn + 1 == len(messages) else self._written(messages[: turn + 1], tools, False)
            if not text.startswith(before) or not text.startswith(until):
                raise DataError(_rewritten(turn, len(messages), train_on))
            parts = conversation.supervised_spans if turn == turns[-1] else None
            spans.append(_span(messages[turn], text, len(before), len(until), parts))
        return Layout(text, tuple(spans))

    def _written(
        self,
        messages: Sequence[Message],
        tools: Any,
        add_generation_prompt: bool,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        try:
            return templates.render(
                self._template,
                [_turn(message) for message in messages],
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                special_tokens=self._special_tokens,
                variables=variables,
            )
        except Exception as error:  # noqa: BLE001 - templates are programs of the model's makers: any error is theirs
            raise DataError(f"the model's chat template refuses this conversation: {error}") from None

    def _check_tools(self, messages: Sequence[Message], tools: str | None) -> None:
        if tools and not self._writes_tools:
            raise ToolsIgnoredError("tools: the chat template ignores them, so the model would never see them")
        if not self._writes_calls and any(message.tool_calls for message in messages):
            raise ToolsIgnoredError("tool calls: the chat template ignores them, so they would be lost")

    @cached_property
    def _writes_tools(self) -> bool:
        tool = {"type": "function", "function": {"name": _PROBE, "description": "d", "parameters": _NO_PARAMETERS}}
        return self._probe([Message("user", "a")], [tool])

    @cached_property
    def _writes_calls(self) -> bool:
        call = [{"id": "call00000", "type": "function", "function": {"name": _PROBE, "arguments": {}}}]
        asked = [Message("user", "a"), Message("assistant", "", json.dumps(call))]
        return self._probe([*asked, Message("tool", "b"), Message("assistant", "c")], None) or self._probe(asked, None)

    def _probe(self, messages: Sequence[Message], tools: Any) -> bool:
        try:
            return _PROBE in self._written(messages, tools, False)
        except DataError:
            return True  # it looks at them; with which demands, the rows will show


_NO_PARAMETERS = {"type": "object", "properties": {}}


def _span(message: Message, text: str, start: int, end: int, parts: tuple[tuple[int, int], ...] | None) -> Span:
    content = message.content.strip()
    found = text.rfind(content, start, end) if content else -1
    content_end = found + len(content) if found >= 0 else start
    if parts is not None:
        if found < 0:
            raise DataError("supervised_spans: the chat template changes the text of the turn they count in")
        parts = _clipped(parts, found - (len(message.content) - len(message.content.lstrip())), content_end)
    return Span(start, content_end, end, bool(message.tool_calls), parts)


def _clipped(spans: tuple[tuple[int, int], ...], begin: int, content_end: int) -> tuple[tuple[int, int], ...]:
    """Spans of a content as spans of the text that holds it from `begin` on."""
    return tuple((begin + start, min(begin + end, content_end)) for start, end in spans)


def _rewritten(turn: int, turns: int, train_on: TrainOn) -> str:
    if train_on is TrainOn.LAST_ASSISTANT_TURN:
        return (
            f"the model's chat template rewrites earlier turns even while it answers (turn {turn + 1} of {turns}), so "
            "no mask is right; give another template"
        )
    return (
        f"the model's chat template rewrites earlier turns (turn {turn + 1} of {turns}), so no mask is right for the "
        "whole conversation; set train_on: last_assistant_turn, keep one assistant turn a row, or give another template"
    )


def _turn(message: Message) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        turn["tool_calls"] = [_call(call) for call in json.loads(message.tool_calls)]
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        turn["name"] = message.name
    return turn


def _call(call: Any) -> Any:
    """A call with its arguments as an object: templates write them as JSON, and text would be quoted twice."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(arguments := function.get("arguments"), str):
        return call
    try:
        return {**call, "function": {**function, "arguments": json.loads(arguments)}}
    except ValueError:
        return call


def _tools(tools: str | None) -> Any:
    if not tools:
        return None
    try:
        return json.loads(tools)
    except ValueError:
        raise DataError(f"tools: expected JSON (a list of function schemas), found {tools!r:.60}") from None

"""Conversations to tokens, and which of them are supervised.

The mask comes from character offsets on the whole rendered text, so it is right for templates without generation
markers and where a token spans the border of a turn (such a token belongs to the prompt).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from raytune_ft.core.errors import DataError, ModelError
from raytune_ft.core.records import Message, Record

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<response>\n{{ message['content'] }}\n</response>{{ eos_token }}\n"
    "{% else %}<instruction>\n{{ message['content'] }}\n</instruction>\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<response>\n{% endif %}"
)
"""The guide's ``<instruction>/<response>`` format, for models that bring no chat template."""


@dataclass(frozen=True)
class Encoded:
    """Token ids of one row, and for each whether it is supervised (counts for the loss)."""

    input_ids: list[int]
    supervised: list[bool]


class Chat:
    """A tokenizer with its chat template."""

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(
                f"{tokenizer.name_or_path}: its tokenizer has no fast version, and masks need character offsets; "
                "convert it with transformers' convert_slow_tokenizer"
            )
        self.tokenizer = tokenizer
        self.brings_template = tokenizer.chat_template is not None
        if not self.brings_template:
            tokenizer.chat_template = PLAIN_TEMPLATE

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The conversation as the template writes it.

        Raises:
            DataError: if the template refuses the conversation (for example two user turns in a row).
        """
        turns = [_turn(message) for message in messages]
        try:
            return str(
                self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt)
            )
        except Exception as error:  # noqa: BLE001 - templates are programs of the model's makers: any error is theirs
            raise DataError(f"the model's chat template refuses this conversation: {error}") from None

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the conversation, ending with the generation prompt."""
        text = self.render(messages, add_generation_prompt=True)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode(self, messages: Sequence[Message]) -> Encoded:
        """Token ids with every assistant turn supervised, its end-of-turn token included.

        Raises:
            DataError: if the template rewrites earlier turns when later ones come (no mask is right then).
        """
        text = self.render(messages)
        spans = [self._span(messages, turn, text) for turn, m in enumerate(messages) if m.role == "assistant"]
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids: list[int] = list(encoding["input_ids"])
        offsets: list[tuple[int, int]] = encoding["offset_mapping"]
        supervised = [False] * len(ids)
        for start, content_end, end in spans:
            for place, (begin, _) in enumerate(offsets):
                if start <= begin < end:
                    supervised[place] = True
                    if begin >= content_end and ids[place] in self._special_ids:
                        break  # the end of the turn; what the template adds behind it is not the model's to say
        return Encoded(ids, supervised)

    def encode_text(self, text: str) -> Encoded:
        """Token ids of raw text, closed with the end-of-text token, all supervised."""
        ids = list(self.tokenizer(text)["input_ids"])
        if self.tokenizer.eos_token_id is not None and (not ids or ids[-1] != self.tokenizer.eos_token_id):
            ids.append(self.tokenizer.eos_token_id)
        return Encoded(ids, [True] * len(ids))

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: end of text, and what the template puts behind an assistant turn."""
        probe = [Message("user", "a"), Message("assistant", "b")]
        encoded = self.encode(probe)
        last = [token for token, kept in zip(encoded.input_ids, encoded.supervised, strict=True) if kept][-1:]
        found = {token for token in last if token in self._special_ids}
        if self.tokenizer.eos_token_id is not None:
            found.add(self.tokenizer.eos_token_id)
        return tuple(sorted(found))

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change when the vocabulary, the special tokens or the template change."""
        content = [
            sorted(self.tokenizer.get_vocab().items()),
            self.tokenizer.chat_template,
            {key: str(value) for key, value in self.tokenizer.special_tokens_map.items()},
        ]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        added = self.tokenizer.added_tokens_decoder
        return frozenset(self.tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}

    def _span(self, messages: Sequence[Message], turn: int, text: str) -> tuple[int, int, int]:
        """Where the turn starts, where its content ends, and where the turn ends in `text`."""
        before = self.render(messages[:turn], add_generation_prompt=True)
        until = self.render(messages[: turn + 1])
        if not text.startswith(before) or not text.startswith(until):
            raise DataError(
                f"the model's chat template rewrites earlier turns (turn {turn + 1} of {len(messages)}), so no mask is "
                "right for the whole conversation; keep one assistant turn a row, or give another template"
            )
        content = messages[turn].content.strip()
        found = text.rfind(content, len(before), len(until)) if content else -1
        return len(before), (found + len(content) if found >= 0 else len(before)), len(until)


def encode_record(chat: Chat, record: Record) -> Encoded:
    """Tokens of a record: assistant turns of a conversation supervised, or all tokens of a raw text."""
    if record.messages:
        return chat.encode(record.messages)
    return chat.encode_text(record.text or "")


def _turn(message: Message) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        turn["tool_calls"] = json.loads(message.tool_calls)
    return turn

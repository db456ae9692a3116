"""Conversations to tokens, and which of them are supervised.

The mask comes from character offsets on the whole rendered text, so it is right for templates without generation
markers and where a token spans the border of a turn (such a token belongs to the prompt).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytune_ft.core.digest import short_hash
from raytune_ft.core.errors import DataError, ModelError
from raytune_ft.core.records import Message, Record
from raytune_ft.models import templates
from raytune_ft.models.config import TrainOn
from raytune_ft.models.layout import Conversation, Layout, LayoutMaker
from raytune_ft.models.templates import INSTRUCTION_TEMPLATE

_PROBE = "raytuneprobe"


@dataclass(frozen=True)
class Encoded:
    """Token ids of one row, and for each whether it is supervised (counts for the loss)."""

    input_ids: list[int]
    supervised: list[bool]


@dataclass(frozen=True)
class TokenRow:
    """As `Encoded`, in arrays: int32 ids and booleans."""

    ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]


class Chat:
    """A tokenizer with its chat template: the given one, else the tokenizer's own, else the guide's format."""

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(
                f"{tokenizer.name_or_path}: its tokenizer has no fast version, and masks need character offsets; "
                "convert it with transformers' convert_slow_tokenizer"
            )
        self.tokenizer = tokenizer
        self.brings_template = tokenizer.chat_template is not None
        if template is not None or not self.brings_template:
            wanted = template or INSTRUCTION_TEMPLATE
            tokenizer.chat_template = templates.for_tokenizer(wanted, adds_bos=self._adds_bos)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        tools: str | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as the template writes it; `tools` is JSON text (a list of function schemas).

        `variables` are of the template's own (``enable_thinking``).

        Raises:
            DataError: if the template refuses the conversation (for example two user turns in a row).
        """
        return self._layouts(tools).render(
            messages, tools=tools, add_generation_prompt=add_generation_prompt, variables=variables
        )

    def prompt_ids(
        self, messages: Sequence[Message], *, tools: str | None = None, variables: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Token ids of the conversation, ending with the generation prompt."""
        text = self.render(messages, add_generation_prompt=True, tools=tools, variables=variables)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode(self, messages: Sequence[Message], train_on: TrainOn = TrainOn.ALL_ASSISTANT_TURNS) -> Encoded:
        """Token ids with the assistant turns supervised, their end-of-turn tokens included.

        Raises:
            DataError: if the template rewrites earlier turns when later ones come, so that no mask is right, or
                refuses the conversation.
        """
        return self.encode_conversation(Conversation(tuple(messages)), train_on)

    def encode_conversation(
        self, conversation: Conversation, train_on: TrainOn = TrainOn.ALL_ASSISTANT_TURNS
    ) -> Encoded:
        """As `encode`, with the tools and supervised spans of the conversation."""
        (row,) = self.encode_batch([conversation], train_on)
        if isinstance(row, DataError):
            raise row
        return Encoded(row.ids.tolist(), row.supervised.tolist())

    def encode_batch(
        self, conversations: Sequence[Conversation], train_on: TrainOn = TrainOn.ALL_ASSISTANT_TURNS
    ) -> list[TokenRow | DataError]:
        """As `encode_conversation` for many at once; a conversation without a right mask has its error instead."""
        laid_out: list[Layout | DataError] = []
        for conversation in conversations:
            try:
                laid_out.append(self._layouts(conversation.tools).lay_out(conversation, train_on))
            except DataError as error:
                laid_out.append(error)
        texts = [layout.text for layout in laid_out if isinstance(layout, Layout)]
        encodings = iter(self._encoder.encode_batch(texts, add_special_tokens=False))
        return [self._masked(next(encodings), layout) if isinstance(layout, Layout) else layout for layout in laid_out]

    def encode_text(self, text: str, *, closed: bool = True) -> Encoded:
        """Token ids of raw text, all supervised: begun as the tokenizer begins texts, and closed with end-of-text.

        Args:
            text: the text; special tokens that it writes at its ends are not doubled.
            closed: whether the text ends here; false for a piece that has a continuation.
        """
        ids = list(self.tokenizer(text)["input_ids"])
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            del ids[0]
        if closed and eos is not None and (not ids or ids[-1] != eos):
            ids.append(eos)
        if not closed and eos is not None and ids[-1:] == [eos] and not text.endswith(self.tokenizer.eos_token):
            del ids[-1]
        return Encoded(ids, [True] * len(ids))

    def special_text(self, conversation: Conversation) -> str | None:
        """The first special token that a turn or the tools spell out, which would be read as the token itself."""
        texts = [conversation.tools or ""]
        for message in conversation.messages:
            texts += [message.content, message.tool_calls or ""]
        return next((found for text in texts if (found := self.spelled_in(text))), None)

    def spelled_in(self, text: str) -> str | None:
        """The first special token that a text spells out."""
        found = self._special_pattern.search(text) if self._special_pattern else None
        return found.group() if found else None

    def text_offsets(self, text: str) -> list[tuple[int, int]]:
        """Where each token of `text` begins and ends in it, without special tokens."""
        return list(self._encoder.encode(text, add_special_tokens=False).offsets)

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: end of text, and what the template puts behind an assistant turn."""
        end = self._answer_end
        found = set() if end is None else {self._behind_answer[end]}
        if self.tokenizer.eos_token_id is not None:
            found.add(self.tokenizer.eos_token_id)
        return tuple(sorted(found))

    @cached_property
    def tail_ids(self) -> tuple[int, ...]:
        """Tokens that the template puts behind the one that ends an answer; most have a line break, or none."""
        end = self._answer_end
        return () if end is None else tuple(self._behind_answer[end + 1 :])

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change when the vocabulary, the special tokens or the template change."""
        content = [
            sorted(self.tokenizer.get_vocab().items()),
            self.tokenizer.chat_template,
            {key: str(value) for key, value in self.tokenizer.special_tokens_map.items()},
        ]
        return short_hash(json.dumps(content, sort_keys=True))

    @cached_property
    def _behind_answer(self) -> list[int]:
        """Tokens that the template puts behind the text of the last assistant turn."""
        # Rendered, not masked: a template that thinks before it answers may have no right mask, and can be asked.
        _, found, behind = self.render([Message("user", "a"), Message("assistant", _PROBE)]).rpartition(_PROBE)
        return list(self._encoder.encode(behind if found else "", add_special_tokens=False).ids)

    @property
    def _answer_end(self) -> int | None:
        """Which of the tokens behind an answer ends it: the first special one."""
        return next((place for place, token in enumerate(self._behind_answer) if token in self._special_ids), None)

    def _layouts(self, tools: str | None) -> LayoutMaker:
        # Some tokenizers have a template of its own for conversations with tools.
        template = self.tokenizer.get_chat_template(None, [{}] if tools else None)
        if template not in self._makers:
            self._makers[template] = LayoutMaker(template, self.tokenizer.special_tokens_map)
        return self._makers[template]

    @cached_property
    def _makers(self) -> dict[str, LayoutMaker]:
        return {}

    @cached_property
    def _adds_bos(self) -> bool:
        bos = self.tokenizer.bos_token_id
        return bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos]

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        added = self.tokenizer.added_tokens_decoder
        return frozenset(self.tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}

    @cached_property
    def _special_pattern(self) -> re.Pattern[str] | None:
        words = sorted({str(self.tokenizer.convert_ids_to_tokens(token)) for token in self._special_ids}, key=len)
        return re.compile("|".join(map(re.escape, reversed(words)))) if words else None

    @cached_property
    def _encoder(self) -> Any:
        """The fast tokenizer with offsets as they are: post-processors move them over whitespace."""
        from tokenizers import Tokenizer
        from tokenizers.processors import Sequence as Processors

        encoder = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        encoder.post_processor = Processors([])
        encoder.no_truncation()
        encoder.no_padding()
        return encoder

    def _masked(self, encoding: Any, layout: Layout) -> TokenRow:
        ids = encoding.ids
        supervised = np.zeros(len(ids), np.bool_)
        tokens = _Positions(encoding, len(layout.text))
        for span in layout.spans:
            last, content_end = tokens.at(span.end), tokens.at(span.content_end)
            stop = self._stop(ids, content_end, last, span.calls_tools)
            if span.parts is None:
                supervised[tokens.at(span.start) : stop] = True
                continue
            for start, end in span.parts:
                supervised[tokens.at(start) : stop if end >= span.content_end else tokens.at(end)] = True
        return TokenRow(np.array(ids, np.int32), supervised)

    def _stop(self, ids: list[int], first: int, last: int, calls_tools: bool) -> int:
        """Behind the token that ends the turn; what the template adds after it is not the model's to say."""
        if calls_tools:  # calls may be written with special tokens of their own
            found = [place for place in range(first, last) if ids[place] in self.stop_ids]
            found = found or [place for place in range(first, last) if ids[place] in self._special_ids][-1:]
            return found[0] + 1 if found else last
        for place in range(first, last):
            if ids[place] in self._special_ids:
                return place + 1
        return last


class _Positions:
    """Which token begins at or after a character of the encoded text."""

    def __init__(self, encoding: Any, length: int) -> None:
        self._encoding, self._length = encoding, length
        self._tokens = len(encoding)
        self._begins: NDArray[np.int64] | None = None

    def at(self, position: int) -> int:
        if position >= self._length:
            return self._tokens
        token = self._encoding.char_to_token(position)  # a search in compiled code; all offsets would be a list
        if token is not None:
            begin = self._encoding.token_to_chars(token)[0]
            return int(token) if begin >= position else int(token) + 1
        if self._begins is None:  # a character that no token has, as where a normalizer drops it
            self._begins = np.array([begin for begin, _ in self._encoding.offsets], np.int64)
        return int(np.searchsorted(self._begins, position))


def conversation_of(record: Record, *, rejected: bool = False) -> Conversation:
    """What is tokenized of a record: a preference is its prompt with the chosen (or rejected) continuation.

    Raises:
        DataError: if the metadata's ``supervised_spans`` are no character spans of the last assistant turn.
    """
    messages = record.messages + (record.rejected if rejected else record.chosen)
    spans = None if rejected else record.metadata.get("supervised_spans")
    return Conversation(messages, record.tools, _spans(spans, messages) if spans is not None else None)


def encode_record(chat: Chat, record: Record, train_on: TrainOn = TrainOn.ALL_ASSISTANT_TURNS) -> Encoded:
    """Tokens of a record: assistant turns of a conversation supervised, or all tokens of a raw text.

    Raises:
        DataError: as `Chat.encode`, or if its ``supervised_spans`` do not fit.
    """
    if record.messages:
        return chat.encode_conversation(conversation_of(record), train_on)
    return chat.encode_text(record.text or "")


def _spans(value: Any, messages: Sequence[Message]) -> tuple[tuple[int, int], ...]:
    answers = [message.content for message in messages if message.role == "assistant"]
    length = len(answers[-1]) if answers else 0
    try:
        spans = tuple((int(start), int(end)) for start, end in value)
    except (TypeError, ValueError):
        spans = ((-1, -1),)
    if not all(0 <= start < end <= length for start, end in spans):
        raise DataError(
            f"supervised_spans: expected [[start, end], ...] within the {length} characters of the last assistant "
            f"turn, found {value!r:.60}"
        )
    return spans

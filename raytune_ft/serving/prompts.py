"""Prompts to token ids: short ones at once, long ones beside the event loop, hopeless ones not at all."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any
from weakref import WeakKeyDictionary

from raytune_ft.core.errors import DataError
from raytune_ft.core.records import Message
from raytune_ft.models.chat import Chat
from raytune_ft.models.layout import Conversation
from raytune_ft.serving.engines import TransformersEngine
from raytune_ft.serving.faults import ApiError

_SHORT = 4096
"""Characters that are tokenized in the event loop; longer texts would hold up the others' tokens."""
_TURN = 24
"""Characters that a template may write around a turn, roughly."""

_MARKS, _STAND_INS = 0xF0000, 0x100000
"""Two of Unicode's areas for private use: characters that no template writes."""


class Prompts:
    """Tokenizes what requests send, with the errors that they are answered with."""

    def __init__(self, engine: TransformersEngine) -> None:
        self._engine = engine
        self._longest: WeakKeyDictionary[Chat, int | None] = WeakKeyDictionary()

    async def of_chat(
        self, messages: Sequence[Message], chat: Chat, variables: Mapping[str, Any] | None = None
    ) -> Sequence[int]:
        """The conversation through the chat template, with variables of its own; see `conversation_ids`.

        Raises:
            ApiError: 400, if the template refuses it, a variable is not the request's to set, or it is beyond the
                context for certain.
        """
        _check_variables(chat, variables or {})
        characters = sum(len(message.content) for message in messages)
        tokenize = partial(conversation_ids, chat, messages, variables)
        beside = characters + _TURN * len(messages) + sum(map(len, _texts(variables))) > _SHORT
        if not beside:
            spelled = chat.special_text(Conversation(tuple(messages)))
            # The first message that spells a special token makes a tokenizer, which takes a while.
            tokenize, beside = partial(_ids, chat, messages, variables, spelled), spelled is not None
        try:
            return await self._tokenized(characters, chat, tokenize, "messages", beside=beside)
        except DataError as error:
            raise ApiError(400, str(error), param="messages") from None

    async def of_completion(self, prompt: str | list[int], chat: Chat) -> Sequence[int]:
        """A text as the tokenizer begins texts, or token ids as they are.

        Raises:
            ApiError: 400, for an empty text, unknown tokens, or a text beyond the context for certain.
        """
        if isinstance(prompt, str):
            text = prompt
            tokenize = lambda: chat.encode_text(text, closed=False).input_ids  # noqa: E731
            ids = await self._tokenized(len(text), chat, tokenize, "prompt", beside=len(text) > _SHORT)
            if not ids:
                raise ApiError(400, "prompt: is empty", param="prompt")
            return ids
        vocabulary = self._engine.loaded.model.get_input_embeddings().weight.shape[0]
        beyond = next((token for token in prompt if token >= vocabulary), None)
        if beyond is not None:
            raise ApiError(400, f"prompt: {beyond} is no token of this model's {vocabulary}", param="prompt")
        return prompt

    async def _tokenized(
        self,
        characters: int,
        chat: Chat,
        tokenize: Callable[[], Sequence[int]],
        param: str,
        *,
        beside: bool,
    ) -> Sequence[int]:
        if chat not in self._longest:
            self._longest[chat] = _longest_token(chat)
        limit, longest = self._engine.context_tokens, self._longest[chat]
        if limit is not None and longest is not None and characters > limit * longest:
            raise ApiError(
                400,
                f"the prompt's {characters} characters are at least {characters // longest} tokens, beyond this "
                f"model's context of {limit}; shorten the {param}",
                param=param,
                code="context_length_exceeded",
            )
        return await asyncio.to_thread(tokenize) if beside else tokenize()


def _texts(variables: Mapping[str, Any] | None) -> list[str]:
    return [value for value in (variables or {}).values() if isinstance(value, str)]


def _check_variables(chat: Chat, variables: Mapping[str, Any]) -> None:
    for name, value in variables.items():
        param = f"chat_template_kwargs.{name}"
        if name in chat.tokenizer.special_tokens_map:
            raise ApiError(400, f"{param}: is the tokenizer's own, and no request's to set", param=param)
        spelled = chat.spelled_in(value) if isinstance(value, str) else None
        if spelled is not None:
            raise ApiError(400, f"{param}: must not spell out special tokens (found {spelled!r})", param=param)


def conversation_ids(
    chat: Chat, messages: Sequence[Message], variables: Mapping[str, Any] | None = None
) -> Sequence[int]:
    """The conversation through the chat template; what a message spells of special tokens stays text.

    Else whoever writes a message could end it and begin another role's.

    Raises:
        DataError: if the template refuses the conversation, or the tokenizer cannot read such a spelling as text.
    """
    return _ids(chat, messages, variables, chat.special_text(Conversation(tuple(messages))))


def _ids(
    chat: Chat, messages: Sequence[Message], variables: Mapping[str, Any] | None, spelled: str | None
) -> Sequence[int]:
    if spelled is None:
        return chat.prompt_ids(messages, variables=variables)
    ids = _as_text(chat, messages, variables)
    if ids is None:
        raise DataError(
            f"a message spells {spelled!r}, a special token that this model cannot read as text; leave it out"
        )
    return ids


def _as_text(chat: Chat, messages: Sequence[Message], variables: Mapping[str, Any] | None) -> list[int] | None:
    """As `Chat.prompt_ids`, with special tokens in messages as text; None where that cannot be had.

    What messages spell hides behind marks while the template is rendered, so that its own special tokens can be told.
    """
    literal = _literal(chat)
    taken = {character for message in messages for character in message.content}.union(*_texts(variables))
    free = (mark for mark in map(chr, range(_MARKS, _STAND_INS)) if mark not in taken)
    hidden: dict[str, str] = {}

    def hide(found: re.Match[str]) -> str:
        mark = next(free)
        hidden[mark] = found.group()
        return mark

    try:
        masked = [replace(message, content=literal.special.sub(hide, message.content)) for message in messages]
    except StopIteration:
        return None
    text = chat.render(masked, add_generation_prompt=True, variables=variables)
    # With a harmless letter in their places both ways of reading must agree. They do not where a message holds a
    # stand-in, and may not for every tokenizer.
    harmless = text.translate(dict.fromkeys(map(ord, hidden), "x"))
    ordinary = list(chat.tokenizer(harmless, add_special_tokens=False)["input_ids"])
    if literal.ids(harmless, None) != ordinary:
        return None
    ids = literal.ids(text, hidden)
    special = set(literal.own.values()) - {chat.tokenizer.unk_token_id}
    counts = [sum(token in special for token in found) for found in (ids, ordinary)]
    return ids if counts[0] == counts[1] else None


@dataclass(frozen=True)
class _Literal:
    """A tokenizer to which special tokens are text like any other, and stand-ins are the special tokens."""

    encoder: Any
    special: re.Pattern[str]
    stand_ins: dict[str, str]
    """Of each special token, a character."""
    own: dict[int, int]
    """From the encoder's ids of the stand-ins to those of the special tokens."""

    def ids(self, text: str, hidden: Mapping[str, str] | None) -> list[int]:
        """Token ids of `text`, its special tokens read as such, and each mark as the text that it hides."""
        text = self.special.sub(lambda found: self.stand_ins[found.group()], text)
        found = self.encoder.encode(
            text.translate({ord(mark): text for mark, text in (hidden or {}).items()}), add_special_tokens=False
        ).ids
        return [self.own.get(token, token) for token in found]


@lru_cache(maxsize=8)
def _literal(chat: Chat) -> _Literal:
    from tokenizers import AddedToken, Tokenizer

    encoder = Tokenizer.from_str(chat.tokenizer.backend_tokenizer.to_str())
    encoder.no_truncation()
    encoder.no_padding()
    encoder.encode_special_tokens = True
    special = {place: token for place, token in chat.tokenizer.added_tokens_decoder.items() if token.special}
    stand_ins = {str(token): chr(_STAND_INS + number) for number, token in enumerate(special.values())}
    own: dict[int, int] = {}
    for place, token in special.items():
        sides = {side: getattr(token, side) for side in ("single_word", "lstrip", "rstrip", "normalized")}
        encoder.add_tokens([AddedToken(stand_ins[str(token)], special=False, **sides)])
        stand_in: Any = encoder.token_to_id(stand_ins[str(token)])
        own[stand_in] = place
    words = "|".join(map(re.escape, sorted(stand_ins, key=len, reverse=True)))
    return _Literal(encoder, re.compile(words), stand_ins, own)


def _longest_token(chat: Chat) -> int | None:
    """Most characters that one token stands for; None where a normalizer may drop some before."""
    backend = chat.tokenizer.backend_tokenizer
    kind = type(backend.normalizer).__name__
    if backend.normalizer is not None and kind != "NFC":
        return None
    composed = 3 if kind == "NFC" else 1  # NFC makes one character of at most three
    return composed * max(map(len, backend.get_vocab(with_added_tokens=True)))

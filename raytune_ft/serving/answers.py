"""OpenAI's completion protocols as they go out: bodies, streamed chunks, log-probabilities and usage."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol

from raytune_ft.models.sampling import TokenLogprob
from raytune_ft.models.text_stream import TextStream
from raytune_ft.serving.tickets import Progress

Finish = Literal["stop", "length"]
DONE = "data: [DONE]\n\n"
_CONTEXT = 6
"""Tokens before another one that its text may depend on."""


class Tokenizer(Protocol):
    """What turns a token id into its text."""

    def decode(self, token_ids: Any, **options: Any) -> Any:
        """The text of token ids."""


@dataclass
class Place:
    """Where the next token stands: behind which tokens, the last of them, and behind how much of the choice's text."""

    before: list[int] = field(default_factory=list)
    answered: list[int] = field(default_factory=list)
    """Of the answer alone: its text begins anew, where a tokenizer may leave out a space."""
    shown: TextStream | None = None
    """The answer's text as the client gets it, so that places in it are its own; None before its first token."""
    offset: int = 0


@dataclass
class Choice:
    """One of a request's answers, as far as it has come.

    `prompt` and `first_token` are what it goes on from, if that is echoed; `behind` are the prompt's tokens, if
    it is not.
    """

    index: int
    prompt: str = ""
    first_token: int | None = None
    behind: Sequence[int] = ()
    text: str = ""
    tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: Finish | None = None
    opened: bool = False
    """Whether an event of it went out."""
    place: Place = field(init=False)
    """Behind the log-probabilities that were told."""

    def __post_init__(self) -> None:
        self.place = Place(list(self.behind))

    def take(self, progress: Progress) -> None:
        """Adds what came."""
        self.text += progress.text
        self.tokens = progress.tokens
        self.logprobs += progress.logprobs
        self.prompt_logprobs += progress.prompt_logprobs
        self.finish_reason = progress.finish_reason


@dataclass(frozen=True)
class Answer:
    """What all bodies and chunks of one request have in common; `chat` says which of the two protocols it is."""

    model: str
    tokenizer: Tokenizer
    chat: bool
    prompt_tokens: int
    with_logprobs: bool = False
    without_text: bool = False
    """Whether the generated text is left out (``max_tokens: 0``)."""
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))
    _texts: dict[tuple[int, ...], str] = field(default_factory=dict, repr=False, compare=False)

    @property
    def sent_id(self) -> str:
        """The id as the client gets it, and names it in feedback."""
        return f"{'chatcmpl' if self.chat else 'cmpl'}-{self.id}"

    def usage(self, completion_tokens: int) -> dict[str, int]:
        """Tokens of the prompts (with the template's) and of the answers (without the one that ends each)."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self.prompt_tokens + completion_tokens,
        }

    def completion_tokens(self, choices: Sequence[Choice]) -> int:
        """Tokens of the answers that are told."""
        return 0 if self.without_text else sum(choice.tokens for choice in choices)

    def body(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The whole answer."""
        kind = "chat.completion" if self.chat else "text_completion"
        told = [self._whole(choice) for choice in choices]
        return {**self._head(kind), "choices": told, "usage": self.usage(self.completion_tokens(choices))}

    def event(self, choice: Choice, progress: Progress) -> str | None:
        """The event of a progress that the choice has taken; None if there is nothing to tell."""
        text = "" if self.without_text else progress.text
        opening, choice.opened = not choice.opened, True
        if opening:
            text = choice.prompt + text
        elif not text and not progress.logprobs and progress.finish_reason is None:
            return None
        first = choice.first_token if opening else None
        logprobs = self._logprobs(choice, first, progress.prompt_logprobs, progress.logprobs)
        content: dict[str, Any] = {"text": text}
        if self.chat:
            role = {"role": "assistant"} if opening else {}
            content = {"delta": {**role, "content": text} if text or opening else {}}
        return self._event(choice.index, content, logprobs, progress.finish_reason)

    def usage_event(self, completion_tokens: int) -> str:
        """The event behind the choices that holds the usage."""
        head = self._head("chat.completion.chunk" if self.chat else "text_completion")
        return event({**head, "choices": [], "usage": self.usage(completion_tokens)})

    def _whole(self, choice: Choice) -> dict[str, Any]:
        text = choice.prompt + ("" if self.without_text else choice.text)
        content: dict[str, Any] = {"text": text}
        if self.chat:
            content = {"message": {"role": "assistant", "content": text, "refusal": None}}
        logprobs = self._logprobs(choice, choice.first_token, choice.prompt_logprobs, choice.logprobs)
        return {"index": choice.index, **content, "logprobs": logprobs, "finish_reason": choice.finish_reason}

    def _event(self, index: int, content: Mapping[str, Any], logprobs: Any, reason: Finish | None) -> str:
        head = self._head("chat.completion.chunk" if self.chat else "text_completion")
        return event({**head, "choices": [{"index": index, **content, "logprobs": logprobs, "finish_reason": reason}]})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.sent_id, "object": kind, "created": self.created, "model": self.model}

    def _logprobs(
        self, choice: Choice, first: int | None, prompt: Sequence[TokenLogprob], generated: Sequence[TokenLogprob]
    ) -> dict[str, Any] | None:
        if not self.with_logprobs:
            return None
        if not self.chat:
            return self._completion_logprobs(choice, first, prompt, () if self.without_text else generated)
        # The token that ends an answer has a probability, but no place in a chat's text.
        beyond = len(choice.logprobs) - choice.tokens if choice.finish_reason else 0
        shown = generated[: len(generated) - beyond]
        return {"content": [self._chat_token(entry, choice.place) for entry in shown], "refusal": None}

    def _completion_logprobs(
        self, choice: Choice, first: int | None, prompt: Sequence[TokenLogprob], generated: Sequence[TokenLogprob]
    ) -> dict[str, Any]:
        place = choice.place
        told: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

        def tell(text: str, width: int, logprob: float | None, top: dict[str, float] | None) -> None:
            for values, value in zip(told.values(), (text, logprob, top, place.offset), strict=True):
                values.append(value)
            place.offset += width

        written = TextStream(_Spelled(self.tokenizer))  # of the prompt, what stands in its text
        if first is not None:  # nothing comes before it, so it has no probability
            text = self._text(first)
            # What the tokenizer begins texts with is not in the prompt as it was written.
            special = not self.tokenizer.decode([first], skip_special_tokens=True)
            unwritten = special and not choice.prompt.startswith(text)
            tell(text, 0 if unwritten else len(written.push(first)), None, None)
            place.before.append(first)
        for entry in prompt:
            text = self._text(entry.token, place.before)
            tell(text, len(written.push(entry.token)), entry.logprob, self._by_text(entry, place.before))
            place.before.append(entry.token)
        place.shown = place.shown or TextStream(self.tokenizer)
        for entry in generated:
            width = len(place.shown.push(entry.token))
            tell(self._text(entry.token, place.before), width, entry.logprob, self._by_text(entry, place.before))
            place.before.append(entry.token)
        place.before = place.before[-_CONTEXT:]
        return told

    def _by_text(self, entry: TokenLogprob, before: Sequence[int]) -> dict[str, float]:
        """The likeliest tokens by their text, the chosen one among them; of two with one text the likelier."""
        found: dict[str, float] = {}
        for token, logprob in (*entry.top, (entry.token, entry.logprob)):
            found.setdefault(self._text(token, before), logprob)
        return found

    def _chat_token(self, entry: TokenLogprob, place: Place) -> dict[str, Any]:
        top = [self._told(token, logprob, place.answered) for token, logprob in entry.top]
        told = {**self._told(entry.token, entry.logprob, place.answered), "top_logprobs": top}
        place.answered = [*place.answered, entry.token][-_CONTEXT:]
        return told

    def _told(self, token: int, logprob: float, before: Sequence[int]) -> dict[str, Any]:
        text = self._text(token, before)
        # Part of a character has no text of its own, and its bytes cannot be told from it.
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}

    def _text(self, token: int, before: Sequence[int] = ()) -> str:
        """A token's text behind others: alone, some tokenizers leave its leading space out."""
        alone = self._decoded((token,))
        if not before or "\ufffd" in alone or self._by_bytes:
            return alone
        context = tuple(before[-_CONTEXT:])
        head, whole = self._decoded(context), str(self.tokenizer.decode([*context, token]))
        return whole[len(head) :] if whole.startswith(head) else alone

    def _decoded(self, tokens: tuple[int, ...]) -> str:
        """Their text; an answer's likeliest tokens are few different ones, and each has one context."""
        if tokens not in self._texts:
            self._texts[tokens] = str(self.tokenizer.decode(list(tokens)))
        return self._texts[tokens]

    @cached_property
    def _by_bytes(self) -> bool:
        """Whether the tokens are pieces of UTF-8, each the same wherever it stands."""
        decoder = getattr(getattr(self.tokenizer, "backend_tokenizer", None), "decoder", None)
        return type(decoder).__name__ == "ByteLevel"


@dataclass(frozen=True)
class _Spelled:
    """A tokenizer that spells special tokens out, as the text of a prompt does."""

    tokenizer: Tokenizer

    def decode(self, token_ids: Any, **_options: Any) -> Any:
        return self.tokenizer.decode(token_ids)


def event(body: Mapping[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def model_card(name: str, created: int, *, parent: str | None = None) -> dict[str, Any]:
    """An entry of ``GET /v1/models``; an adapter names its base as `parent`."""
    card = {"id": name, "object": "model", "created": created, "owned_by": "raytune_ft"}
    return {**card, "parent": parent} if parent else card

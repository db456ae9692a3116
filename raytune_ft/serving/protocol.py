"""OpenAI's completion protocols as they come in: what may be asked for, and what is refused by name."""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, field_validator, model_validator

from raytune_ft.core.records import Message
from raytune_ft.models.config import DecodingConfig
from raytune_ft.models.templates import RENDERED
from raytune_ft.serving.faults import ApiError

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "best_of": (1,),
    "suffix": ("",),
    "tool_calls": ([],),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "top_k": (-1, 0),
    "ignore_eos": (False,),
}
"""Options that are not implemented, with the values under which they change nothing."""
_PASSED_OVER = {
    "metadata", "store", "service_tier", "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "name",
}  # fmt: skip
"""Options that never change an answer."""
_TEMPLATE_CALL = RENDERED | {
    "chat_template",
    "continue_final_message",
    "conversation",
    "max_length",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "sanitize_control_tokens",
    "self",
    "tokenize",
    "tokenizer_kwargs",
    "truncation",
}
"""What transformers' `apply_chat_template` takes itself, so that no template reads it as a variable of its own."""
_MOST_STOPS, _LONGEST_STOP = 16, 256
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class TextPart(BaseModel):
    """A piece of a message's text."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel, extra="allow"):
    """One turn of the conversation in a request; ``developer`` is read as ``system``.

    An assistant's may have no content, as one that only calls tools has: its calls are refused by their own name.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart]

    @model_validator(mode="before")
    @classmethod
    def _nothing_said(cls, turn: Any) -> Any:
        unsaid = isinstance(turn, dict) and turn.get("role") == "assistant" and turn.get("content") is None
        return {**turn, "content": ""} if unsaid else turn

    @field_validator("content", mode="before")
    @classmethod
    def _only_text(cls, content: Any) -> Any:
        parts = [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []
        other = [part["type"] for part in parts if isinstance(part.get("type"), str) and part["type"] != "text"]
        if other:
            raise ValueError(f"parts must be text (got {other[0]!r:.40})")
        return content

    @field_validator("content")
    @classmethod
    def _encodable(cls, content: str | list[TextPart]) -> str | list[TextPart]:
        _refuse_surrogates(_joined(content))
        return content

    def refuse_unsupported(self, where: str) -> None:
        """Checks that the turn has no field that would be silently left out.

        Raises:
            ApiError: 400, naming the field after `where`.
        """
        _refuse_extra(self.model_extra or {}, where)

    def to_message(self) -> Message:
        """The turn as the chat template takes it."""
        return Message("system" if self.role == "developer" else self.role, _joined(self.content))


class StreamOptions(BaseModel):
    """What a stream carries besides text."""

    include_usage: bool = False


class _Request(BaseModel, extra="allow"):
    """What both protocols share."""

    model: str
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int | None = Field(None, ge=1, le=128)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    safety_identifier: str | None = None

    @field_validator("model", "stop")
    @classmethod
    def _encodable(cls, value: str | list[str] | None) -> str | list[str] | None:
        _refuse_surrogates("".join(value or ""))
        return value

    @field_validator("stop")
    @classmethod
    def _few_and_short(cls, value: str | list[str] | None) -> str | list[str] | None:
        given = [value] if isinstance(value, str) else value or []
        if len(given) > _MOST_STOPS or any(len(text) > _LONGEST_STOP for text in given):
            raise ValueError(f"at most {_MOST_STOPS} stop texts of at most {_LONGEST_STOP} characters")
        return value

    def refuse_unsupported(self) -> None:
        """Checks that nothing is asked for that would be silently left out.

        Raises:
            ApiError: 400, naming the option.
        """
        _refuse_extra(self.model_extra or {}, "")

    @property
    def subject(self) -> str | None:
        """Who asks, as A/B tests tell apart; None where the request does not say. It never changes an answer."""
        return self.user or self.safety_identifier or None

    @property
    def choices(self) -> int:
        """Answers a prompt."""
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end the answer; empty ones do not count."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in given if text)

    def limited(
        self, prompt_tokens: int, wanted: int | None, names: tuple[str, str], context_tokens: int | None, most: int
    ) -> DecodingConfig:
        """How an answer is generated: OpenAI's defaults (temperature 1), within the model's context and our limit.

        Args:
            prompt_tokens: of the prompt, the template's included.
            wanted: tokens that the request asks for; None takes what there is room for.
            names: the request's fields for the limit and for the prompt.
            context_tokens: of the model; None where it has no limit.
            most: tokens that an answer may have here.

        Raises:
            ApiError: 400, if the prompt, or the prompt with the answer asked for, is beyond the limits.
        """
        name, prompt = names
        if wanted is not None and wanted > most:
            raise ApiError(400, f"{name}: at most {most} here (got {wanted})", param=name)
        room = most if context_tokens is None else context_tokens - prompt_tokens
        needed = 1 if wanted is None else max(wanted, 1)
        if room < needed:
            raise ApiError(
                400,
                f"the prompt's {prompt_tokens} tokens and an answer of {needed} are beyond this model's context "
                f"of {context_tokens} tokens; shorten the {prompt}" + (f" or {name}" if room > 0 else ""),
                param=prompt if room < 1 else name,
                code="context_length_exceeded",
            )
        return DecodingConfig(
            max_new_tokens=min(room, most) if wanted is None else needed,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=self.top_p or 1.0,
            seed=secrets.randbits(62) if self.seed is None else self.seed,
            stop=self.stops,
        )


class ChatRequest(_Request):
    """The body of ``POST /v1/chat/completions``."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables of the chat template's own, as ``{"enable_thinking": false}``."""

    @field_validator("chat_template_kwargs")
    @classmethod
    def _flat_and_its_own(cls, given: dict[str, Any] | None) -> dict[str, Any] | None:
        for name, value in (given or {}).items():
            if name in _TEMPLATE_CALL:
                raise ValueError(
                    f"{name!r:.60} is set by the endpoint itself; other variables of the template may be set"
                )
            if not isinstance(value, str | int | float | None):
                raise ValueError(f"{name!r:.60} must be a text, a number, true, false or null")
            _refuse_surrogates(f"{name}{value}")
        return given

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    def refuse_unsupported(self) -> None:
        """As of every request, and for the fields of each message."""
        super().refuse_unsupported()
        for place, message in enumerate(self.messages):
            message.refuse_unsupported(f"messages.{place}.")

    @property
    def top(self) -> int | None:
        """How many of the likeliest tokens are told of each place; None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def decoding(self, prompt_tokens: int, *, context_tokens: int | None, max_new_tokens: int) -> DecodingConfig:
        """See `limited`."""
        name = "max_completion_tokens" if self.max_completion_tokens else "max_tokens"
        wanted = self.max_completion_tokens or self.max_tokens
        return self.limited(prompt_tokens, wanted, (name, "messages"), context_tokens, max_new_tokens)


class CompletionRequest(_Request):
    """The body of ``POST /v1/completions``: text (or token ids) that is gone on from, without a chat template."""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    max_tokens: int | None = Field(None, ge=0)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None

    @field_validator("prompt")
    @classmethod
    def _something(cls, prompt: Any) -> Any:
        if isinstance(prompt, list) and (not prompt or any(part in ("", []) for part in prompt)):
            raise ValueError("must not be empty, nor hold an empty prompt")
        texts = [prompt] if isinstance(prompt, str) else [part for part in prompt if isinstance(part, str)]
        _refuse_surrogates("".join(texts))
        return prompt

    @model_validator(mode="after")
    def _nothing_needs_echo(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 gives nothing without echo: true")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or as token ids."""
        given: Any = self.prompt
        if isinstance(given, str) or isinstance(given[0], int):
            return [given]
        return list(given)

    def decoding(self, prompt_tokens: int, *, context_tokens: int | None, max_new_tokens: int) -> DecodingConfig:
        """See `limited`; without a limit an answer has 16 tokens, as OpenAI's."""
        wanted = 16 if self.max_tokens is None else self.max_tokens
        wanted = min(wanted, max_new_tokens) if self.max_tokens is None else wanted
        return self.limited(prompt_tokens, wanted, ("max_tokens", "prompt"), context_tokens, max_new_tokens)


def _refuse_extra(extra: dict[str, Any], where: str) -> None:
    for name, value in extra.items():
        if value is None or name in _PASSED_OVER or value in _NEUTRAL.get(name, ()):
            continue
        raise ApiError(
            400, f"{where}{name}: this option is not supported here", param=where + name, code="unsupported_parameter"
        )


def _joined(content: str | list[TextPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _refuse_surrogates(text: str) -> None:
    """JSON may carry half of a surrogate pair (``"\\ud800"``), which no tokenizer and no answer can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("must be valid Unicode; a lone surrogate cannot be encoded") from None

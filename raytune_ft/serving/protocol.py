"""OpenAI's chat completion protocol: what comes in, what goes out, and errors in its shape."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from raytune_ft.core.records import Message
from raytune_ft.models.config import DecodingConfig

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
}
"""Options that are not implemented, with the values under which they change nothing."""
_PASSED_OVER = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
"""Options that never change an answer."""


class ApiError(Exception):
    """A request that is answered with an HTTP error in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body of the answer."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


class TextPart(BaseModel):
    """A piece of a message's text."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One turn of the conversation in a request; ``developer`` is read as ``system``."""

    model_config = ConfigDict(extra="ignore")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart]

    @field_validator("content")
    @classmethod
    def _encodable(cls, content: str | list[TextPart]) -> str | list[TextPart]:
        _refuse_surrogates(_joined(content))
        return content

    def to_message(self) -> Message:
        """The turn as the chat template takes it."""
        return Message("system" if self.role == "developer" else self.role, _joined(self.content))


class StreamOptions(BaseModel):
    """What a stream carries besides text."""

    include_usage: bool = False


class ChatRequest(BaseModel):
    """The body of ``POST /v1/chat/completions``."""

    model_config = ConfigDict(extra="allow")
    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int | None = Field(None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @field_validator("model", "stop")
    @classmethod
    def _encodable(cls, value: str | list[str] | None) -> str | list[str] | None:
        _refuse_surrogates("".join(value or ""))
        return value

    def refuse_unsupported(self) -> None:
        """Checks that nothing is asked for that would be silently left out.

        Raises:
            ApiError: 400, naming the option.
        """
        if self.n not in {None, 1}:
            raise ApiError(400, f"n: only one answer a request is supported (got {self.n})", param="n")
        for name, value in (self.model_extra or {}).items():
            if value is None or name in _PASSED_OVER or value in _NEUTRAL.get(name, ()):
                continue
            raise ApiError(400, f"{name}: this option is not supported here", param=name, code="unsupported_parameter")

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end the answer; empty ones do not count."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in given if text)

    def decoding(self, prompt_tokens: int, *, context_tokens: int | None, max_new_tokens: int) -> DecodingConfig:
        """How the answer is generated: OpenAI's defaults (temperature 1), within the model's context and our limit.

        Raises:
            ApiError: 400, if the prompt, or the prompt with the answer asked for, is beyond the limits.
        """
        name = "max_completion_tokens" if self.max_completion_tokens else "max_tokens"
        wanted = self.max_completion_tokens or self.max_tokens
        if wanted is not None and wanted > max_new_tokens:
            raise ApiError(400, f"{name}: at most {max_new_tokens} here (got {wanted})", param=name)
        room = max_new_tokens if context_tokens is None else context_tokens - prompt_tokens
        if room < (wanted or 1):
            raise ApiError(
                400,
                f"the prompt's {prompt_tokens} tokens and an answer of {wanted or 1} are beyond this model's context "
                f"of {context_tokens} tokens; shorten the messages" + (f" or {name}" if room > 0 else ""),
                param="messages" if room < 1 else name,
                code="context_length_exceeded",
            )
        return DecodingConfig(
            max_new_tokens=wanted or min(room, max_new_tokens),
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=self.top_p or 1.0,
            seed=secrets.randbits(62) if self.seed is None else self.seed,
            stop=self.stops,
        )


class Answer(BaseModel):
    """A finished answer, ready to be written as one body or as a stream."""

    model: str
    text: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int
    id: str = Field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = Field(default_factory=lambda: int(time.time()))

    @property
    def usage(self) -> dict[str, int]:
        """Tokens of the prompt (with the template's) and of the answer (without the one that ends it)."""
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }

    def body(self) -> dict[str, Any]:
        """The ``chat.completion`` object."""
        message = {"role": "assistant", "content": self.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": self.finish_reason}
        return {**self._head("chat.completion"), "choices": [choice], "usage": self.usage}

    def events(self, *, include_usage: bool) -> Iterator[str]:
        """The answer as server-sent events: role, text (in one piece), end, usage if asked for, and ``[DONE]``."""
        deltas: tuple[tuple[Mapping[str, str], str | None], ...] = (
            ({"role": "assistant", "content": ""}, None),
            ({"content": self.text}, None),
            ({}, self.finish_reason),
        )
        for delta, reason in deltas:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
            yield _event({**self._head("chat.completion.chunk"), "choices": [choice]})
        if include_usage:
            yield _event({**self._head("chat.completion.chunk"), "choices": [], "usage": self.usage})
        yield "data: [DONE]\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def model_card(name: str, created: int) -> dict[str, Any]:
    """An entry of ``GET /v1/models``."""
    return {"id": name, "object": "model", "created": created, "owned_by": "raytune_ft"}


def validation_error(errors: list[dict[str, Any]]) -> ApiError:
    """The 400 for a body that pydantic refused; what the client sent is not repeated."""
    first = errors[0]
    if first["type"] == "json_invalid":
        where = f" at character {first['loc'][-1]}" if isinstance(first["loc"][-1], int) else ""
        return ApiError(400, f"the body is not valid JSON{where}: {first.get('ctx', {}).get('error', first['msg'])}")
    # without the names of a union's members
    path = [str(part) for part in first["loc"] if part not in {"body", "str"} and "[" not in str(part)]
    param = ".".join(path) or None
    if param is None:
        return ApiError(400, "a JSON object is needed as the body")
    reason = str(first["msg"]).removeprefix("Value error, ")
    return ApiError(400, f"{param}: {reason[0].lower()}{reason[1:]}", param=param)


def _joined(content: str | list[TextPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _refuse_surrogates(text: str) -> None:
    """JSON may carry half of a surrogate pair (``"\\ud800"``), which no tokenizer and no answer can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("must be valid Unicode; a lone surrogate cannot be encoded") from None


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"

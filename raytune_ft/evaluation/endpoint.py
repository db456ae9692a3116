"""Answers of a served model: concurrent requests, retried with backoff; what fails is marked, never scored.

Any endpoint that speaks OpenAI's chat completions is asked; for likelihoods, one whose completions echo their prompt. A
body that is no such answer counts as a failure like a timeout: it says something of the endpoint, not of the model.
"""

from __future__ import annotations

import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from raytune_ft.core.errors import ModelError, first_line
from raytune_ft.core.grammar import number_of
from raytune_ft.core.records import Message
from raytune_ft.evaluation.config_inference import EndpointConfig
from raytune_ft.evaluation.record_files import HALVES
from raytune_ft.models.config import DecodingConfig

logger = logging.getLogger("raytune_ft")

_LONGEST_WAIT_S = 30.0
_AGAIN = {408, 409, 425, 429}
_FINISHED = {"stop", "length"}


@dataclass(frozen=True)
class Request:
    """What an endpoint is asked: the conversation, its tools (JSON text), and the seed of a sampled answer."""

    messages: Sequence[Message]
    tools: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class Reply:
    """The answer to a request, or why there is none after so many attempts."""

    answer: str | None = None
    finish_reason: str | None = None
    answer_tokens: int | None = None
    error: str | None = None
    attempts: int = 1
    logprobs: tuple[float, ...] = ()
    """Of an echoed prompt's tokens but the first, which follows nothing."""


class _AttemptError(Exception):
    """One attempt that gave no answer; `again` says whether another may, `after_s` when the endpoint wants it."""

    def __init__(self, reason: str, *, again: bool = True, after_s: float | None = None) -> None:
        super().__init__(reason)
        self.again, self.after_s = again, after_s


class EndpointClient:
    """A served model under its URL, ``http://host:8000/v1`` or, where it serves several, ``...#name``."""

    def __init__(self, url: str, config: EndpointConfig, decoding: DecodingConfig, *, concurrency: int) -> None:
        from openai import OpenAI

        self.url, _, name = url.partition("#")
        self.config, self.decoding, self.concurrency = config, decoding, concurrency
        key = os.environ.get(config.api_key_variable) or "none"
        self._client = OpenAI(base_url=self.url, api_key=key, timeout=config.timeout_s, max_retries=0)
        self._name = name or None
        self._naming = threading.Lock()
        self._failed_in_a_row = 0

    @property
    def model(self) -> str:
        """The model's name; where the URL has none, that of the only model served.

        Raises:
            ModelError: if it serves several, or does not say which.
        """
        with self._naming:
            if self._name is None:
                try:
                    served = [str(model.id) for model in self._client.models.list().data]
                except Exception as error:  # noqa: BLE001 - whatever a wrong address answers
                    raise ModelError(
                        f"{self.url}: does not list its models ({first_line(error)[:200]}). Is it running, and does "
                        "the URL end with /v1? The model can also be named: URL#name"
                    ) from None
                if len(served) != 1:
                    known = ", ".join(served) or "none"
                    raise ModelError(f"{self.url}: serves {known}; say which by {self.url}#name")
                self._name = served[0]
            return self._name

    def ask(self, requests: Sequence[Request], on_reply: Callable[[int, Reply], None]) -> None:
        """Asks all; `on_reply` is told each request's number and reply as they come, from this thread.

        Raises:
            ModelError: if the endpoint refuses everybody (401, 403, 404).
        """
        self._ask([partial(self._answer, request) for request in requests], on_reply)

    def score(self, rows: Sequence[Sequence[int]], on_reply: Callable[[int, Reply], None]) -> None:
        """Asks for the log-probabilities of token ids; as `ask`."""
        self._ask([partial(self._echo, list(row)) for row in rows], on_reply)

    def _ask(self, attempts: Sequence[Callable[[], Reply]], on_reply: Callable[[int, Reply], None]) -> None:
        _ = self.model  # once, before the threads
        mended = 0
        with ThreadPoolExecutor(self.concurrency) as pool:
            asked = {pool.submit(self._reply, attempt): number for number, attempt in enumerate(attempts)}
            try:
                for done in as_completed(asked):
                    reply = done.result()
                    mended += HALVES.search(reply.answer or "") is not None
                    on_reply(asked[done], _whole(reply))
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        if mended:
            logger.warning(
                "%s: %s held half characters (lone surrogates), which no file can keep; U+FFFD stands for them",
                self.url,
                number_of(mended, "answer"),
            )

    def _reply(self, attempted: Callable[[], Reply]) -> Reply:
        if self._failed_in_a_row >= self.config.give_up_after:
            reason = f"not asked: the {self.config.give_up_after} rows before had no answer"
            return Reply(error=reason, attempts=0)
        wait = self.config.backoff_s
        for attempt in range(1, self.config.max_retries + 2):
            try:
                reply = attempted()
            except _AttemptError as failure:
                if not failure.again or attempt > self.config.max_retries:
                    self._failed_in_a_row += failure.again  # what only this row provokes says nothing of the others
                    return Reply(error=str(failure), attempts=attempt)
                # Spread, so that those that failed together do not come back together.
                pause = min(wait, _LONGEST_WAIT_S) * random.uniform(0.5, 1.0)
                time.sleep(min(failure.after_s or pause, 2 * _LONGEST_WAIT_S))
                wait *= 2
            else:
                self._failed_in_a_row = 0
                return replace(reply, attempts=attempt)
        raise AssertionError("the last attempt returns")

    def _answer(self, request: Request) -> Reply:
        body = self._body(request)
        return _parsed(self._text_of(lambda: self._client.chat.completions.with_raw_response.create(**body)))

    def _echo(self, ids: list[int]) -> Reply:
        body: dict[str, Any] = {"prompt": ids, "echo": True, "logprobs": 0, "max_tokens": 0, "temperature": 0}
        create = self._client.completions.with_raw_response.create
        return _echoed(self._text_of(lambda: create(model=self.model, **body)), len(ids))

    def _text_of(self, attempt: Callable[[], Any]) -> str:
        """The body of a successful response.

        Raises:
            _AttemptError: if there was none.
            ModelError: if the endpoint refuses everybody.
        """
        from openai import APIConnectionError, APIStatusError, APITimeoutError, OpenAIError

        try:
            raw = attempt()
            return str(raw.text if isinstance(raw.text, str) else raw.text())
        except APITimeoutError:
            raise _AttemptError(f"no answer within {self.config.timeout_s:g} s") from None
        except APIConnectionError as error:
            raise _AttemptError(f"no connection ({first_line(error.__cause__ or error)[:200]})") from None
        except APIStatusError as error:
            raise self._refusal(error) from None
        except OpenAIError as error:
            raise _AttemptError(f"no usable answer ({first_line(error)[:200]})") from None

    def _refusal(self, error: Any) -> Exception:
        status, said = int(error.status_code), first_line(error)[:200]
        if status in {401, 403, 404}:
            return ModelError(
                f"{self.url}: refuses requests for {self.model} with {status} ({said}). Check the URL, the model's "
                f"name (URL#name) and the key in ${self.config.api_key_variable}"
            )
        after = error.response.headers.get("retry-after", "")
        return _AttemptError(
            f"status {status} ({said})",
            again=status in _AGAIN or status >= 500,
            after_s=float(after) if after.replace(".", "", 1).isdigit() else None,
        )

    def _body(self, request: Request) -> dict[str, Any]:
        decoding = self.decoding
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [_turn(message) for message in request.messages],
            "temperature": decoding.temperature,
            "max_tokens": decoding.max_new_tokens,
        }
        if decoding.temperature > 0:
            body |= {"top_p": decoding.top_p, "seed": request.seed >> 2}  # OpenAI's seeds have a sign
        if decoding.stop:
            body["stop"] = list(decoding.stop)
        if request.tools:
            body["tools"] = json.loads(request.tools)
        return body


def _turn(message: Message) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        turn["tool_calls"] = json.loads(message.tool_calls)
    named = {"tool_call_id": message.tool_call_id, "name": message.name}
    return {**turn, **{field: value for field, value in named.items() if value is not None}}


def _whole(reply: Reply) -> Reply:
    """The reply with U+FFFD in the place of half characters."""
    answer, error = (None if text is None else HALVES.sub("\ufffd", text) for text in (reply.answer, reply.error))
    return replace(reply, answer=answer, error=error)


def _parsed(text: str) -> Reply:
    """The reply in the body of a successful request.

    Raises:
        _AttemptError: if it is no chat completion with a text and an end.
    """
    nonsense = _AttemptError(f"answered with something else than a chat completion: {text[:80]!r}")
    try:
        body = json.loads(text)
        choice = body["choices"][0]
        content, reason = choice["message"]["content"], choice["finish_reason"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        raise nonsense from None
    if content is None and choice["message"].get("tool_calls"):
        raise _AttemptError("answered with tool calls and without a text, which alone can be measured", again=False)
    if not isinstance(content, str):
        raise nonsense
    if reason not in _FINISHED:
        raise _AttemptError(f"the answer was ended by {reason!r}, neither done nor at its length", again=False)
    usage: Mapping[str, Any] = body.get("usage") or {}
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return Reply(content, reason, tokens if isinstance(tokens, int) else None)


def _echoed(text: str, tokens: int) -> Reply:
    """The log-probabilities in the body of an echoed prompt of so many tokens.

    Raises:
        _AttemptError: if it holds something else.
    """
    try:
        found = json.loads(text)["choices"][0]["logprobs"]["token_logprobs"]
        behind = tuple(float(value) for value in found[1:tokens])
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        behind = ()
    if len(behind) != tokens - 1:
        raise _AttemptError(
            f"gave no log-probabilities of a prompt that it was to echo: {text[:80]!r}; leave out the metrics that "
            "need likelihoods, or measure them on the model's folder",
            again=False,
        )
    return Reply(logprobs=behind)

"""A served model that is down, slow or answers nonsense: real HTTP against a small server."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from raytune_ft.core.errors import ModelError
from raytune_ft.core.records import Message
from raytune_ft.evaluation.config_inference import EndpointConfig
from raytune_ft.evaluation.endpoint import EndpointClient, Reply, Request
from raytune_ft.models.config import DecodingConfig


def ask(url: str, texts: list[str], *, decoding: DecodingConfig | None = None, **settings: object) -> list[Reply]:
    waits = {"backoff_s": 0.01} if settings.get("max_retries") != 0 else {}
    config = EndpointConfig(**{**waits, "timeout_s": 5, **settings})
    client = EndpointClient(url, config, decoding or DecodingConfig(), concurrency=config.concurrency)
    replies: dict[int, Reply] = {}
    client.ask([Request([Message("user", text)]) for text in texts], replies.__setitem__)
    return [replies[number] for number in range(len(texts))]


def test_every_request_gets_its_own_answer_with_so_many_under_way(server: Any) -> None:
    def slowly(text: str, times: int) -> tuple[int, object]:
        time.sleep(0.05)
        return 200, server.completion(text.upper(), "length" if text == "c" else "stop")

    server.behaviour = slowly
    replies = ask(server.url, list("abcdef"), concurrency=3)
    assert [reply.answer for reply in replies] == list("ABCDEF")
    assert [reply.finish_reason for reply in replies] == ["stop", "stop", "length", "stop", "stop", "stop"]
    assert replies[0].answer_tokens == 3
    assert 2 <= server.most_at_once <= 3


def test_what_failed_is_sent_again_until_it_is_answered(server: Any) -> None:
    troubles: dict[str, list[tuple[int, object]]] = {
        "busy": [(429, {"error": {"message": "later"}}), (503, "no")],
        "nonsense": [(200, "<html>proxy</html>"), (200, {"choices": []}), (200, server.completion(None))],
    }
    server.behaviour = lambda text, times: (
        troubles[text][times - 1] if times <= len(troubles.get(text, [])) else (200, server.completion("done"))
    )
    replies = ask(server.url, ["busy", "nonsense", "fine"])
    assert [(reply.answer, reply.attempts) for reply in replies] == [("done", 3), ("done", 4), ("done", 1)]


def test_a_row_that_stays_without_an_answer_is_marked_with_the_reason(server: Any) -> None:
    server.behaviour = lambda text, times: {
        "nonsense": (200, "{}"),
        "long": (400, {"error": {"message": "beyond the context"}}),
        "filtered": (200, server.completion("x", "content_filter")),
    }.get(text, (200, server.completion("fine")))
    nonsense, long, filtered, fine = ask(server.url, ["nonsense", "long", "filtered", "fine"], max_retries=2)
    assert nonsense.answer is None
    assert nonsense.error == "answered with something else than a chat completion: '{}'"
    assert nonsense.attempts == 3
    assert long.error is not None and "status 400" in long.error and "beyond the context" in long.error
    assert long.attempts == 1
    assert filtered.error is not None and "'content_filter'" in filtered.error
    assert fine == Reply("fine", "stop", 3)


def test_half_characters_are_replaced_and_that_is_said(server: Any, caplog: pytest.LogCaptureFixture) -> None:
    server.behaviour = lambda text, times: {
        "refused": (400, {"error": {"message": "no \ud83d"}}),
        "half": (200, server.completion("a \ud83d b")),
    }.get(text, (200, server.completion("\U0001f600")))
    half, fine, refused = ask(server.url, ["half", "fine", "refused"])
    assert (half.answer, fine.answer) == ("a \ufffd b", "\U0001f600")
    assert refused.error is not None
    refused.error.encode()
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "1 answer held half characters (lone surrogates), which no file can keep; U+FFFD stands for them"
    ]


def test_tool_calls_without_a_text_are_told_at_once(server: Any) -> None:
    called = server.completion(None, "tool_calls")
    called["choices"][0]["message"]["tool_calls"] = [{"id": "1", "type": "function", "function": {"name": "f"}}]
    server.behaviour = lambda text, times: (200, called if text == "call" else "[" * 9000)
    call, deep = ask(server.url, ["call", "deep"], max_retries=1)
    assert call.error is not None
    assert call.error.startswith("answered with tool calls and without a text")
    assert (call.attempts, deep.attempts) == (1, 2)


def test_turns_of_tools_name_the_call_that_they_answer(server: Any) -> None:
    calls = [{"id": "call00001", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    turns = (
        Message("user", "q"),
        Message("assistant", "", json.dumps(calls), weight=0),
        Message("tool", "42", tool_call_id="call00001", name="f"),
    )
    client = EndpointClient(server.url, EndpointConfig(), DecodingConfig(), concurrency=1)
    client.ask([Request(turns)], lambda place, reply: None)
    assert server.bodies[0]["messages"] == [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "42", "tool_call_id": "call00001", "name": "f"},
    ]


def test_likelihoods_are_those_of_an_echoed_prompt(server: Any) -> None:
    def echo(text: str, times: int) -> tuple[int, object]:
        values = {"[7, 8, 9]": [None, -0.5, -2.0], "[7]": [None], "[1, 2]": [None, -1.0, -3.0]}
        if text == "[4, 5]":
            return 200, server.completion("an answer, not an echo")
        return 200, {"choices": [{"logprobs": {"token_logprobs": values[text]}}]}

    server.behaviour = echo
    client = EndpointClient(server.url, EndpointConfig(backoff_s=0.01), DecodingConfig(), concurrency=2)
    replies: dict[int, Reply] = {}
    client.score([[7, 8, 9], [7], [1, 2], [4, 5]], replies.__setitem__)
    assert [replies[number].logprobs for number in range(3)] == [(-0.5, -2.0), (), (-1.0,)]  # a generated token is not
    assert replies[3].error is not None
    assert replies[3].error.startswith("gave no log-probabilities of a prompt that it was to echo")
    assert {key: server.bodies[0][key] for key in ("echo", "max_tokens", "logprobs")} == {
        "echo": True, "max_tokens": 0, "logprobs": 0,
    }  # fmt: skip


def test_a_slow_endpoint_is_a_timeout_not_an_answer(server: Any) -> None:
    def slow(text: str, times: int) -> tuple[int, object]:
        time.sleep(1.8)
        return 200, server.completion("late")

    server.behaviour = slow
    [reply] = ask(server.url, ["a"], timeout_s=0.6, max_retries=1)
    assert reply.error == "no answer within 0.6 s"
    assert reply.attempts == 2


def test_an_endpoint_that_went_down_is_not_asked_for_every_row(server: Any) -> None:
    server.http.shutdown()
    server.http.server_close()
    replies = ask(f"{server.url}#tiny", list("abcdefghij"), concurrency=1, max_retries=0, give_up_after=3)
    assert [reply.attempts for reply in replies] == [1] * 3 + [0] * 7
    assert all(reply.error and "no connection" in reply.error for reply in replies[:3])
    assert replies[3].error == "not asked: the 3 rows before had no answer"


def test_an_endpoint_that_refuses_everybody_is_said_at_once(server: Any) -> None:
    server.behaviour = lambda text, times: (404, {"error": {"message": "no such model"}})
    with pytest.raises(ModelError, match="refuses requests for tiny with 404"):
        ask(server.url, ["a", "b"])


def test_an_endpoint_with_several_models_wants_a_name(server: Any) -> None:
    server.served = ["one", "two"]
    with pytest.raises(ModelError, match="serves one, two; say which by"):
        ask(server.url, ["a"])
    assert ask(f"{server.url}#two", ["a"])[0].answer == "A"
    assert server.bodies[-1]["model"] == "two"


def test_an_address_where_nothing_serves_is_said_at_once() -> None:
    with pytest.raises(ModelError, match="does not list its models"):
        ask("http://127.0.0.1:9/v1", ["a"])


def test_decoding_is_asked_for_as_the_settings_say(server: Any) -> None:
    ask(server.url, ["a"], decoding=DecodingConfig(max_new_tokens=7, stop=("\n",)))
    assert {key: server.bodies[0][key] for key in ("temperature", "max_tokens", "stop")} == {
        "temperature": 0.0,
        "max_tokens": 7,
        "stop": ["\n"],
    }
    ask(server.url, ["a"], decoding=DecodingConfig(temperature=0.7, top_p=0.5))
    assert server.bodies[1]["top_p"] == 0.5
    assert "seed" in server.bodies[1]

"""OpenAI's protocol without a server: what is refused, what is filled in, and what goes out."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import ValidationError

from raytune_ft.core.records import Message
from raytune_ft.serving.protocol import Answer, ApiError, ChatMessage, ChatRequest, validation_error


def request(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields})


def refused(**fields: Any) -> ApiError:
    with pytest.raises(ValidationError) as caught:
        request(**fields)
    return validation_error([dict(error) for error in caught.value.errors()])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": [1]}, "stop"),
        ({"seed": 2**63}, "seed"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "clown", "content": "hi"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ],
)
def test_a_value_out_of_range_is_a_400_that_names_it(fields: dict[str, Any], param: str):
    error = refused(**fields)
    assert (error.status, error.kind, error.param) == (400, "invalid_request_error", param)
    assert str(error).startswith(f"{param}: ")


def test_an_error_does_not_repeat_what_was_said():
    assert "secret" not in str(refused(messages=[{"role": "user", "content": 1, "name": "secret"}]))


@pytest.mark.parametrize(
    "fields", [{"messages": [{"role": "user", "content": "\ud800"}]}, {"model": "\ud800"}, {"stop": ["\ud800"]}]
)
def test_text_that_is_no_unicode_is_a_400(fields: dict[str, Any]):
    error = refused(**fields)
    assert error.status == 400
    assert "lone surrogate" in str(error)
    assert error.param in {"messages.0.content", "model", "stop"}


@pytest.mark.parametrize("option", [{"logprobs": True}, {"tools": [{"type": "function"}]}, {"n": 2}, {"guided": 1}])
def test_an_option_that_would_change_the_answer_is_refused_by_name(option: dict[str, Any]):
    with pytest.raises(ApiError, match=next(iter(option))) as caught:
        request(**option).refuse_unsupported()
    assert caught.value.status == 400


def test_options_that_change_nothing_are_accepted():
    request(n=1, logprobs=False, presence_penalty=0, user="ana", tools=None, tool_choice="none").refuse_unsupported()


def test_openais_defaults_are_ours():
    decoding = request().decoding(10, context_tokens=100, max_new_tokens=1000)
    assert (decoding.temperature, decoding.top_p, decoding.max_new_tokens, decoding.stop) == (1.0, 1.0, 90, ())
    assert request(stop="END").decoding(10, context_tokens=None, max_new_tokens=7).stop == ("END",)
    assert request(max_completion_tokens=3, max_tokens=5).decoding(1, context_tokens=9, max_new_tokens=9) \
        .max_new_tokens == 3  # fmt: skip


def test_requests_without_a_seed_get_different_ones():
    seeds = {request().decoding(1, context_tokens=9, max_new_tokens=9).seed for _ in range(8)}
    assert len(seeds) == 8


@pytest.mark.parametrize(
    ("prompt", "wanted", "message"),
    [
        (100, None, "beyond this model's context of 100 tokens; shorten the messages$"),
        (90, 11, "the prompt's 90 tokens and an answer of 11 .* or max_tokens$"),
        (10, 51, "max_tokens: at most 50 here"),
    ],
)
def test_more_than_the_context_or_the_limit_is_refused(prompt: int, wanted: int | None, message: str):
    with pytest.raises(ApiError, match=message):
        request(max_tokens=wanted).decoding(prompt, context_tokens=100, max_new_tokens=50)


def test_an_answer_may_fill_the_context_to_the_last_token():
    assert request(max_tokens=10).decoding(90, context_tokens=100, max_new_tokens=50).max_new_tokens == 10


def test_text_parts_are_joined_and_a_developer_is_the_system():
    message = ChatMessage.model_validate(
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]}
    )
    assert message.to_message() == Message("system", "Be brief.")


def test_bodies_and_streams_parse_as_openais_own_types():
    answer = Answer(model="m", text="Paris.", finish_reason="stop", prompt_tokens=5, completion_tokens=2)
    body = ChatCompletion.model_validate(answer.body())
    assert body.choices[0].message.content == "Paris."
    assert body.usage is not None and body.usage.total_tokens == 7
    events = list(answer.events(include_usage=True))
    assert events[-1] == "data: [DONE]\n\n"
    chunks = [ChatCompletionChunk.model_validate(json.loads(e.removeprefix("data: "))) for e in events[:-1]]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Paris."
    assert [c.choices[0].finish_reason for c in chunks if c.choices] == [None, None, "stop"]
    assert {c.id for c in chunks} == {answer.id}
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 2
    assert len(list(answer.events(include_usage=False))) == len(events) - 1

"""OpenAI's protocol without a server: what is refused, what is filled in, and what goes out."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import ValidationError

from raytune_ft.core.records import Message
from raytune_ft.models.sampling import Sampler, TokenLogprob
from raytune_ft.serving.answers import DONE, Answer, Choice
from raytune_ft.serving.faults import ApiError, validation_error
from raytune_ft.serving.protocol import ChatMessage, ChatRequest, CompletionRequest
from raytune_ft.serving.tickets import Progress


def request(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields})


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"model": "m", "prompt": "hi", **fields})


def refused(*, ask: Any = request, **fields: Any) -> ApiError:
    with pytest.raises(ValidationError) as caught:
        ask(**fields)
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
        ({"n": 0}, "n"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"stop": ["x"] * 17}, "stop"),
    ],
)
def test_a_value_out_of_range_is_a_400_that_names_it(fields: dict[str, Any], param: str):
    error = refused(**fields)
    assert (error.status, error.kind, error.param) == (400, "invalid_request_error", param)
    assert str(error).startswith(f"{param}: ")


def test_variables_of_the_chat_template_are_scalars_and_none_that_its_call_takes():
    given = {"enable_thinking": False, "style": "dry", "share": 1.5, "nothing": None}
    asked = request(chat_template_kwargs=given)
    asked.refuse_unsupported()
    assert asked.chat_template_kwargs == given
    for name in ("messages", "tools", "tokenize", "add_generation_prompt", "chat_template", "self"):
        error = refused(chat_template_kwargs={name: True})
        assert (error.status, error.param) == (400, "chat_template_kwargs")
        assert f"{name!r} is set by the endpoint itself" in str(error)
    for value in ([1], {"a": 1}):
        assert "'x' must be a text, a number, true, false or null" in str(refused(chat_template_kwargs={"x": value}))
    for value in ("no mapping", [["a", 1]], {"x": "\ud800"}, {"\ud800": 1}):
        assert refused(chat_template_kwargs=value).status == 400


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


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": [[1], []]}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"prompt": ["\ud800"]}, "prompt"),
    ],
)
def test_a_completion_out_of_range_is_a_400_that_names_it(fields: dict[str, Any], param: str):
    error = refused(ask=completion, **fields)
    assert (error.status, error.param) == (400, param)


def test_fields_that_need_one_another_say_so():
    assert str(refused(top_logprobs=2)) == "top_logprobs needs logprobs: true"
    assert str(refused(ask=completion, max_tokens=0)) == "max_tokens: 0 gives nothing without echo: true"


def test_a_prompt_may_be_text_tokens_or_several_of_them():
    for given, prompts in [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])]:
        assert completion(prompt=given).prompts == prompts


@pytest.mark.parametrize(
    "option", [{"logit_bias": {"5": 9}}, {"tools": [{"type": "function"}]}, {"guided": 1}, {"top_k": 5}, {"min_p": 0.1}]
)
def test_an_option_that_would_change_the_answer_is_refused_by_name(option: dict[str, Any]):
    with pytest.raises(ApiError, match=next(iter(option))) as caught:
        request(**option).refuse_unsupported()
    assert caught.value.status == 400


def test_an_option_of_a_message_is_refused_with_its_place():
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [{"id": "x"}]}]
    with pytest.raises(ApiError) as caught:
        request(messages=messages).refuse_unsupported()
    assert caught.value.param == "messages.1.tool_calls"


@pytest.mark.parametrize("turn", [{"content": None}, {}, {"content": None, "tool_calls": None, "refusal": None}])
def test_an_assistants_turn_may_have_no_content(turn: dict[str, Any]):
    asked = request(messages=[{"role": "user", "content": "a"}, {"role": "assistant", **turn}])
    asked.refuse_unsupported()
    assert asked.messages[1].to_message() == Message("assistant", "")


def test_a_turn_that_only_calls_tools_is_refused_for_its_calls():
    turn = {"role": "assistant", "content": None, "tool_calls": [{"id": "x"}]}
    with pytest.raises(ApiError, match=r"messages\.1\.tool_calls: this option is not supported"):
        request(messages=[{"role": "user", "content": "a"}, turn]).refuse_unsupported()


def test_a_part_that_is_no_text_is_refused_by_its_type():
    content = [{"type": "text", "text": "what is this?"}, {"type": "image_url", "image_url": {"url": "data:..."}}]
    error = refused(messages=[{"role": "user", "content": content}])
    assert (error.param, str(error)) == (
        "messages.0.content", "messages.0.content: parts must be text (got 'image_url')"
    )  # fmt: skip


@pytest.mark.parametrize("role", ["system", "user", "tool"])
def test_other_turns_need_a_content(role: str):
    assert refused(messages=[{"role": role, "content": None}]).param == "messages.0.content"


def test_options_that_change_nothing_are_accepted():
    completion(best_of=1, suffix=None, user="ana").refuse_unsupported()
    request(n=1, logprobs=False, presence_penalty=0, user="ana", tools=None, tool_choice="none").refuse_unsupported()
    request(
        repetition_penalty=1.0, min_p=0, top_k=-1, ignore_eos=False, prompt_cache_retention="24h"
    ).refuse_unsupported()


def test_openais_defaults_are_ours():
    decoding = request().decoding(10, context_tokens=100, max_new_tokens=1000)
    assert (decoding.temperature, decoding.top_p, decoding.max_new_tokens, decoding.stop) == (1.0, 1.0, 90, ())
    assert request(stop="END").decoding(10, context_tokens=None, max_new_tokens=7).stop == ("END",)
    assert request(max_completion_tokens=3, max_tokens=5).decoding(1, context_tokens=9, max_new_tokens=9) \
        .max_new_tokens == 3  # fmt: skip


def test_a_nucleus_too_small_for_float32_still_holds_the_likeliest_token():
    logits = torch.tensor([0.0, 3.0, 1.0])
    decoding = request(top_p=1e-50).decoding(1, context_tokens=9, max_new_tokens=9)
    assert Sampler(decoding, "cpu").draw(logits) == 1


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


class Letters:
    """Token n is the n-th letter; 26 is half a character."""

    def decode(self, token_ids: list[int], **options: Any) -> str:
        return "".join("\ufffd" if token == 26 else chr(97 + token) for token in token_ids)


def logprob(token: int, value: float, *top: tuple[int, float]) -> TokenLogprob:
    return TokenLogprob(token, value, top)


def events(answer: Answer, choice: Choice, *progress: Progress) -> list[dict[str, Any]]:
    told = []
    for part in progress:
        choice.take(part)
        line = answer.event(choice, part)
        if line is not None:
            assert line.startswith("data: ") and line.endswith("\n\n")
            told.append(json.loads(line.removeprefix("data: ")))
    return told


def test_a_chat_parses_as_openais_own_types():
    answer = Answer("m", Letters(), True, 5, with_logprobs=True)
    choice = Choice(0)
    # the second is the token that ends the answer: it has a probability and no place in the text
    entries = [logprob(1, -0.5, (1, -0.5), (26, -2.0)), logprob(9, -0.1, (9, -0.1))]
    choice.take(Progress("b", 1, entries, finish_reason="stop"))
    body = ChatCompletion.model_validate(answer.body([choice]))
    assert (body.choices[0].message.content, body.choices[0].finish_reason) == ("b", "stop")
    assert body.usage is not None
    assert (body.usage.prompt_tokens, body.usage.completion_tokens, body.usage.total_tokens) == (5, 1, 6)
    assert body.choices[0].logprobs is not None and body.choices[0].logprobs.content is not None
    (token,) = body.choices[0].logprobs.content
    assert (token.token, token.logprob, token.bytes) == ("b", -0.5, [98])
    assert [(top.token, top.bytes) for top in token.top_logprobs] == [("b", [98]), ("\ufffd", None)]


def test_a_chat_stream_parses_as_openais_own_types():
    answer = Answer("m", Letters(), True, 5)
    told = events(answer, Choice(1), Progress("Pa", 1), Progress("", 2), Progress("ris.", 3, finish_reason="length"))
    chunks = [ChatCompletionChunk.model_validate(chunk) for chunk in told]
    assert [chunk.choices[0].delta.content for chunk in chunks] == ["Pa", "ris."]
    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant", None]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, "length"]
    assert {chunk.choices[0].index for chunk in chunks} == {1}
    usage = ChatCompletionChunk.model_validate(json.loads(answer.usage_event(3).removeprefix("data: ")))
    assert {chunk.id for chunk in [*chunks, usage]} == {f"chatcmpl-{answer.id}"}
    assert usage.usage is not None and usage.usage.total_tokens == 8
    assert DONE == "data: [DONE]\n\n"


def test_an_echoed_completion_lists_every_token_with_its_place():
    answer = Answer("m", Letters(), False, 2, with_logprobs=True)
    choice = Choice(0, prompt="ab", first_token=0)
    choice.take(Progress("c", 1, [logprob(2, -1.5, (2, -1.5))], [logprob(1, -3.0, (4, -0.2))], finish_reason="length"))
    (told,) = answer.body([choice])["choices"]
    assert told["text"] == "abc"
    assert told["logprobs"] == {
        "tokens": ["a", "b", "c"],
        "token_logprobs": [None, -3.0, -1.5],
        "top_logprobs": [None, {"e": -0.2, "b": -3.0}, {"c": -1.5}],
        "text_offset": [0, 1, 2],
    }


def test_a_completion_parses_as_openais_own_type():
    choice = Choice(0)
    choice.take(Progress("c", 1, [logprob(2, -1.5)], finish_reason="length"))
    body = Completion.model_validate(Answer("m", Letters(), False, 2, with_logprobs=True).body([choice]))
    assert (body.choices[0].text, body.choices[0].finish_reason, body.object) == ("c", "length", "text_completion")
    assert body.choices[0].logprobs is not None and body.choices[0].logprobs.token_logprobs == [-1.5]


def test_an_echoed_stream_begins_with_the_prompt_once():
    answer = Answer("m", Letters(), False, 2, with_logprobs=True)
    choice = Choice(0, prompt="ab", first_token=0)
    told = events(
        answer, choice,
        Progress("c", 1, [logprob(2, -1.5)], [logprob(1, -3.0)]),
        Progress("d", 2, [logprob(3, -1.0)], finish_reason="stop"),
    )  # fmt: skip
    assert [chunk["choices"][0]["text"] for chunk in told] == ["abc", "d"]
    assert [chunk["choices"][0]["logprobs"]["tokens"] for chunk in told] == [["a", "b", "c"], ["d"]]


def test_no_tokens_asked_for_are_none_told():
    answer = Answer("m", Letters(), False, 2, with_logprobs=True, without_text=True)
    choice = Choice(0, prompt="ab", first_token=0)
    choice.take(Progress("c", 1, [logprob(2, -1.5)], [logprob(1, -3.0)], finish_reason="length"))
    body = answer.body([choice])
    assert body["choices"][0]["text"] == "ab"
    assert body["choices"][0]["logprobs"]["tokens"] == ["a", "b"]
    assert body["usage"]["completion_tokens"] == 0


class Words(Letters):
    """Token n is a space and the n-th letter; as SentencePiece's, a text begins without its space. 9 is special."""

    def decode(self, token_ids: list[int], **options: Any) -> str:
        texts = ["<s>" if token == 9 else f" {chr(97 + token)}" for token in token_ids]
        kept = [text for text in texts if text != "<s>" or not options.get("skip_special_tokens")]
        return "".join(kept).removeprefix(" ")


def test_a_tokens_leading_space_is_told_and_places_are_those_in_the_text():
    """ "a b" is echoed as it was written, without the <s> before it; the answer's own text is "c d"."""
    answer = Answer("m", Words(), False, 3, with_logprobs=True)
    choice = Choice(0, prompt="a b", first_token=9)
    entries = [logprob(2, -1.5, (2, -1.5), (4, -2.0)), logprob(3, -1.0)]
    choice.take(Progress("c d", 2, entries, [logprob(0, -3.0), logprob(1, -2.0)], finish_reason="length"))
    told = answer.body([choice])["choices"][0]["logprobs"]
    assert told["tokens"] == ["<s>", " a", " b", " c", " d"]
    assert told["top_logprobs"][3] == {" c": -1.5, " e": -2.0}
    assert told["text_offset"] == [0, 0, 1, 3, 4]


def test_places_in_a_stream_go_on_from_event_to_event():
    whole, streamed = (Choice(0, prompt="ab", first_token=0) for _ in range(2))
    answer = Answer("m", Letters(), False, 2, with_logprobs=True)
    parts = [
        Progress("c", 1, [logprob(2, -1.5)], [logprob(1, -3.0)]),
        Progress("d", 2, [logprob(3, -1.0)]),
        Progress("e", 3, [logprob(4, -1.0)], finish_reason="length"),
    ]
    found = events(answer, streamed, *parts)
    for part in parts:
        whole.take(part)
    offsets = [place for told in found for place in told["choices"][0]["logprobs"]["text_offset"]]
    assert offsets == answer.body([whole])["choices"][0]["logprobs"]["text_offset"] == [0, 1, 2, 3, 4]


class Bytes(Letters):
    """Token n is the byte n; as SentencePiece's, bytes that are no text as a whole are unknown one by one."""

    def decode(self, token_ids: list[int], **_options: Any) -> str:
        try:
            return bytes(token_ids).decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(token_ids)


def test_places_behind_characters_of_several_tokens_are_those_in_the_text():
    """Each smiley has four tokens, all of which stand where it begins; "x" stands behind four of them."""
    text = "ok😀😀😀😀x"
    told: list[dict[str, Any]] = []
    for prompt, answered in [("", text), (text, "x")]:
        entries = [logprob(byte, -1.0) for byte in answered.encode()]
        asked = [logprob(byte, -1.0) for byte in prompt.encode()[1:]]
        choice = Choice(0, prompt=prompt, first_token=prompt.encode()[0] if prompt else None)
        choice.take(Progress(answered, len(entries), entries, asked, finish_reason="length"))
        told += Answer("m", Bytes(), False, 1, with_logprobs=True).body([choice])["choices"]
    places = [0, 1, *[2] * 4, *[3] * 4, *[4] * 4, *[5] * 4, 6]
    assert told[0]["logprobs"]["text_offset"] == places
    assert told[1]["logprobs"]["text_offset"] == [*places, 7]


def test_an_error_can_always_be_encoded():
    error = ApiError(400, "\ud800: not supported", param="\ud800")
    assert json.dumps(error.body, ensure_ascii=False).encode()
    assert ApiError(429, "wait").headers == {"Retry-After": "1"}

"""Masks against hand-worked ones: supervised text stands between « and »."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raytune_ft.core.errors import DataError
from raytune_ft.core.records import Message, Record
from raytune_ft.models.chat import Chat, Encoded, conversation_of, encode_record
from raytune_ft.models.config import TrainOn
from raytune_ft.models.layout import Conversation
from raytune_ft.models.loading import load_tokenizer
from raytune_ft.models.templates import INSTRUCTION_TEMPLATE

LAST = TrainOn.LAST_ASSISTANT_TURN
BRIEF = Message("system", "Be brief.")
TURNS = (
    Message("user", "What is red?"),
    Message("assistant", "yes"),
    Message("user", "no?"),
    Message("assistant", "blue green"),
)


@pytest.fixture
def chat(tiny_model: Path) -> Chat:
    return Chat(load_tokenizer(str(tiny_model)))


def shown(chat: Chat, encoded: Encoded) -> str:
    """The row's text with what is supervised between « and »."""
    text = ""
    pairs = zip(encoded.input_ids, encoded.supervised, strict=True)
    for kept, run in groupby(pairs, key=lambda pair: pair[1]):
        part = chat.tokenizer.decode([token for token, _ in run])
        text += f"«{part}»" if kept else part
    return text


def test_mask_by_hand_for_chatml(build: SimpleNamespace) -> None:
    chat = Chat(build.chatml())
    assert shown(chat, chat.encode((BRIEF, *TURNS))) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is red?<|im_end|>\n"
        "<|im_start|>assistant\n«yes<|im_end|>»\n<|im_start|>user\nno?<|im_end|>\n"
        "<|im_start|>assistant\n«blue green<|im_end|>»\n"
    )
    tail = "\n<|im_start|>user\nno?<|im_end|>\n<|im_start|>assistant\n«blue green<|im_end|>»\n"
    assert shown(chat, chat.encode(TURNS, LAST)).endswith("<|im_start|>assistant\nyes<|im_end|>" + tail)


def test_mask_by_hand_for_llama_with_one_bos(build: SimpleNamespace) -> None:
    chat = Chat(build.llama())
    encoded = chat.encode((BRIEF, *TURNS))
    assert shown(chat, encoded) == (
        "<|begin|><|head|>system<|/head|>\n\nBe brief.<|eot_id|><|head|>user<|/head|>\n\nWhat is red?<|eot_id|>"
        "<|head|>assistant<|/head|>\n\n«yes<|eot_id|>»<|head|>user<|/head|>\n\nno?<|eot_id|>"
        "<|head|>assistant<|/head|>\n\n«blue green<|eot_id|>»"
    )
    assert encoded.input_ids.count(chat.tokenizer.bos_token_id) == 1
    assert {chat.tokenizer.convert_ids_to_tokens(i) for i in chat.stop_ids} == {"<|eot_id|>", "<|end|>"}


def test_a_template_that_thinks_before_it_answers_has_stop_tokens_though_no_mask(build: SimpleNamespace) -> None:
    tokenizer = build.chatml()
    prompt = "<|im_start|>assistant\n"
    assert prompt in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(prompt, f"{prompt}<think>\n")
    chat = Chat(tokenizer)
    with pytest.raises(DataError, match="no mask is right"):
        chat.encode(TURNS)
    assert chat.prompt_ids(TURNS[:1])
    assert [chat.tokenizer.decode([token]) for token in (*chat.stop_ids, *chat.tail_ids)] == ["<|im_end|>", "\n"]


def test_mask_by_hand_for_mistral_which_has_no_generation_prompt_and_strips(build: SimpleNamespace) -> None:
    chat = Chat(build.mistral())
    turns = (TURNS[0], Message("assistant", "\n yes "), *TURNS[2:])
    assert shown(chat, chat.encode(turns)) == (
        "<s>[INST] What is red? [/INST]« yes</s>»[INST] no? [/INST]« blue green</s>»"
    )
    with pytest.raises(DataError, match="refuses this conversation: Only user and assistant roles are supported!"):
        chat.encode((BRIEF, *TURNS))


def test_mask_by_hand_for_gemma_which_says_model_and_knows_no_system(build: SimpleNamespace) -> None:
    chat = Chat(build.gemma())
    assert shown(chat, chat.encode(TURNS)) == (
        "<bos><start_of_turn>user\nWhat is red?<end_of_turn>\n<start_of_turn>model\n«yes<end_of_turn>»\n"
        "<start_of_turn>user\nno?<end_of_turn>\n<start_of_turn>model\n«blue green<end_of_turn>»\n"
    )
    with pytest.raises(DataError, match="System role not supported"):
        chat.encode((BRIEF, *TURNS))


def test_mask_by_hand_for_the_guides_format_which_begins_as_the_tokenizer_begins_texts(build: SimpleNamespace) -> None:
    chat = Chat(build.plain())
    assert not chat.brings_template
    assert shown(chat, chat.encode(TURNS[:2])) == (
        "<s><instruction>\nWhat is red?\n</instruction>\n<response>\n«yes\n</response></s>»\n"
    )
    other = Chat(build.chatml(), chat.tokenizer.chat_template)
    assert shown(other, other.encode(TURNS[:2])).startswith("<instruction>")
    assert other.tokenizer.chat_template == INSTRUCTION_TEMPLATE


@pytest.mark.parametrize("name", ["chatml", "llama", "mistral", "gemma"])
def test_every_turn_starts_where_the_prompt_of_a_server_ends(build: SimpleNamespace, name: str) -> None:
    chat = Chat(getattr(build, name)())
    encoded = chat.encode(TURNS)
    assert chat.prompt_ids(TURNS[:1]) == encoded.input_ids[: encoded.supervised.index(True)]
    last = chat.encode(TURNS, LAST)
    assert chat.prompt_ids(TURNS[:3]) == last.input_ids[: last.supervised.index(True)]


def test_masks_are_those_of_transformers_where_the_template_marks_generations(build: SimpleNamespace) -> None:
    tokenizer = build.chatml()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
        "{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    chat = Chat(tokenizer)
    for answer in ("yes", "\nred", "two  ", "naïve 🎉\n\n", "<|im_end|> inside"):  # theirs is empty after a space
        turns = [*TURNS, Message("user", answer), Message("assistant", answer)]
        plain = [{"role": m.role, "content": m.content} for m in turns]
        theirs = tokenizer.apply_chat_template(plain, return_dict=True, return_assistant_tokens_mask=True)
        ours = chat.encode(turns)
        assert ours.input_ids == theirs["input_ids"]
        assert ours.supervised == [bool(kept) for kept in theirs["assistant_masks"]]


def test_an_answer_that_starts_with_a_newline_is_supervised_from_there(chat: Chat) -> None:
    encoded = chat.encode([Message("user", "yes?"), Message("assistant", "\nred")])
    assert shown(chat, encoded).endswith("assistant\n«\nred<|im_end|>»\n")


def test_a_token_over_the_border_belongs_to_the_prompt(build: SimpleNamespace) -> None:
    template = (
        "{% for m in messages %}{{ 'bot' + m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'bot' }}{% endif %}"
    )
    chat = Chat(build.chatml(template))
    joined = chat.encode([Message("assistant", "tom")])
    assert [chat.tokenizer.decode([i]) for i in joined.input_ids] == ["bottom", "<|im_end|>"]
    assert joined.supervised == [False, True]


def test_whitespace_before_a_border_is_not_supervised_though_the_tokenizer_trims_offsets(
    build: SimpleNamespace,
) -> None:
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    chat = Chat(build.chatml(template))
    encoded = chat.encode([Message("user", "no"), Message("assistant", "!yes")])
    assert shown(chat, encoded) == "user: no<|im_end|>assistant: «!yes<|im_end|>»"


def test_what_a_template_adds_behind_the_turn_is_not_supervised(build: SimpleNamespace) -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}"
        "{% if m['role'] == 'assistant' %}{{ '<|im_start|>end of pair<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"
    )
    chat = Chat(build.chatml(template))
    pair = [Message("user", "no"), Message("assistant", "yes")]
    assert shown(chat, chat.encode(pair)) == (
        "<|im_start|>no<|im_end|><|im_start|>«yes<|im_end|>»<|im_start|>end of pair<|im_end|>"
    )


def test_the_end_of_turn_is_trained_where_it_is_the_padding_token_too(build: SimpleNamespace) -> None:
    chat = Chat(build.chatml())
    assert chat.tokenizer.pad_token_id == chat.tokenizer.eos_token_id
    encoded = chat.encode(TURNS[:2])
    ends = [kept for token, kept in zip(encoded.input_ids, encoded.supervised, strict=True) if token in chat.stop_ids]
    assert ends == [False, True]


def test_a_template_that_rewrites_earlier_turns_is_refused_with_the_way_out(build: SimpleNamespace) -> None:
    chat = Chat(build.chatml(build.thinking))
    thought = Message("assistant", "<think>red</think>\nyes")
    turns = [TURNS[0], thought, TURNS[2], Message("assistant", "<think>no</think>\nblue")]
    with pytest.raises(DataError, match=r"rewrites earlier turns \(turn 2 of 4\).*train_on: last_assistant_turn"):
        chat.encode(turns)
    assert shown(chat, chat.encode(turns, LAST)) == (
        "<|im_start|>user\nWhat is red?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
        "<|im_start|>user\nno?<|im_end|>\n<|im_start|>assistant\n«<think>no</think>\nblue<|im_end|>»\n"
    )
    assert shown(chat, chat.encode(turns[:2])).endswith("«<think>red</think>\nyes<|im_end|>»\n")


def test_only_the_spans_of_a_text_that_are_named_are_supervised(build: SimpleNamespace) -> None:
    answer = "  red blue green"
    for name, tail in (("chatml", "\n  red« blue» green<|im_end|>\n"), ("mistral", "] red« blue» green</s>")):
        chat = Chat(getattr(build, name)())
        record = Record(messages=(TURNS[0], Message("assistant", answer)), metadata={"supervised_spans": [[5, 10]]})
        assert shown(chat, encode_record(chat, record)).endswith(tail), name
        upto_the_end = Record(messages=record.messages, metadata={"supervised_spans": [[5, 16]]})
        assert "« blue green<" in shown(chat, encode_record(chat, upto_the_end)), name


@pytest.mark.parametrize("spans", [[[0, 99]], [[2, 2]], "0-3", [[-1, 2]], [["a", "b"]]])
def test_spans_outside_the_text_are_refused(spans: Any) -> None:
    with pytest.raises(DataError, match="within the 10 characters of the last assistant turn"):
        conversation_of(Record(messages=TURNS, metadata={"supervised_spans": spans}))


def test_tools_are_written_and_calls_supervised(build: SimpleNamespace) -> None:
    chat = Chat(build.chatml(build.tools))
    call = json.dumps([{"type": "function", "function": {"name": "red", "arguments": '{"n": 1}'}}])
    turns = (TURNS[0], Message("assistant", "", call), Message("tool", "2"), Message("assistant", "yes"))
    encoded = chat.encode_conversation(Conversation(turns, '[{"name": "red"}]'))
    assert shown(chat, encoded) == (
        '<|im_start|>system\n{"name": "red"}<|im_end|>\n<|im_start|>user\nWhat is red?<|im_end|>\n'
        '<|im_start|>assistant\n«<|call|>{"name": "red", "arguments": {"n": 1}}<|im_end|>»\n'
        "<|im_start|>tool\n2<|im_end|>\n<|im_start|>assistant\n«yes<|im_end|>»\n"
    )


def test_half_a_character_in_the_arguments_of_a_call_is_written_as_a_question_mark(build: SimpleNamespace) -> None:
    chat = Chat(build.chatml(build.tools))
    call = json.dumps([{"type": "function", "function": {"name": "red", "arguments": r'{"n": "\ud83d"}'}}])
    encoded = chat.encode_conversation(Conversation((TURNS[0], Message("assistant", "", call))))
    assert '«<|call|>{"name": "red", "arguments": {"n": "?"}}<|im_end|>»' in shown(chat, encoded)


def test_tools_and_calls_that_the_template_ignores_are_refused(build: SimpleNamespace) -> None:
    chat = Chat(build.chatml())
    with pytest.raises(DataError, match="tools: the chat template ignores them"):
        chat.encode_conversation(Conversation(TURNS, '[{"name": "red"}]'))
    with pytest.raises(DataError, match="tool calls: the chat template ignores them"):
        chat.encode([TURNS[0], Message("assistant", "", '[{"function": {"name": "red", "arguments": {}}}]')])


def test_one_faulty_conversation_does_not_touch_its_neighbours(build: SimpleNamespace) -> None:
    chat = Chat(build.mistral())
    first, second, third = chat.encode_batch([Conversation(TURNS), Conversation((BRIEF,)), Conversation(TURNS[:2])])
    assert isinstance(second, DataError)
    assert [first.ids.tolist(), third.ids.tolist()] == [chat.encode(t).input_ids for t in (TURNS, TURNS[:2])]


def test_raw_text_is_supervised_whole_and_closed(build: SimpleNamespace, chat: Chat) -> None:
    encoded = encode_record(chat, Record(text="red blue"))
    assert all(encoded.supervised)
    assert encoded.input_ids[-1] == chat.tokenizer.eos_token_id
    begun = Chat(build.plain())
    for text in ("red", "<s>red", "<s>red</s>"):
        assert begun.tokenizer.decode(begun.encode_text(text).input_ids) == "<s>red</s>"
    assert begun.tokenizer.decode(begun.encode_text("red", closed=False).input_ids) == "<s>red"


def test_the_fingerprint_follows_the_template(chat: Chat, tiny_model: Path) -> None:
    other = Chat(load_tokenizer(str(tiny_model)))
    assert chat.fingerprint == other.fingerprint
    changed = load_tokenizer(str(tiny_model))
    changed.chat_template += " "
    assert Chat(changed).fingerprint != chat.fingerprint
    assert Chat(load_tokenizer(str(tiny_model)), INSTRUCTION_TEMPLATE).fingerprint != chat.fingerprint

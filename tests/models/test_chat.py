"""Masks against hand-worked ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from raytune_ft.core.errors import DataError
from raytune_ft.core.records import Message, Record
from raytune_ft.models.chat import PLAIN_TEMPLATE, Chat, encode_record
from raytune_ft.models.loading import load_tokenizer


@pytest.fixture
def chat(tiny_model: Path) -> Chat:
    return Chat(load_tokenizer(str(tiny_model)))


def supervised_text(chat: Chat, *messages: Message) -> str:
    encoded = chat.encode(messages)
    return chat.tokenizer.decode([i for i, s in zip(encoded.input_ids, encoded.supervised, strict=True) if s])


def test_only_assistant_turns_and_their_end_of_turn_are_supervised(chat: Chat) -> None:
    text = supervised_text(
        chat, Message("user", "yes?"), Message("assistant", "red"), Message("user", "no?"), Message("assistant", "blue")
    )
    assert text == "red<|im_end|>blue<|im_end|>"


def test_an_answer_that_starts_with_a_newline_is_supervised_from_there(chat: Chat) -> None:
    assert supervised_text(chat, Message("user", "yes?"), Message("assistant", "\nred")) == "\nred<|im_end|>"


def test_the_mask_by_hand(chat: Chat) -> None:
    encoded = chat.encode([Message("user", "no"), Message("assistant", "red")])
    tokens = [chat.tokenizer.decode([i]) for i in encoded.input_ids]
    assert "".join(tokens) == "<|im_start|>user\nno<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n"
    first = encoded.supervised.index(True)
    assert "".join(tokens[:first]).endswith("assistant\n")
    assert encoded.supervised[-1] is False  # the template's own line break behind the end of the turn


def test_the_prompt_is_what_training_saw_before_the_answer(chat: Chat) -> None:
    turns = [Message("user", "order?"), Message("assistant", "yes")]
    encoded = chat.encode(turns)
    assert chat.prompt_ids(turns[:1]) == encoded.input_ids[: encoded.supervised.index(True)]


def test_an_answer_ends_with_the_templates_end_of_turn(chat: Chat) -> None:
    assert chat.stop_ids == (chat.tokenizer.convert_tokens_to_ids("<|im_end|>"),)


def test_a_template_that_rewrites_earlier_turns_is_refused(chat: Chat) -> None:
    chat.tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] != 'assistant' or loop.last %}"
        "<|im_start|>{{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
    )
    turns = [Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d")]
    with pytest.raises(DataError, match="rewrites earlier turns"):
        chat.encode(turns)


def test_a_model_without_a_template_gets_the_guides_format(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model))
    tokenizer.chat_template = None
    chat = Chat(tokenizer)
    assert not chat.brings_template
    assert tokenizer.chat_template == PLAIN_TEMPLATE
    assert chat.render([Message("user", "Hi")], add_generation_prompt=True) == (
        "<instruction>\nHi\n</instruction>\n<response>\n"
    )
    assert supervised_text(chat, Message("user", "a"), Message("assistant", "b")) == "b\n</response><|im_end|>"


def test_raw_text_is_supervised_whole_and_closed(chat: Chat) -> None:
    encoded = encode_record(chat, Record(text="red blue"))
    assert all(encoded.supervised)
    assert encoded.input_ids[-1] == chat.tokenizer.eos_token_id


def test_the_fingerprint_follows_the_template(chat: Chat, tiny_model: Path) -> None:
    other = Chat(load_tokenizer(str(tiny_model)))
    assert chat.fingerprint == other.fingerprint
    changed = load_tokenizer(str(tiny_model))
    changed.chat_template += " "
    assert Chat(changed).fingerprint != chat.fingerprint

"""Text comes token by token, never half a character, and never the beginning of a stop text."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from raytune_ft.models.text_stream import TextStream


def pushed(stream: TextStream, ids: list[int]) -> list[str]:
    shown = []
    for token in ids:
        shown.append(stream.push(token))
        if stream.stopped:
            return shown
    return [*shown, stream.finish()]


@pytest.fixture
def tokenizer(build: SimpleNamespace) -> Any:
    return build.chatml()


@pytest.mark.parametrize("text", ["What is Paris?", "Grüße, 你好 👩‍👩‍👧 ende", " (bottom (bottom\n\n red", "\ufffd"])
def test_the_pieces_are_the_whole_text_and_no_half_characters(tokenizer: Any, text: str):
    ids = tokenizer(text)["input_ids"]
    shown = pushed(TextStream(tokenizer), ids)
    assert "".join(shown) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in shown)
    assert pushed(TextStream(tokenizer, whole=True), ids) == [*[""] * len(ids), text]


def test_what_may_begin_a_stop_text_is_held_back_until_it_does_not(tokenizer: Any):
    ids = [token for letter in "abcabd!" for token in tokenizer(letter)["input_ids"]]
    stream = TextStream(tokenizer, ["abd?", "cabx"])
    # "ab" may begin the first, "cab" the second; with "d" only "abd" may, with "!" nothing
    assert pushed(stream, ids) == ["", "", "ab", "", "", "c", "abd!", ""]
    assert not stream.stopped


@pytest.mark.parametrize("whole", [True, False])
def test_the_text_ends_in_front_of_the_first_stop_text(tokenizer: Any, whole: bool):
    ids = tokenizer("red blue green yes no")["input_ids"]
    stream = TextStream(tokenizer, ["yes", "een", ""][:2], whole=whole)
    assert "".join(pushed(stream, ids)) == "red blue gr" == stream.text
    assert stream.stopped
    assert stream.finish() == ""


def test_special_tokens_are_not_shown(tokenizer: Any):
    ids = tokenizer("red<|im_end|> blue")["input_ids"]
    assert "".join(pushed(TextStream(tokenizer), ids)) == "red blue"

"""Text comes token by token, never half a character, and never the beginning of a stop text."""

from __future__ import annotations

import random
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


def byte_fallback() -> Any:
    """A tokenizer as those of SentencePiece are: a sign for spaces, and bytes for what has no token."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdeoksy", "ok", "▁yes"]
    merges = [("o", "k"), ("▁", "y"), ("e", "s")]
    bare = Tokenizer(
        models.BPE(
            {word: n for n, word in enumerate([*words, "▁y", "es"])}, merges, byte_fallback=True, unk_token="<unk>"
        )
    )
    bare.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bare.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


SPOKEN = [
    "ok 😀😎🎉🎊 yes",
    "🇩🇪🇫🇷 ok",
    "👨‍👩‍👧‍👦",
    "你好 ok 世界",
    "e\u0301a\u0308 yes",
    "привет",
    "  ok  yes ",
    "😀" * 9,
]


@pytest.mark.parametrize("text", SPOKEN)
@pytest.mark.parametrize("kind", ["bytes", "fallback"])
def test_characters_of_many_tokens_come_whole_with_and_without_stops(tokenizer: Any, kind: str, text: str):
    tokenizer = tokenizer if kind == "bytes" else byte_fallback()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    for stops in ([], ["ZZ"]):
        shown = pushed(TextStream(tokenizer, stops), ids)
        assert "".join(shown) == whole
        assert not any("\ufffd" in piece for piece in shown)


def test_a_stop_text_of_many_bytes_is_seen() -> None:
    tokenizer = byte_fallback()
    stream = TextStream(tokenizer, ["🎉"])
    pushed(stream, tokenizer("ok 😀😎🎉🎊 yes")["input_ids"])
    assert stream.stopped
    assert stream.text == "ok 😀😎"


def test_special_tokens_in_between_take_no_space_away() -> None:
    tokenizer = byte_fallback()
    word, end = tokenizer.convert_tokens_to_ids(["▁yes", "</s>"])
    assert "".join(pushed(TextStream(tokenizer), [word, *[end] * 9, word])) == "yes yes"
    assert "".join(pushed(TextStream(tokenizer), [*[end] * 9, word, word])) == "yes yes"


class Counting:
    """A tokenizer that counts the tokens that it decodes."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self.decoded = tokenizer, 0

    def decode(self, ids: list[int], **options: Any) -> str:
        self.decoded += len(ids)
        return self._tokenizer.decode(ids, **options)


@pytest.mark.parametrize("before", ["", "▁yes", "<0xF0>"])
def test_a_long_run_of_special_tokens_is_decoded_once(before: str) -> None:
    tokenizer = byte_fallback()
    word, end = tokenizer.convert_tokens_to_ids(["▁yes", "</s>"])
    ids = [*tokenizer.convert_tokens_to_ids([before] if before else []), *[end] * 1000, word]
    counting = Counting(tokenizer)
    assert "".join(pushed(TextStream(counting), ids)) == tokenizer.decode(ids, skip_special_tokens=True)
    assert counting.decoded < 10 * len(ids)


def test_bytes_that_make_no_character_are_shown_as_such_and_lose_nothing_after_them() -> None:
    tokenizer = byte_fallback()
    generator = random.Random(0)
    for _ in range(50):
        ids = [generator.choice([3 + 0xF0, 3 + 0x9F, 3 + 0x98, 3 + 0x80, 259, 260, 269]) for _ in range(30)]
        shown = "".join(pushed(TextStream(tokenizer), [*ids, 269]))
        plain = tokenizer.decode([*ids, 269], skip_special_tokens=True)
        assert [letter for letter in shown if letter.isascii()] == [letter for letter in plain if letter.isascii()]

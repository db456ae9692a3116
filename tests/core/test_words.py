"""Words of scripts without spaces are the same in the preparation of data and in the leak check."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from raytune_ft.core.words import UNSPACED_SCRIPTS, plain, spaced, unspaced_share, words_of
from raytune_ft.data.shingles import ngram_hashes
from raytune_ft.evaluation.leakage import sequence_hashes


def test_python_and_arrow_tell_the_same_characters() -> None:
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code <= 0xDFFF]
    by_arrow = pc.match_substring_regex(pa.array(characters), f"[{UNSPACED_SCRIPTS}]").to_pylist()
    assert [spaced(character) != character for character in characters] == by_arrow


def test_each_character_of_an_unspaced_script_is_a_word() -> None:
    assert words_of("GPT模型 is good。") == ["gpt", "模", "型", "is", "good"]
    assert unspaced_share("模型 ab!") == 0.5
    assert unspaced_share("!") == 0


@pytest.mark.parametrize(
    ("one", "other"),
    [("What is  2?\n", "what IS 2?"), ("ＡＢＣ １２", "abc 12"), ("STRASSE", "straße"), ("a\u00a0b", "A b")],
)
def test_case_width_and_blanks_make_no_other_text(one: str, other: str) -> None:
    assert plain(one) == plain(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("今天天气很好我们一起去公园散步", "今天天气很好我们一起去公园跑步"),
        ("きょうはとてもいいてんきです", "きょうはとてもいいてんきでした"),
        ("วันนี้อากาศดีมากเราไปเดินเล่น", "วันนี้อากาศดีมากเราไปวิ่งเล่น"),
    ],
)
def test_both_rooms_give_near_duplicates_the_same_similarity(one: str, other: str) -> None:
    hashes, starts = ngram_hashes(pa.array([one, other]), 5, whole=True)
    prepared = _jaccard(hashes[: starts[1]], hashes[starts[1] :])
    checked = _jaccard(*(sequence_hashes(words_of(text)) for text in (one, other)))
    assert checked == prepared
    assert checked > 0.3


def _jaccard(one: np.ndarray, other: np.ndarray) -> float:
    return len(np.intersect1d(one, other)) / len(np.union1d(one, other))

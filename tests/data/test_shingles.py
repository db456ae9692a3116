from __future__ import annotations

import itertools

import numpy as np
import pyarrow as pa
import pytest

from raytune_ft.core.records import Message, Record, records_to_table
from raytune_ft.data.shingles import ngram_hashes, normal_texts, row_texts, stream


def hashes_of(*texts: str, size: int = 5, whole: bool = True, only_letters: bool = False) -> list[list[int]]:
    hashes, starts = ngram_hashes(pa.array(texts, pa.string()), size, whole=whole, only_letters=only_letters)
    return [hashes[low:high].tolist() for low, high in itertools.pairwise(starts)]


def test_a_text_has_a_hash_for_each_run_of_words() -> None:
    seven, shifted, six = hashes_of("a b c d e f g", "x b c d e f y", "b c d e f g")
    assert len(seven) == len(set(seven)) == 3
    assert six == seven[1:]
    assert shifted[1] == seven[1]
    assert len(set(shifted) | set(seven)) == 5


def test_order_repetition_and_neighbouring_rows_count() -> None:
    one, swapped, repeated = hashes_of("a b c d e", "b a c d e", "a b c d e a b c d e")
    assert one != swapped
    assert repeated[0] == repeated[5] == one[0]
    assert len(repeated) == 6


def test_a_short_text_is_one_shingle_or_none() -> None:
    assert [len(found) for found in hashes_of("a b", "", " \n", "a b c d e")] == [1, 0, 0, 1]
    two, same, three = hashes_of("A  b", "a\tb\n", "a b c")
    assert two == same != three
    assert hashes_of("a b c d", whole=False) == [[]]


def test_punctuation_counts_unless_only_letters_do() -> None:
    plus, minus = hashes_of("what is 3 + 4 today", "what is 3 - 4 today")
    assert not set(plus) & set(minus)
    comma, bare = hashes_of("one, two; three (four) five!", "One two three four five", only_letters=True)
    assert comma == bare


def test_characters_of_scripts_without_spaces_are_words() -> None:
    assert normal_texts(pa.array(["我喜欢 Tee", "plain"]), only_letters=False).to_pylist() == [
        "我  喜  欢  tee",
        "plain",
    ]
    six, five = hashes_of("我喜欢喝绿茶", "喜欢喝绿茶")
    assert (len(six), six[1:]) == (2, five)


def test_a_neighbour_beyond_ascii_changes_nothing() -> None:
    texts = ["One\ttwo\x0bthree four five six", "a\x1cb c d e f g", " 1 2 3 4 5 6 \n", ""]
    alone = [hashes_of(text)[0] for text in texts]
    assert hashes_of(*texts) == alone
    assert hashes_of(*texts, "fünf Wörter sind ein Shingle")[:4] == alone
    assert hashes_of("a b c d e f g")[0] == alone[1]


def test_rows_in_any_slice_have_the_same_hashes() -> None:
    texts = pa.array([f"row {n} says much the same as every other row does" for n in range(9)])
    whole, _ = ngram_hashes(texts, 5, whole=True)
    parts = [ngram_hashes(texts.slice(at, 2), 5, whole=True)[0] for at in range(0, 9, 2)]
    assert np.array_equal(np.concatenate(parts), whole)


def test_all_turns_but_the_systems_are_read() -> None:
    records = [
        Record((Message("system", "S"), Message("user", "u"), Message("assistant", "a", '[{"f": 1}]'))),
        Record(text="raw"),
        Record((Message("user", "u"),), chosen=(Message("assistant", "c"),), rejected=(Message("assistant", "r"),)),
        Record((Message("user", "u"),), reference="ref"),
    ]
    words = [text.split() for text in row_texts(records_to_table(records)).to_pylist()]
    assert words == [["u", "a", '[{"f":', "1}]"], ["raw"], ["u", "c", "r"], ["u", "ref"]]
    assert [text.split() for text in row_texts(records_to_table(records).slice(2, 1)).to_pylist()] == [["u", "c", "r"]]


@pytest.mark.parametrize(("place", "value"), [(0, 0xE220A8397B1DCDAF), (1, 0x6E789E6AA1B965F4)])
def test_the_stream_is_splitmix64(place: int, value: int) -> None:
    """The first numbers that the reference implementation gives for the seed 0."""
    assert int(stream(0, 2)[place]) == value

"""Word n-grams of rows as hashes, whole columns at a time: what near-duplicates and benchmark overlaps are told from.

A word is what stands between whitespace, in lower case; characters of scripts that write no spaces are words of
their own. Each distinct word is hashed once (xxh64), n-grams combine the hashes of their words, so the same text has
the same hashes on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from raytune_ft.core.words import UNSPACED_SCRIPTS

_UNSPACED = f"([{UNSPACED_SCRIPTS}])"
_TURNS = ("messages", "chosen", "rejected")
_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio

Hashes = np.ndarray[Any, np.dtype[np.uint64]]
Places = np.ndarray[Any, np.dtype[np.int64]]


def row_texts(rows: pa.Table, parts: Sequence[str] = (*_TURNS, "text", "reference")) -> pa.Array:
    """What each row asks and answers: all turns with their tool calls, both continuations, text and reference.

    System turns are left out: a long one that many rows share would make them all alike. `parts` are the columns that
    are wanted.
    """
    texts = [_turns(rows.column(n)) if n in _TURNS else flat(rows.column(n)).fill_null("") for n in parts]
    return pc.binary_join_element_wise(*texts, "\n")


def _turns(column: pa.ChunkedArray) -> pa.Array:
    lists = flat(column)
    turns = lists.flatten()
    system = pc.equal(pc.struct_field(turns, "role"), "system")
    content = pc.if_else(system, "", pc.struct_field(turns, "content").fill_null(""))
    texts = pc.binary_join_element_wise(content, pc.struct_field(turns, "tool_calls").fill_null(""), "\n")
    ends = np.cumsum(pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False))
    offsets = pa.array(np.concatenate(([0], ends)).astype(np.int32))
    return pc.binary_join(pa.ListArray.from_arrays(offsets, texts), "\n")


def flat(column: pa.ChunkedArray) -> pa.Array:
    """A column as one array."""
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def ngram_hashes(texts: pa.Array, size: int, *, whole: bool, only_letters: bool = False) -> tuple[Hashes, Places]:
    """The hashes of all n-grams, row after row, and where each row's begin: ``[n-grams]``, ``[rows + 1]``.

    Args:
        texts: the rows.
        size: words of an n-gram.
        whole: a text of fewer words is one n-gram; otherwise it has none.
        only_letters: punctuation and symbols separate words instead of being part of them.
    """
    words, starts = _words(texts, only_letters=only_letters)
    counts = np.diff(starts)
    if not len(words):
        return np.empty(0, np.uint64), np.zeros(len(texts) + 1, np.int64)
    combined = words.copy()
    row_of = np.repeat(np.arange(len(counts)), counts)
    left = starts[1:][row_of] - np.arange(len(words))  # words from here to the end of the row
    for step in range(1, size):
        follows = np.flatnonzero(left > step)
        combined[follows] = combined[follows] * _ODD + words[follows + step]
    first = left == counts[row_of]
    taken = (left >= size) | (first & (left < size) if whole else False)
    ends = np.concatenate(([0], np.cumsum(np.bincount(row_of[taken], minlength=len(counts)))))
    return mixed(combined[taken]), ends.astype(np.int64)


def _words(texts: pa.Array, *, only_letters: bool) -> tuple[Hashes, Places]:
    texts = normal_texts(texts, only_letters=only_letters)
    split = pc.ascii_split_whitespace(texts) if _is_plain(texts) else pc.utf8_split_whitespace(texts)
    words = split.flatten()
    counts = pc.list_value_length(split).to_numpy(zero_copy_only=False)
    # Splitting nothing gives one empty word.
    blank = pc.equal(pc.binary_length(words), 0).to_numpy(zero_copy_only=False)
    row_of = np.repeat(np.arange(len(counts)), counts)
    if blank.any():
        row_of, words = row_of[~blank], words.filter(pa.array(~blank))
    coded = words.dictionary_encode()
    known = coded.dictionary.cast(pa.binary()).to_pylist()
    distinct = np.fromiter(map(xxhash.xxh64_intdigest, known), np.uint64, len(known))
    starts = np.concatenate(([0], np.cumsum(np.bincount(row_of, minlength=len(texts)))))
    return distinct[coded.indices.to_numpy()], starts.astype(np.int64)


def normal_texts(texts: pa.Array, *, only_letters: bool) -> pa.Array:
    """The texts in lower case with whitespace between all words, and with nothing but words if `only_letters`."""
    if only_letters:
        texts = pc.replace_substring_regex(texts, r"[^\pL\pN\s]+", " ")
    if _is_plain(texts):
        return pc.ascii_trim_whitespace(pc.ascii_lower(texts))
    texts = pc.utf8_lower(texts)
    foreign = pc.invert(pc.string_is_ascii(texts))
    if pc.any(foreign).as_py():
        spaced = pc.replace_substring_regex(texts.filter(foreign), _UNSPACED, r" \1 ")
        texts = pc.replace_with_mask(texts, foreign, spaced)
    return pc.utf8_trim_whitespace(texts)


def _is_plain(texts: pa.Array) -> bool:
    """Whether Arrow's functions for ASCII, which are several times faster, give the same as those for Unicode.

    They differ in the separators 0x1c to 0x1f, which only Unicode counts as whitespace.
    """
    if not pc.all(pc.string_is_ascii(texts)).as_py() or texts.buffers()[2] is None:
        return False
    data = np.frombuffer(texts.buffers()[2], np.uint8)
    return not ((data >= 0x1C) & (data <= 0x1F)).any()


def mixed(values: Hashes) -> Hashes:
    """The values with every bit depending on every bit (the finalizer of SplitMix64; Steele, Lea and Flood, 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(values ^ (values >> np.uint64(31)))


def stream(seed: int, count: int) -> Hashes:
    """`count` fixed numbers of 64 bits for a seed (SplitMix64), the same with every release of NumPy."""
    return mixed(np.uint64(seed) + np.arange(1, count + 1, dtype=np.uint64) * _ODD)

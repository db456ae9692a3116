"""What is left of a row that is too long, and what is never split."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from raytune_ft.core.records import Message, Record
from raytune_ft.data.config import OverLength
from raytune_ft.data.over_length import can_split, split_record, truncated
from raytune_ft.data.tokenize import TokenPolicy, chat_for, tokenize
from raytune_ft.models.chat import Chat, TokenRow

LEFT, RIGHT = OverLength.TRUNCATE_LEFT, OverLength.TRUNCATE_RIGHT


@pytest.fixture
def chat(tiny_model: Path) -> Chat:
    return chat_for(str(tiny_model))


@pytest.mark.parametrize(
    ("side", "bos", "cut", "left"),
    [
        (RIGHT, 1, None, [1, 5, 6, 7]),
        (LEFT, None, None, [6, 7, 8, 9]),
        (LEFT, 5, None, [6, 7, 8, 9]),  # this row does not begin with it
        (LEFT, 1, None, [1, 7, 8, 9]),
        (LEFT, 1, 3, [1, 8, 9]),
        (LEFT, 1, 0, [1, 5, 6, 7, 8, 9]),
    ],
)
def test_a_row_loses_one_end_and_keeps_the_token_that_texts_begin_with(
    side: OverLength, bos: int | None, cut: int | None, left: list[int]
) -> None:
    ids = np.array([1, 5, 6, 7, 8, 9], np.int32)
    found = truncated(TokenRow(ids, ids > 6), 4, side, bos=bos, cut=cut)
    assert found.ids.tolist() == left
    assert found.supervised.tolist() == [token > 6 for token in left]


def test_what_was_judged_as_a_whole_is_not_split() -> None:
    turns = tuple(Message(role, "yes") for role in ("user", "assistant") * 2)
    assert can_split(Record(messages=turns)) and can_split(Record(text="yes"))
    assert not can_split(Record(messages=turns, label=False))
    assert not can_split(Record(messages=turns[:3], chosen=turns[3:], rejected=turns[3:]))
    assert not can_split(Record(messages=turns[:2]))


def test_what_stands_before_the_first_question_stays_with_it(chat: Chat) -> None:
    said = [("assistant", "name?"), ("user", "red"), ("assistant", "blue"), ("user", "yes"), ("assistant", "no")]
    turns = tuple(Message(role, text) for role, text in said)
    pieces = split_record(chat, Record(messages=turns), len(chat.encode(turns[:3]).input_ids))
    assert [piece.messages for piece in pieces] == [turns[:3], turns[3:]]


def test_a_pair_of_which_one_answer_is_cut_away_is_rejected(chat: Chat) -> None:
    """Both lose as many tokens on the left as the longer one has too many."""
    chosen, rejected = (Message("assistant", "red " * 40),), (Message("assistant", "no"),)
    pair = Record(messages=(Message("user", "yes or no"),), chosen=chosen, rejected=rejected)
    [found] = tokenize(chat, [pair], TokenPolicy(20, LEFT))
    assert (found.row, found.rejected, found.reason) == (None, None, "no supervised token: truncate_left took it")

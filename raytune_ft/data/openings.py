"""Rows that begin with the same question: prefixes of one conversation, or one question under several system turns.

They stay in one split, whatever case and blanks are. An opening that very many prompts have ("Hi", "Summarize this") is
no question to tell them by: rows that have it are kept together where all that they ask is the same.
"""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from raytune_ft.core.records import Record
from raytune_ft.core.words import plain
from raytune_ft.data.rows import with_remarks
from raytune_ft.data.shingles import flat

MOST_PROMPTS = 100
"""Most prompts that a question may begin; nor may it begin more than half of all prompts there are."""
COMMON = "an opening of many prompts, which may stand in other splits, too"
"""What is remarked of a row with an opening that is no question."""
NOT_TEST = 1 << 62
"""Set in the nodes of all that does not stand for the rows of test files, which have smaller numbers so."""


def with_question(rows: pa.Table) -> pa.Table:
    """The table with `question`: a node for its first user turn (a raw text: for that); null where that is blank."""
    lists = flat(rows.column("messages"))
    turns, row_of = lists.flatten(), pc.list_parent_indices(lists)
    asks = pc.equal(pc.struct_field(turns, "role"), "user")
    asking, first = np.unique(row_of.filter(asks).to_numpy(), return_index=True)
    texts: list[str | None] = rows.column("text").to_pylist()
    said = pc.struct_field(turns, "content").filter(asks).take(pa.array(first)).to_pylist()
    for place, text in zip(asking.tolist(), said, strict=True):
        texts[place] = text
    keys = [_key(plain(text)) if text and not text.isspace() else None for text in texts]
    return rows.append_column("question", pa.array(keys, pa.int64()))


def most_prompts(prompts: int) -> int:
    """How many of so many prompts a question may begin."""
    return max(1, min(MOST_PROMPTS, prompts // 2))


def common_openings(links: pa.Table, most: int) -> pa.Table:
    """The nodes (`node`) of links (`low` is a prompt's) whose question, `high`, more than `most` prompts have.

    All links of a question must be in the table.
    """
    return pa.table({"node": links.column("low").filter(pa.array(_shared_by(links) > most))})


def shared_only(links: pa.Table) -> pa.Table:
    """The links whose `high` more than one `low` has; all links of a `high` must be in the table."""
    return links.filter(pa.array(_shared_by(links) > 1))


def _shared_by(links: pa.Table) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    _, place, counts = np.unique(links.column("high").to_numpy(), return_inverse=True, return_counts=True)
    return np.asarray(counts[place])


def ask_whole(rows: pa.Table, common: pa.Table) -> pa.Table:
    """The rows with, for those at a place in `common`, a `question` that stands for all that they ask, and a remark."""
    found = pc.is_in(rows.column("place"), common.column("place").combine_chunks())
    places = np.flatnonzero(pc.and_(found, pc.is_valid(rows.column("question"))).to_numpy())
    keys: list[int | None] = rows.column("question").to_pylist()
    remarks: list[str | None] = [None] * rows.num_rows
    rejected = rows.column("reason").is_valid().to_pylist()
    for place, row in zip(places.tolist(), rows.select(["messages", "text"]).take(places).to_pylist(), strict=True):
        record = Record.from_row(row)
        asked = [[turn.role, plain(turn.content), turn.tool_calls] for turn in record.prompt]
        keys[place] = _key(json.dumps(asked or plain(record.text or ""), ensure_ascii=False))
        remarks[place] = None if rejected[place] else COMMON
    rows = rows.set_column(rows.column_names.index("question"), "question", pa.array(keys, pa.int64()))
    return with_remarks(rows, remarks)


def node_of(text: str) -> int:
    """The node of a text that is not of test files."""
    return xxhash.xxh64_intdigest(text.encode()) >> 2 | NOT_TEST


def _key(text: str) -> int:
    """A question's node; prompts and conversations have others."""
    return node_of(f"question:{text}")

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest

from raytune_ft.core.errors import DataError
from raytune_ft.core.records import Message, Record, records_to_table, table_to_records
from raytune_ft.data.config import OverLength
from raytune_ft.data.rows import TOKEN_FIELDS
from raytune_ft.data.shards import count_rows
from raytune_ft.data.tokenize import TokenPolicy, add_tokens, chat_for, split_rows, tokenize, tokenizer_parent
from raytune_ft.models.chat import Chat
from raytune_ft.models.config import TrainOn

ASKED = Message("user", "yes or no")
YES, NO = Message("assistant", "yes"), Message("assistant", "no")
PAIRS = (ASKED, YES, Message("user", "red or blue"), Message("assistant", "red red red"), Message("user", "no?"), NO)


@pytest.fixture
def chat(tiny_model: Path) -> Chat:
    return chat_for(str(tiny_model))


def table_of(*records: Record, reasons: list[str | None] | None = None) -> pa.Table:
    rows = records_to_table(records)
    nothing: list[str | None] = [None] * len(records)
    for name, values in (("reason", reasons or nothing), ("notes", nothing), ("format", ["f"] * len(records))):
        rows = rows.append_column(name, pa.array(values, pa.string()))
    return rows


def supervised(chat: Chat, table: pa.Table, row: int = 0, side: str = "") -> str:
    ids, mask = (table.column(f"{side}{name}")[row].as_py() for name in ("input_ids", "supervised"))
    return str(chat.tokenizer.decode([token for token, kept in zip(ids, mask, strict=True) if kept]))


def test_answers_are_supervised_with_their_end_and_prompts_are_not(chat: Chat) -> None:
    table = add_tokens(table_of(Record(messages=(ASKED, YES))), chat, TokenPolicy(64))
    assert supervised(chat, table) == "yes<|im_end|>"
    assert len(table.column("input_ids")[0]) == len(table.column("supervised")[0])
    assert table.column("chat").to_pylist() == [chat.fingerprint]
    last = add_tokens(table_of(Record(messages=PAIRS)), chat, TokenPolicy(64, train_on=TrainOn.LAST_ASSISTANT_TURN))
    assert supervised(chat, last) == "no<|im_end|>"


def test_rows_that_cannot_be_trained_on_get_a_reason_and_no_tokens(chat: Chat) -> None:
    records = [
        Record(text="|" * 16),
        Record(messages=(ASKED,), reference="yes"),
        Record(text="a"),
        Record(messages=(ASKED, YES), tools='[{"name": "f"}]'),
        Record(messages=(ASKED, YES), metadata={"supervised_spans": [[0, 9]]}),
    ]
    table = table_of(*records, reasons=[None, None, "duplicate: of a:0", None, None])
    tokenized = add_tokens(table, chat, TokenPolicy(15))
    long, unsupervised, before, tools, spans = tokenized.column("reason").to_pylist()
    assert long == "too long: 17 tokens, at most 15"
    assert unsupervised == "a prompt without an answer: nothing to train on"
    assert before == "duplicate: of a:0"
    assert tools.startswith("tools: the chat template ignores them")
    assert spans.startswith("supervised_spans: expected")
    assert all(tokenized.column(field.name).null_count == 5 for field in TOKEN_FIELDS)


def test_a_prompt_with_a_reference_is_a_test_row_without_supervised_tokens(chat: Chat) -> None:
    table = table_of(Record(messages=(ASKED,), reference="yes")).append_column("is_test", pa.array([True]))
    table = add_tokens(table, chat, TokenPolicy(64))
    assert table.column("reason").to_pylist() == [None]
    assert supervised(chat, table) == ""
    assert len(table.column("input_ids")[0]) > 3


def test_a_prompt_that_is_kept_ends_where_the_answer_begins(chat: Chat) -> None:
    policy = TokenPolicy(64, over_length=OverLength.SPLIT, unanswered="keep")
    asked = [Record(messages=(ASKED,)), Record(messages=(ASKED,), reference="yes"), Record(messages=PAIRS[:3])]
    table = add_tokens(table_of(*asked, Record(messages=(ASKED, YES))), chat, policy)
    assert table.column("reason").null_count == 4
    assert [supervised(chat, table, row) for row in range(4)] == ["", "", "", "yes<|im_end|>"]
    assert [table.column("input_ids")[row].as_py() for row in range(3)] == [
        chat.prompt_ids(record.messages) for record in asked
    ]
    remarked = '{"remarks": ["a prompt without an answer"]}'
    assert table.column("notes").to_pylist() == [remarked, remarked, remarked, None]
    (reason,) = add_tokens(table_of(Record(messages=(ASKED,), tools="[{}]")), chat, policy).column("reason").to_pylist()
    assert reason.startswith("tools: the chat template ignores them")
    shorter = TokenPolicy(8, over_length=OverLength.SPLIT, unanswered="keep")
    (reason,) = split_rows(add_tokens(table_of(asked[0]), chat, shorter), chat, shorter).column("reason").to_pylist()
    assert reason.startswith("too long: ")
    with pytest.raises(DataError, match="Raise max_length"):
        add_tokens(table_of(asked[0]), chat, TokenPolicy(8, over_length=OverLength.RAISE, unanswered="keep"))


def test_a_turn_that_spells_out_a_special_token_is_rejected_or_kept_by_policy(chat: Chat) -> None:
    asked = Message("user", "say <|im_end|> and obey")
    rows = table_of(Record(messages=(asked, YES)), Record(messages=(ASKED, Message("assistant", "<|im_start|>"))))
    rejected = add_tokens(rows, chat, TokenPolicy(64)).column("reason").to_pylist()
    assert rejected == ["special token in the text: <|im_end|>", "special token in the text: <|im_start|>"]
    kept = add_tokens(rows, chat, TokenPolicy(64, special_tokens="keep"))
    assert kept.column("reason").to_pylist() == [None, None]


def test_a_preference_has_the_tokens_of_both_answers(chat: Chat) -> None:
    table = add_tokens(
        table_of(Record(messages=(ASKED,), chosen=(YES,), rejected=(NO,)), Record(messages=(ASKED, YES), label=False)),
        chat,
        TokenPolicy(100),
    )
    assert [supervised(chat, table), supervised(chat, table, side="rejected_")] == ["yes<|im_end|>", "no<|im_end|>"]
    assert table.column("input_ids")[0].as_py() == chat.encode((ASKED, YES)).input_ids
    assert table.column("rejected_input_ids")[0].as_py() == chat.encode((ASKED, NO)).input_ids
    assert [table.column("rejected_input_ids")[1].as_py(), table.column("label")[1].as_py()] == [None, False]
    assert supervised(chat, table, 1) == "yes<|im_end|>"


@pytest.mark.parametrize("side", [OverLength.TRUNCATE_LEFT, OverLength.TRUNCATE_RIGHT])
def test_a_truncated_row_has_the_tokens_of_its_side_and_is_counted(chat: Chat, side: OverLength) -> None:
    whole = chat.encode(PAIRS)
    table = add_tokens(table_of(Record(messages=PAIRS)), chat, TokenPolicy(20, side))
    part = slice(-20, None) if side is OverLength.TRUNCATE_LEFT else slice(20)
    assert table.column("input_ids")[0].as_py() == whole.input_ids[part]
    assert table.column("supervised")[0].as_py() == whole.supervised[part]
    assert count_rows(table, "train/0")["remarks"] == {str(side): 1}


def test_truncation_that_takes_every_supervised_token_rejects_the_row(chat: Chat) -> None:
    table = add_tokens(table_of(Record(messages=(ASKED, YES))), chat, TokenPolicy(4, OverLength.TRUNCATE_RIGHT))
    assert table.column("reason").to_pylist() == ["no supervised token: truncate_right took it"]
    assert table.column("notes").to_pylist() == [None]


def test_both_answers_of_a_preference_lose_the_same_on_the_left(chat: Chat) -> None:
    long = Message("assistant", "no no no no")
    record = Record(messages=PAIRS[:3], chosen=(long,), rejected=(YES,))
    chosen, rejected = chat.encode((*PAIRS[:3], long)), chat.encode((*PAIRS[:3], YES))
    (tokens,) = tokenize(chat, [record], TokenPolicy(len(chosen.input_ids) - 5, OverLength.TRUNCATE_LEFT))
    assert tokens.row.ids.tolist() == chosen.input_ids[5:]
    assert tokens.rejected.ids.tolist() == rejected.input_ids[5:]


def test_a_row_that_is_too_long_stops_the_run_where_that_is_the_policy(chat: Chat) -> None:
    record = Record(messages=PAIRS, source="a.jsonl", position=6)
    with pytest.raises(DataError, match=r"a.jsonl: row 7: has \d+ tokens, at most 9. Raise max_length"):
        add_tokens(table_of(record), chat, TokenPolicy(9, OverLength.RAISE))


def test_a_conversation_is_split_between_exchanges_with_its_system_turn(chat: Chat) -> None:
    system = Message("system", "name")
    first, second, third = PAIRS[:2], PAIRS[2:4], PAIRS[4:]
    both = len(chat.encode((system, *first, *second)).input_ids)
    policy = TokenPolicy(both, OverLength.SPLIT)
    whole = Record(
        messages=(system, *PAIRS), reference="no", metadata={"a": 1, "supervised_spans": [[0, 1]]}, position=3
    )
    short = Record(messages=first)
    rows = add_tokens(table_of(short, whole, short), chat, policy)
    assert rows.column("reason").to_pylist() == [None] * 3
    assert rows.column("input_ids").null_count == 1
    pieces = split_rows(rows, chat, policy)
    records = table_to_records(pieces)
    assert [r.messages for r in records] == [first, (system, *first, *second), (system, *third), first]
    assert [r.metadata for r in records[1:3]] == [
        {"a": 1, "piece": "1/2", "split_from": whole.id},
        {"a": 1, "piece": "2/2", "split_from": whole.id, "supervised_spans": [[0, 1]]},
    ]
    assert [r.reference for r in records] == [None, None, "no", None]
    assert pieces.column("made").to_pylist() == [None, None, "split", None]
    assert pieces.column("format").to_pylist() == ["f", "f", None, "f"]
    assert pieces.column("id").to_pylist() == [r.id for r in records]
    assert supervised(chat, pieces, 2) in {"no<|im_end|>", "n"}
    assert count_rows(pieces, "train/0")["made"] == {"split": 1}
    assert split_rows(add_tokens(table_of(*records), chat, policy), chat, policy).num_rows == 4


def test_an_exchange_that_does_not_fit_is_a_rejected_piece_and_what_cannot_be_split_is_rejected_whole(
    chat: Chat,
) -> None:
    policy = TokenPolicy(30, OverLength.SPLIT)
    long = Message("assistant", "red " * 40)
    rows = add_tokens(
        table_of(
            Record(messages=(ASKED, YES, ASKED, long)),
            Record(messages=(ASKED, long)),
            Record(messages=(ASKED, YES, ASKED), chosen=(long,), rejected=(NO,)),
        ),
        chat,
        policy,
    )
    waiting, single, preference = rows.column("reason").to_pylist()
    assert waiting is None
    assert single.startswith("too long: ") and single.endswith("and it cannot be split")
    assert preference.endswith("and it cannot be split")
    pieces = split_rows(rows, chat, policy)
    reasons = pieces.column("reason").to_pylist()
    assert pieces.num_rows == 4
    assert reasons[0] is None
    assert reasons[1].startswith("too long: ")


def test_a_text_is_split_between_characters_and_only_its_end_is_closed(chat: Chat) -> None:
    text = "The quick 🎉🎉🎉 brown fox jumps over é the lazy dog. " * 12
    policy = TokenPolicy(16, OverLength.SPLIT)
    pieces = split_rows(add_tokens(table_of(Record(text=text)), chat, policy), chat, policy)
    assert "".join(pieces.column("text").to_pylist()) == text
    ids = pieces.column("input_ids").to_pylist()
    assert max(map(len, ids)) <= 16 and min(map(len, ids[:-1])) > 10
    eos = chat.tokenizer.eos_token_id
    assert [row[-1] == eos for row in ids] == [False] * (len(ids) - 1) + [True]
    assert pieces.column("reason").null_count == pieces.num_rows
    first, *_, last = (json.loads(m)["piece"] for m in pieces.column("metadata").to_pylist())
    assert (first, last) == (f"01/{len(ids)}", f"{len(ids)}/{len(ids)}")
    again = add_tokens(table_of(*table_to_records(pieces)), chat, policy)
    assert again.column("input_ids").to_pylist() == ids


def test_a_column_that_is_called_as_the_number_of_a_piece_leaves_a_text_its_end(chat: Chat) -> None:
    table = add_tokens(table_of(Record(text="a", metadata={"piece": "Nocturne"})), chat, TokenPolicy(16))
    assert table.column("input_ids")[0].as_py()[-1] == chat.tokenizer.eos_token_id


def test_the_tokenizers_digest_does_not_change_with_the_weights(tiny_model: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "chat_template.jinja"):
        if (tiny_model / name).exists():
            (tmp_path / name).write_bytes((tiny_model / name).read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    assert tokenizer_parent(str(tmp_path)).digest == tokenizer_parent(str(tiny_model)).digest
    (tmp_path / "tokenizer.json").write_text("{}")
    assert tokenizer_parent(str(tmp_path)).digest != tokenizer_parent(str(tiny_model)).digest


def test_the_tokenizers_digest_changes_with_a_vocabulary_that_is_a_file_of_its_own(
    tiny_model: Path, tmp_path: Path
) -> None:
    """As slow tokenizers have it, without a ``tokenizer.json``."""
    for name in ("tokenizer_config.json", "config.json"):
        (tmp_path / name).write_bytes((tiny_model / name).read_bytes())
    found = [tokenizer_parent(str(tmp_path)).digest]
    for name in ("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"):
        for content in ("one", "other"):
            (tmp_path / name).write_text(content)
            found.append(tokenizer_parent(str(tmp_path)).digest)
    assert len(set(found)) == len(found) == 13


def test_a_turn_of_weight_0_is_not_supervised(chat: Chat) -> None:
    turns = (PAIRS[0], Message("assistant", "yes", weight=0), *PAIRS[2:])
    found = add_tokens(table_of(Record(messages=turns), Record(messages=turns[:2])), chat, TokenPolicy(100))
    assert supervised(chat, found) == "red red red<|im_end|>no<|im_end|>"
    assert found.column("reason").to_pylist() == [None, "no supervised token"]


def test_a_long_text_is_not_repeated_for_each_of_its_pieces(chat: Chat) -> None:
    policy = TokenPolicy(16, over_length=OverLength.SPLIT)
    tokenized = add_tokens(table_of(Record(text="yes or no " * 4000)), chat, policy)
    before = pa.default_memory_pool().max_memory()
    pieces = split_rows(tokenized, chat, policy)
    assert pieces.num_rows > 1000
    assert pa.default_memory_pool().max_memory() - before < 20_000_000


def test_a_pair_that_is_cut_to_the_same_answers_is_rejected(chat: Chat) -> None:
    sides = [(Message("assistant", f"{word} red red red red red red"),) for word in ("a", "b")]
    pair = Record(messages=(ASKED,), chosen=sides[0], rejected=sides[1])
    found = add_tokens(table_of(pair), chat, TokenPolicy(5, over_length=OverLength.TRUNCATE_LEFT))
    (reason,) = found.column("reason").to_pylist()
    assert reason == "nothing to compare: truncate_left took what chosen and rejected differ in"

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from raytune_ft.core.records import Message, Record, records_to_table
from raytune_ft.data.tokenize import add_tokens, chat_for, encode, tokenizer_parent

ASKED = Message("user", "yes or no")


def table_of(*records: Record, reasons: list[str | None]) -> pa.Table:
    return records_to_table(records).append_column("reason", pa.array(reasons, pa.string()))


def test_answers_are_supervised_with_their_end_and_prompts_are_not(tiny_model: Path) -> None:
    chat = chat_for(str(tiny_model))
    table = add_tokens(table_of(Record(messages=(ASKED, Message("assistant", "yes"))), reasons=[None]), chat, 64)
    ids, mask = table.column("input_ids")[0].as_py(), table.column("supervised")[0].as_py()
    assert len(ids) == len(mask)
    answer = [token for token, kept in zip(ids, mask, strict=True) if kept]
    assert chat.tokenizer.decode(answer) == "yes<|im_end|>"
    assert table.column("chat").to_pylist() == [chat.fingerprint]


def test_rows_that_cannot_be_trained_on_get_a_reason_and_no_tokens(tiny_model: Path) -> None:
    chat = chat_for(str(tiny_model))
    table = table_of(
        Record(text="a b c d e f g h i j k l m n o p"),
        Record(messages=(ASKED,), reference="yes"),
        Record(text="a"),
        reasons=[None, None, "duplicate: of a:0"],
    )
    tokenized = add_tokens(table, chat, 10)
    long, unsupervised, before = tokenized.column("reason").to_pylist()
    assert long.startswith("too long: ")
    assert long.endswith("at most 10")
    assert before == "duplicate: of a:0"
    assert unsupervised.startswith("too long") or unsupervised == "no supervised token"
    assert tokenized.column("input_ids").null_count == 3
    assert encode(chat, Record(messages=(ASKED,)), 100) == (None, "no supervised token")


def test_a_preference_is_tokenized_with_its_chosen_answer(tiny_model: Path) -> None:
    chat = chat_for(str(tiny_model))
    yes, no = Message("assistant", "yes"), Message("assistant", "no")
    preferred, _ = encode(chat, Record(messages=(ASKED,), chosen=(yes,), rejected=(no,)), 100)
    assert preferred == chat.encode((ASKED, yes))


def test_the_tokenizers_digest_does_not_change_with_the_weights(tiny_model: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "chat_template.jinja"):
        if (tiny_model / name).exists():
            (tmp_path / name).write_bytes((tiny_model / name).read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    assert tokenizer_parent(str(tmp_path)).digest == tokenizer_parent(str(tiny_model)).digest
    (tmp_path / "tokenizer.json").write_text("{}")
    assert tokenizer_parent(str(tmp_path)).digest != tokenizer_parent(str(tiny_model)).digest

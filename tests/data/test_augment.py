from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from raytune_ft.core.errors import ConfigError
from raytune_ft.core.records import Message, Record, records_to_table, table_to_records
from raytune_ft.data.augment import BINS, TAKEN, Quota, augment_rows, count_bins, refuse_taken
from raytune_ft.data.config_augmentation import Augmentation, AugmentationConfig
from raytune_ft.data.paraphrase import judged, word_overlap
from raytune_ft.data.rows import prompt_hash
from raytune_ft.models.generation import Completion


def rows_of(
    records: list[Record], folders: list[str] | None = None, reasons: list[str | None] | None = None
) -> pa.Table:
    count = len(records)
    columns: dict[str, Any] = {
        "reason": pa.array(reasons or [None] * count, pa.string()),
        "raw": pa.nulls(count, pa.string()),
        "group": [prompt_hash(record) for record in records],
        "prompt": [prompt_hash(record) for record in records],
        "format": ["alpaca (columns)"] * count,
        "notes": pa.nulls(count, pa.string()),
        "file": pa.array([0] * count, pa.int64()),
        "folder": folders or ["train"] * count,
    }
    table = records_to_table(records)
    for name, values in columns.items():
        table = table.append_column(name, values if isinstance(values, pa.Array) else pa.array(values))
    return table


def ask(number: int, answer: str = "fine") -> Record:
    turns = (Message("user", f"Describe the wonderful river number {number}."), Message("assistant", answer))
    return Record(messages=turns, source="s", position=number, metadata={"n": number})


def test_the_quota_never_makes_more_than_the_ratio() -> None:
    rows = rows_of([ask(number) for number in range(200)])
    counts = {row["bin"]: row["rows"] for row in count_bins(rows, 5).to_pylist()}
    assert sum(counts.values()) == 200
    for ratio in (0.0, 0.1, 0.333, 0.5, 0.999, 1.0, 1.5, 3.0):
        quota = Quota.of(ratio, counts)
        made = sum(quota.variants(place) * count for place, count in counts.items())
        assert ratio * 200 - 2 <= made <= ratio * 200
    assert Quota.of(1.0, {3: 1}) == Quota(1, 3)
    assert Quota.of(0.5, {3: 1, 9: 1}) == Quota(0, 9)
    assert Quota.of(0.5, {}) == Quota(0, BINS)


def test_variants_are_tagged_and_only_of_usable_training_rows() -> None:
    records = [ask(0), ask(1), ask(2), Record(text="raw", position=3), ask(4)]
    folders = ["train", "validation", "rejected", "train", "train"]
    rows = rows_of(records, folders, [None, None, "duplicate: of 0", None, None])
    config = AugmentationConfig(ratio=2.0, kinds=(Augmentation.WORDING,))
    made = augment_rows(rows, config, Quota(2, 0), 0).slice(5)
    assert Counter(made.column("made").to_pylist()) == {"augmented: wording": made.num_rows}
    assert set(made.column("format").to_pylist()) == {None}
    assert set(made.column("folder").to_pylist()) == {"train"}
    found = table_to_records(made)
    assert {record.metadata["augmented_from"] for record in found} == {records[0].id, records[4].id}
    assert len({record.id for record in found}) == made.num_rows >= 2
    for record, row_id, prompt in zip(
        found, made.column("id").to_pylist(), made.column("prompt").to_pylist(), strict=True
    ):
        assert (record.id, prompt_hash(record), record.answer) == (row_id, prompt, "fine")
        assert record.metadata["augmented"] == "wording"
        assert record.messages[0].content.lower().rstrip("?.").endswith(f"number {record.metadata['n']}")


def test_variants_do_not_depend_on_the_rows_around() -> None:
    records = [ask(number) for number in range(40)]
    config = AugmentationConfig(ratio=1.5, kinds=(Augmentation.CHARACTERS, Augmentation.WORDING, Augmentation.WORDS))
    whole = augment_rows(rows_of(records), config, Quota(1, BINS // 2), 3).to_pylist()
    parts = [augment_rows(rows_of(records[n : n + 7][::-1]), config, Quota(1, BINS // 2), 3) for n in range(0, 40, 7)]
    key = str
    assert sorted(pa.concat_tables(parts).to_pylist(), key=key) == sorted(whole, key=key)
    other = augment_rows(rows_of(records), config, Quota(1, BINS // 2), 4).to_pylist()
    assert {row["id"] for row in whole} != {row["id"] for row in other}


def test_what_cannot_be_varied_is_counted_on_its_row() -> None:
    plain = Record(messages=(Message("user", "Paris 1984"), Message("assistant", "Paris")))
    config = AugmentationConfig(ratio=2.0, kinds=(Augmentation.CHARACTERS,))
    given = augment_rows(rows_of([plain]), config, Quota(2, 0), 0)
    assert given.num_rows == 1
    assert json.loads(given.column("notes")[0].as_py()) == {"unmade": ["characters: no word may change"] * 2}


def test_a_variant_with_the_prompt_of_another_row_is_rejected() -> None:
    records = [ask(number) for number in range(30)]
    config = AugmentationConfig(ratio=1.0, kinds=(Augmentation.WORDING,))
    rows = augment_rows(rows_of(records), config, Quota(1, 0), 0)
    twin = table_to_records(rows)[-1]
    held = Record(messages=twin.messages, position=99)
    both = pa.concat_tables([rows, rows_of([held], ["validation"]).append_column("made", pa.nulls(1, pa.string()))])
    given = refuse_taken(both).to_pylist()
    rejected = [row for row in given if row["reason"]]
    assert [(row["reason"], row["folder"], row["made"]) for row in rejected] == [
        (TAKEN, "rejected", "augmented: wording")
    ]
    assert (rejected[0]["id"], len(given)) == (held.id, both.num_rows)


def test_variants_are_tokenized_for_the_model(tiny_model: Path) -> None:
    from raytune_ft.data.tokenize import TokenPolicy, add_tokens, chat_for

    policy = TokenPolicy(200)
    rows = add_tokens(rows_of([ask(0)]), chat_for(str(tiny_model)), policy)
    config = AugmentationConfig(ratio=1.0, kinds=(Augmentation.CHARACTERS,))
    both = augment_rows(rows, config, Quota(1, 0), 0, model=str(tiny_model), policy=policy)
    text = chat_for(str(tiny_model)).tokenizer.decode(both.column("input_ids")[1].as_py())
    assert table_to_records(both)[1].messages[0].content in text
    assert both.column("input_ids")[1] != both.column("input_ids")[0]


def test_paraphrases_are_close_in_meaning_different_in_words_and_keep_numbers() -> None:
    config = AugmentationConfig(
        ratio=1.0, kinds=("paraphrase",), paraphrase_model="m", min_similarity=0.8, max_overlap=0.5
    )
    text, done = "Add 3 and 4 now", Completion("", [], "stop")
    cases = [
        ("What do 3 and 4 make together?", 0.9, None),
        ("What do 3 and 5 make together?", 0.9, "other numbers"),
        ("What do 3 and 4 make together?", 0.79, "far in meaning"),
        ("Add 3 and 4 please now", 0.9, "nearly the same words"),
        ("", 0.9, "empty"),
    ]
    assert [judged(text, said, cosine, done, config).reason for said, cosine, _ in cases] == [why for *_, why in cases]
    assert judged(text, "x", 0.9, Completion("", [], "length"), config).reason == "cut off at max_new_tokens"
    assert word_overlap("Add 3 and 4 now", "add 3 and 4 please") == 4 / 6


def test_paraphrases_need_a_model_and_a_model_needs_paraphrases() -> None:
    for settings in ({"kinds": ("paraphrase",)}, {"paraphrase_model": "starter:smollm2-135m"}):
        with pytest.raises(ConfigError, match="go together: set both or neither"):
            AugmentationConfig(ratio=1.0, **settings)


@pytest.mark.real
def test_a_model_writes_paraphrases_whatever_shares_its_batch() -> None:
    from raytune_ft.data.paraphrase import paraphrase

    texts = [
        "Explain why the sky is blue.",
        "Give me three tips for staying healthy.",
        "What is the capital of France?",
    ]
    config = AugmentationConfig(
        ratio=1.0, kinds=("paraphrase",), paraphrase_model="starter:smollm2-135m", min_similarity=0.3, max_new_tokens=48
    )
    models = ("starter:smollm2-135m", "starter:all-minilm-l6-v2")
    together = paraphrase(texts, [0, 1, 2], *models, config)
    assert paraphrase(texts[1:2], [1], *models, config) == together[1:2]
    assert all((found.text is None) != (found.reason is None) for found in together)

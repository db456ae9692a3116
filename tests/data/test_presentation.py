"""How rows are presented to a model, from the settings of `prepare` to the folder of the trained model."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raytune_ft.core.records import Message, Record, records_to_table
from raytune_ft.core.storage import Location
from raytune_ft.data.config import DataCollectionConfig
from raytune_ft.data.inspection import inspect_rows
from raytune_ft.data.run import prepare, tokenized_splits
from raytune_ft.data.shards import write_file
from raytune_ft.data.tokenize import TEMPLATE_FILE, TokenPolicy, add_tokens, chat_for
from raytune_ft.models.templates import INSTRUCTION_TEMPLATE


def rows(count: int) -> str:
    lines = [{"question": f"What is {n}?", "answer": f"Think of {n}.\n#### {n}"} for n in range(count)]
    long = {"text": "The quick brown fox jumps over the lazy dog. " * 40}
    wrong = {"question": "Why is it 5?", "answer": "Because it is 6.\n#### 5"}
    return "".join(json.dumps(row) + "\n" for row in [*lines, wrong, long])


@pytest.mark.ray
def test_what_was_chosen_for_the_rows_goes_with_the_dataset(
    tiny_model: Path, tmp_path: Path, ray_cluster: object
) -> None:
    (tmp_path / "rows.jsonl").write_text(rows(20))
    config = DataCollectionConfig(
        sources=[str(tmp_path / "rows.jsonl")],
        output_path=str(tmp_path / "data"),
        model_path=str(tiny_model),
        template="instruction",
        system_prompt="Turn the text into JSON.",
        reasoning="mask",
        over_length="split",
        max_length=256,
        near_duplicates="keep",
        test_split=0.0,
        validation_split=0.0,
    )
    made = prepare(config)
    pieces = made.numbers["made"]["split"] + 1
    assert pieces > 1
    assert made.numbers["rows_in"] == 22
    assert made.numbers["rows_out"] == 21 + pieces
    assert made.numbers["tokens_longest"] <= 256
    assert made.numbers["remarks"] == {"reasoning ends in another answer": 1, "no reasoning": 1}
    assert (made.local() / TEMPLATE_FILE).read_text() == INSTRUCTION_TEMPLATE
    shown = [row.sides[0].pieces for row in inspect_rows(str(tmp_path / "data"), rows=99)]
    answers = {"".join(p.text for p in side if p.supervised) for side in shown if not side[0].supervised}
    assert answers == {f"{n}\n</response><|im_end|>" for n in range(20)}
    assert all(
        "".join(p.text for p in side).startswith("<instruction>\nTurn the text into JSON.\n</instruction>\n")
        for side in shown
        if not side[0].supervised
    )
    shorter = tokenized_splits(made.location.uri, str(tiny_model), tmp_path / "anew", max_length=200)
    assert (tmp_path / "anew" / TEMPLATE_FILE).read_text() == INSTRUCTION_TEMPLATE
    again = [row.sides[0] for row in inspect_rows(str(tmp_path / "anew"), rows=99)]
    assert max(side.tokens for side in again) <= 200
    assert len(again) > 21 + pieces
    assert list(shorter) == ["train"]


def test_the_trained_model_has_the_template_of_its_dataset(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from raytune_ft.training.config import FineTuningConfig
    from raytune_ft.training.session import Seat, train_in_process

    template = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + eos_token }}{% endfor %}"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / TEMPLATE_FILE).write_text(template)
    records = [Record(messages=(Message("user", f"no {n}"), Message("assistant", "yes"))) for n in range(4)]
    table = records_to_table(records).append_column("reason", pa.nulls(4, pa.string()))
    table = add_tokens(table, chat_for(str(tiny_model), template), TokenPolicy(64, template=template))
    file = "train/00000.parquet"
    write_file(table, Location.at(tmp_path / "data"), file)
    assert pq.read_table(tmp_path / "data" / file).num_rows == 4
    config = FineTuningConfig(
        model_path=str(tiny_model), output_dir=str(tmp_path / "out"), dataset_path=str(tmp_path / "data"), max_steps=1
    )
    output = Location.at(tmp_path / "out")
    train_in_process(config, {"train": [str(tmp_path / "data" / file)]}, Seat(), output=output)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == template

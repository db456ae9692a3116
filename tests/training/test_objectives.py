"""Rows that are longer than the model can read are refused before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from raytune_ft.core.errors import DataError
from raytune_ft.models.adapters import add_virtual_tokens
from raytune_ft.training.batches import PromptRows, TokenRows
from raytune_ft.training.config import FineTuningConfig
from raytune_ft.training.objectives import refuse_too_long
from raytune_ft.training.pairs import PairRows

from ..rows import pair_files, turns_file  # noqa: TID252 - tests are no installed package

CONFIG = FineTuningConfig(model_path="m", output_dir="o", dataset_path="d")


def model_of(folder: Path, context: int) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.max_position_embeddings = context
    return model


def test_a_row_beyond_the_context_is_named_with_the_length_that_fits(
    tiny_model: Path, splits: dict[str, list[str]], tmp_path: Path
) -> None:
    rows = TokenRows(splits["train"], str(tmp_path / "cache"))
    lengths = [len(rows[number].input_ids) for number in range(len(rows))]
    longest = max(lengths)
    refuse_too_long({"train": rows}, model_of(tiny_model, longest), CONFIG)
    refuse_too_long({"train": rows}, model_of(tiny_model, 0), CONFIG)  # no limit
    words = (
        rf"{lengths.count(longest)} of 18 train rows .* than the {longest - 1} that m can read; the longest is row "
        rf"{lengths.index(longest) + 1} with {longest}. Set max_length: {longest - 1}"
    )
    with pytest.raises(DataError, match=words):
        refuse_too_long({"train": rows}, model_of(tiny_model, longest - 1), CONFIG)


def test_virtual_tokens_count_towards_the_context(
    tiny_model: Path, splits: dict[str, list[str]], tmp_path: Path
) -> None:
    rows = TokenRows(splits["train"], str(tmp_path / "cache"))
    longest = int(rows.row_lengths.max())
    for count, context in ((3, longest + 3), (3, longest + 2), (30, 24)):
        model = model_of(tiny_model, context)
        model = add_virtual_tokens(model, kind="prompt_tuning", count=count, seed=0, base=str(tiny_model))
        if context == longest + 3:
            refuse_too_long({"train": rows}, model, CONFIG)
            continue
        remedy = "Lower num_virtual_tokens" if count == 30 else "Set max_length"
        with pytest.raises(DataError, match=rf"besides {count} virtual ones .*{remedy}"):
            refuse_too_long({"train": rows}, model, CONFIG)


def test_scaled_rotations_reach_further(tiny_model: Path, splits: dict[str, list[str]], tmp_path: Path) -> None:
    rows = TokenRows(splits["train"], str(tmp_path / "cache"))
    model = model_of(tiny_model, 12)
    model.config.rope_parameters = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 12}
    refuse_too_long({"train": rows}, model, CONFIG)
    model.config.rope_parameters = {"full_attention": {"rope_type": "linear", "factor": 8.0}}
    refuse_too_long({"train": rows}, model, CONFIG)


def test_of_a_pair_the_longer_row_counts_and_of_a_prompt_what_stands_before_the_answer(
    tiny_model: Path, tmp_path: Path
) -> None:
    pairs = PairRows(pair_files(tiny_model, tmp_path, train=5, validation=1)["train"], str(tmp_path / "a"))
    longest = max(len(row.input_ids) for number in range(5) for row in pairs.both(number))
    refuse_too_long({"train": pairs}, model_of(tiny_model, longest), CONFIG)
    with pytest.raises(DataError, match=f"with {longest}"):
        refuse_too_long({"train": pairs}, model_of(tiny_model, longest - 1), CONFIG)
    file = turns_file(tiny_model, tmp_path / "turns.parquet", [("order 1", "yes " * 20), ("order 2", "yes")])
    prompts = PromptRows([file], str(tmp_path / "b"))
    asked = prompts[0].supervised.index(True)
    refuse_too_long({"train": prompts}, model_of(tiny_model, asked + 1), CONFIG)
    with pytest.raises(DataError, match="2 of 2 train rows"):
        refuse_too_long({"train": prompts}, model_of(tiny_model, asked), CONFIG)

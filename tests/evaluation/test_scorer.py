from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from raytune_ft.core.errors import DataError, ModelError
from raytune_ft.core.records import Message, Record, records_to_table
from raytune_ft.evaluation.config import EvaluationConfig
from raytune_ft.evaluation.scorer import MEASURED_SCHEMA, ModelScorer

RECORDS = [
    Record(messages=(Message("user", "What is the capital of France?"), Message("assistant", "Paris."))),
    Record(messages=(Message("user", "red or blue"),), reference="blue"),
    Record(text="The quick brown fox jumps over the lazy dog."),
]


def scorer(model: Path, *metrics: str, path: str | None = None) -> ModelScorer:
    config = EvaluationConfig(
        model_path=str(model), dataset_path="d", metrics=metrics, decoding={"max_new_tokens": 5}, precision="fp32"
    )
    return ModelScorer(path or str(model), config, 1)


def test_likelihoods_equal_a_plain_forward_pass(tiny_model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    table = scorer(tiny_model, "perplexity")(records_to_table([replace(r, position=7) for r in RECORDS]))
    assert table.schema == MEASURED_SCHEMA
    assert table["position"].to_pylist() == [7, 7, 7]
    assert table["answer"].null_count == 3
    rendered = [
        ("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n", "Paris.<|im_end|>"),
        ("<|im_start|>user\nred or blue<|im_end|>\n<|im_start|>assistant\n", "blue<|im_end|>"),
    ]
    for row, (prompt, answer) in enumerate(rendered):
        before = len(tokenizer(prompt)["input_ids"])
        ids = torch.tensor([tokenizer(prompt + answer)["input_ids"]])
        with torch.no_grad():
            logits = model(ids).logits[0, before - 1 : -1]
        nll = torch.nn.functional.cross_entropy(logits, ids[0, before:], reduction="sum")
        assert table["nll"][row].as_py() == pytest.approx(float(nll), rel=1e-5)
        assert table["tokens"][row].as_py() == ids.shape[1] - before
    assert math.isfinite(table["nll"][2].as_py())


def test_answers_come_with_why_they_ended(tiny_model: Path) -> None:
    table = scorer(tiny_model, "exact_match")(records_to_table(RECORDS[:2]))
    assert set(table["finish_reason"].to_pylist()) <= {"stop", "length"}
    assert all(0 <= tokens <= 5 for tokens in table["answer_tokens"].to_pylist())
    assert table["nll"].null_count == 2


def test_a_row_longer_than_the_model_takes_is_refused(tiny_model: Path) -> None:
    long = Record(text="fox " * 600, position=3)
    with pytest.raises(DataError, match=r"row 4 has \d+ tokens, more than the 512"):
        scorer(tiny_model, "perplexity")(records_to_table([long]))


def test_a_model_that_cannot_be_loaded_is_said_with_the_first_rows(tiny_model: Path, tmp_path: Path) -> None:
    broken = scorer(tiny_model, "perplexity", path=str(tmp_path))
    with pytest.raises(ModelError, match="is not a model"):
        broken(records_to_table(RECORDS))

"""Measured rows: equal to plain forward passes, marked where a record does not fit, the same for grouped adapters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from raytune_ft.core.errors import ModelError
from raytune_ft.core.records import Message, Record
from raytune_ft.evaluation.kept import Row
from raytune_ft.evaluation.scorer import ModelScorer, choices_of, load_scorer, supervised_bytes
from raytune_ft.evaluation.workload import Target, Workload, grouped
from raytune_ft.models.config import DecodingConfig, Precision

RECORDS = [
    Record(messages=(Message("user", "What is the capital of France?"), Message("assistant", "Paris."))),
    Record(messages=(Message("user", "red or blue"),), reference="blue", position=1),
    Record(text="The quick brown fox jumps over the lazy dog.", position=2),
]


def workload(**asked: bool) -> Workload:
    decoding = DecodingConfig(max_new_tokens=5)
    return Workload(**{"answers": False, **asked}, decoding=decoding, precision=Precision.FP32)


def measure(scorer: ModelScorer, records: Sequence[Record], label: str = "m") -> list[Row]:
    rows: list[Row] = []
    scorer.measure(label, records, rows.extend)
    return sorted(rows, key=lambda row: row["position"])


def scorer_of(model: Path, **asked: bool) -> ModelScorer:
    return ModelScorer([Target("m", str(model))], workload(**asked), 1)


@pytest.fixture(scope="module")
def adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folders = []
    for number in range(2):
        torch.manual_seed(number)
        base = AutoModelForCausalLM.from_pretrained(tiny_model)
        settings = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        folders.append(tmp_path_factory.mktemp("adapters") / f"a{number}")
        get_peft_model(base, settings).save_pretrained(folders[-1])
    return folders


def test_likelihoods_equal_a_plain_forward_pass(tiny_model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    rows = measure(scorer_of(tiny_model, likelihoods=True), RECORDS)
    assert all("answer" not in row for row in rows)
    rendered = [
        ("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n", "Paris.<|im_end|>"),
        ("<|im_start|>user\nred or blue<|im_end|>\n<|im_start|>assistant\n", "blue<|im_end|>"),
    ]
    for row, (prompt, answer) in zip(rows, rendered, strict=False):
        before = len(tokenizer(prompt)["input_ids"])
        ids = torch.tensor([tokenizer(prompt + answer)["input_ids"]])
        with torch.no_grad():
            logits = model(ids).logits[0, before - 1 : -1]
        nll = torch.nn.functional.cross_entropy(logits, ids[0, before:], reduction="sum")
        assert row["nll"] == pytest.approx(float(nll), rel=1e-5)
        assert row["tokens"] == ids.shape[1] - before
        assert row["windows"] == 1
    assert math.isfinite(rows[2]["nll"])
    assert [row["bytes"] for row in rows] == [6, 4, 44]


def test_answers_come_with_why_they_ended(tiny_model: Path) -> None:
    rows = measure(scorer_of(tiny_model, answers=True), RECORDS[:2])
    assert {row["finish_reason"] for row in rows} <= {"stop", "length"}
    assert all(0 <= row["answer_tokens"] <= 5 for row in rows)
    assert all("nll" not in row for row in rows)


def test_a_row_longer_than_the_model_takes_is_scored_in_windows(tiny_model: Path) -> None:
    [row] = measure(scorer_of(tiny_model, likelihoods=True), [Record(text="fox " * 600)])
    assert row["windows"] > 1
    assert math.isfinite(row["nll"])


def test_a_prompt_without_room_for_an_answer_is_marked_and_the_others_are_answered(tiny_model: Path) -> None:
    long = Record(messages=(Message("user", "fox " * 600),), reference="x", position=1)
    first, second = measure(scorer_of(tiny_model, answers=True), [RECORDS[0], long])
    assert first["answer"] is not None
    assert "the model takes 512 together with the answer" in second["error"]
    assert second["fault"] == "DataError"


def test_choices_are_scored_in_the_place_of_the_answer(tiny_model: Path) -> None:
    record = replace(RECORDS[1], position=0, metadata={"choices": ["red", "blue"]})
    [row] = measure(scorer_of(tiny_model, choices=True), [record])
    assert [choice["text"] for choice in row["choices"]] == ["red", "blue"]
    [blue] = measure(scorer_of(tiny_model, likelihoods=True), [replace(record, metadata={})])
    assert row["choices"][1]["nll"] == pytest.approx(blue["nll"], rel=1e-6)
    assert choices_of(RECORDS[0]) == []


def test_adapters_on_one_loaded_base_measure_as_each_loaded_alone(tiny_model: Path, adapters: list[Path]) -> None:
    targets = [Target("base", str(tiny_model)), *(Target(path.name, str(path)) for path in adapters)]
    assert grouped(targets) == [targets]
    work = workload(answers=True, likelihoods=True)
    together = load_scorer(targets, work)
    for target in reversed(targets):
        alone = load_scorer([target], work)
        mine, its = (measure(scorer, RECORDS[:2], target.label) for scorer in (together, alone))
        assert [row["answer"] for row in mine] == [row["answer"] for row in its]
        assert [row["nll"] for row in mine] == pytest.approx([row["nll"] for row in its], rel=1e-6)
    nll = {target.label: measure(together, RECORDS[:1], target.label)[0]["nll"] for target in targets}
    assert len(set(nll.values())) == 3


def test_only_what_one_base_can_answer_for_is_put_together(tiny_model: Path, adapters: list[Path]) -> None:
    other = Target("served", "http://127.0.0.1:1/v1")
    one, two = (Target(path.name, str(path)) for path in adapters)
    assert grouped([one, other, two]) == [[one, two], [other]]
    assert grouped([other, Target("base", str(tiny_model))]) == [[other], [Target("base", str(tiny_model))]]


def test_a_spanned_answer_counts_the_bytes_of_its_spans() -> None:
    record = Record(messages=(Message("user", "q"), Message("assistant", "é = 2")))
    assert supervised_bytes(record) == 6
    assert supervised_bytes(replace(record, metadata={"supervised_spans": [[4, 5]]})) == 1


def test_a_turn_that_does_not_count_has_no_bytes_and_a_call_has_those_of_its_json() -> None:
    turns = (Message("user", "q"), Message("assistant", "long", weight=0), Message("user", "r"))
    assert supervised_bytes(Record(messages=(*turns, Message("assistant", "ab")))) == 2
    assert supervised_bytes(Record(messages=(*turns, Message("assistant", "", "[{}]")))) == 4


def test_a_model_that_cannot_be_loaded_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not a model"):
        scorer_of(tmp_path, likelihoods=True)

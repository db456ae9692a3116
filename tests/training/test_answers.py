"""Generated answers are measured while training goes on, and what they are measured against is the row's own answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from raytune_ft.core.errors import ConfigError
from raytune_ft.core.storage import Location
from raytune_ft.models.attention import SEGMENTS
from raytune_ft.models.chat import Encoded
from raytune_ft.models.loading import load_tokenizer
from raytune_ft.training.answers import AnswerCheck, Question
from raytune_ft.training.peers import ALONE
from raytune_ft.training.session import Seat, train_in_process


def test_the_question_is_what_stands_before_the_last_supervised_run() -> None:
    row = Encoded([1, 2, 3, 4, 5, 6, 7], [False, True, True, False, True, True, False])
    assert Question.of(row) == Question([1, 2, 3, 4], [5, 6])
    assert Question.of(Encoded([1, 2], [True, True])) is None
    assert Question.of(Encoded([1, 2], [False, False])) is None


def test_answers_are_the_greedy_ones_and_wrong_references_count_nothing(tiny_model: Path, settings) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="sdpa").eval()
    tokenizer = load_tokenizer(str(tiny_model))
    prompts = [tokenizer("order 1 red")["input_ids"], tokenizer("blue sky, green grass and")["input_ids"]]
    rows = []
    for prompt in prompts:  # greedy answers by transformers itself, the row's own answer from here on
        out = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=6, min_new_tokens=6)[0].tolist()
        rows.append(Encoded(out, [False] * len(prompt) + [True] * 6))
    longer = AnswerCheck(model, tokenizer, settings(eval_generation_metric="rouge"), rows, ALONE)
    assert longer.measure()["eval_rouge"] > 0.5
    wrong = [Encoded([*row.input_ids[:-1], row.input_ids[0]], row.supervised) for row in rows]
    assert AnswerCheck(model, tokenizer, settings(), wrong, ALONE).measure() == {"eval_exact_match": 0.0}
    assert model.training


def test_a_run_learns_to_answer_and_says_so_at_each_evaluation(settings, splits, tmp_path: Path) -> None:
    common = {"eval_strategy": "steps", "eval_steps": 2, "report_to": [], "save_strategy": "no"}
    config = settings(**common, eval_generation_rows=3, eval_generation_metric="f1")
    train_in_process(config, splits, Seat(), output=Location.at(tmp_path / "a"))
    train_in_process(settings(**common), splits, Seat(), output=Location.at(tmp_path / "b"))
    with_answers, without = (
        [json.loads(line) for line in (tmp_path / name / "history.jsonl").read_text().splitlines()] for name in "ab"
    )
    assert [row["step"] for row in with_answers if "eval_f1" in row] == [2, 4, 6]
    assert all(0 <= row.get("eval_f1", 0) <= 1 for row in with_answers)
    # Generation switches the attention and the cache; training goes on as if it had not been.
    assert [row["loss"] for row in with_answers] == [row["loss"] for row in without]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"eval_generation_metric": "perplexity"}, "not one number over answers"),
        ({"eval_generation_rows": 4, "zero_stage": 3}, "take zero_stage 2"),
    ],
)
def test_what_cannot_be_measured_is_refused(changes: dict, words: str, settings) -> None:
    with pytest.raises(ConfigError, match=words):
        settings(**changes)


def test_the_attention_of_training_is_back_after_an_evaluation(tiny_model: Path, settings) -> None:
    from raytune_ft.models.attention import use_attention

    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="sdpa")
    use_attention(model, SEGMENTS)
    row = Encoded([1, 2, 3, 4], [False, False, True, True])
    AnswerCheck(model, load_tokenizer(str(tiny_model)), settings(), [row], ALONE).measure()
    assert model.config._attn_implementation == SEGMENTS

"""Generated answers are measured while training goes on, and what they are measured against is the row's own answer."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from raytune_ft.core.errors import ConfigError, DataError
from raytune_ft.core.storage import Location
from raytune_ft.models.attention import SEGMENTS
from raytune_ft.models.chat import Encoded
from raytune_ft.models.loading import load_tokenizer
from raytune_ft.training.answers import AnswerCheck, Question
from raytune_ft.training.batches import TokenRows
from raytune_ft.training.config import FineTuningConfig
from raytune_ft.training.inputs import checked
from raytune_ft.training.peers import ALONE
from raytune_ft.training.session import Seat, train_in_process


def check(model: Any, tokenizer: Any, config: FineTuningConfig, rows: list[Encoded]) -> AnswerCheck:
    made = AnswerCheck.wanted(config, rows, model, tokenizer, "cpu")
    assert made is not None
    return made


def test_the_question_is_what_stands_before_the_last_supervised_run() -> None:
    row = Encoded([1, 2, 3, 4, 5, 6, 7], [False, True, True, False, True, True, False])
    assert Question.of(row) == Question([1, 2, 3, 4], [5, 6])
    assert Question.of(Encoded([1, 2], [True, True])) is None
    assert Question.of(Encoded([1, 2], [False, False])) == Question([1, 2], [])  # nobody answers it
    assert Question.of(Encoded([], [])) is None


def test_answers_are_the_greedy_ones_and_wrong_references_count_nothing(tiny_model: Path, settings) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="sdpa").eval()
    tokenizer = load_tokenizer(str(tiny_model))
    prompts = [tokenizer("order 1 red")["input_ids"], tokenizer("blue sky, green grass and")["input_ids"]]
    rows = []
    for prompt in prompts:  # greedy answers by transformers itself, the row's own answer from here on
        out = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=6, min_new_tokens=6)[0].tolist()
        rows.append(Encoded(out, [False] * len(prompt) + [True] * 6))
    longer = check(model, tokenizer, settings(eval_generation_rows=2, eval_generation_metric="rouge"), rows)
    assert longer.measure(ALONE)["eval_rouge"] > 0.5
    wrong = [Encoded([*row.input_ids[:-1], row.input_ids[0]], row.supervised) for row in rows]
    assert check(model, tokenizer, settings(eval_generation_rows=2), wrong).measure(ALONE) == {"eval_exact_match": 0.0}
    assert model.training


def test_fewer_rows_than_asked_for_are_said(tiny_model: Path, settings, splits, caplog) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), load_tokenizer(str(tiny_model))
    rows = [Encoded([1, 2, 3], [False, True, True]), Encoded([1, 2], [True, True])]
    assert check(model, tokenizer, settings(eval_generation_rows=1), rows).shortfall is None
    short = check(model, tokenizer, settings(eval_generation_rows=5), rows)
    assert len(short) == 1 and short.shortfall is not None
    assert short.shortfall.endswith("5 asked for, 1 answered: of 2 validation rows, 1 has nothing to answer")
    with caplog.at_level(logging.WARNING, logger="raytune_ft"):
        train_in_process(settings(eval_generation_rows=9, max_steps=1), splits, Seat(), output=None)
    assert "9 asked for, 4 answered: of 4 validation rows, 0 have nothing" in caplog.text


@pytest.mark.parametrize("metric", ["field_f1", "label_f1", "bleu"])
def test_ranks_that_answer_a_share_each_add_up_to_all_answers(metric: str, tiny_model: Path, settings) -> None:
    """Columns of fields and labels follow from the references, which every rank has."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="sdpa").eval()
    tokenizer = load_tokenizer(str(tiny_model))
    prompt = tokenizer("order 1 red")["input_ids"]
    texts = ['{"a": 1}', '{"b": "x", "a": 2}', '{"c": [3]}']
    answers = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    rows = [Encoded([*prompt, *answer], [False] * len(prompt) + [True] * len(answer)) for answer in answers]
    made = check(model, tokenizer, settings(eval_generation_rows=3, eval_generation_metric=metric), rows)
    said = {0: texts[0], 1: '{"a": 2}', 2: "no"}
    shares = [{number: said[number] for number in range(rank, 3, 2)} for rank in range(2)]
    parts = [made._sums(share) for share in shares]
    assert parts[0].keys() == parts[1].keys() == made._sums(said).keys()
    together = {name: parts[0][name] + parts[1][name] for name in parts[0]}
    assert made._value(together) == made._value(made._sums(said))
    expected = {"field_f1": 2 * 2 / (2 + 4), "label_f1": (1 + 0 + 0) / 3}
    if metric in expected:
        assert made._value(together) == {f"eval_{metric}": pytest.approx(expected[metric])}


def test_chinese_answers_are_measured_by_the_tokens_that_the_settings_name(tiny_model: Path, settings) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), load_tokenizer(str(tiny_model))
    prompt, wanted = tokenizer("order 1")["input_ids"], "今天天气很好，我们去公园。"
    answer = tokenizer(wanted, add_special_tokens=False)["input_ids"]
    rows = [Encoded([*prompt, *answer], [False] * len(prompt) + [True] * len(answer))]
    bleu = {"eval_generation_rows": 1, "eval_generation_metric": "bleu"}
    with pytest.raises(DataError, match="bleu_tokenizer: char fit any script, zh fits Chinese"):
        check(model, tokenizer, settings(**bleu), rows)
    said = "今天天气非常好，我们去公园。"
    for name in ("zh", "char"):
        made = check(model, tokenizer, settings(**bleu, bleu_tokenizer=name), rows)
        expected = sacrebleu.BLEU(tokenize=name).corpus_score([said], [[wanted]]).score
        assert made._value(made._sums({0: said})) == {"eval_bleu": pytest.approx(expected)}
        assert 10 < expected < 90


def test_a_tokenizer_whose_package_is_not_there_is_refused_before_a_run_begins(settings) -> None:
    if importlib.util.find_spec("mecab_ko") is not None:
        pytest.skip("sacrebleu[ko] is installed here")
    korean = settings(eval_generation_rows=1, eval_generation_metric="bleu", bleu_tokenizer="ko-mecab")
    with pytest.raises(ConfigError, match=r"bleu_tokenizer: ko-mecab needs .* 'sacrebleu\[ko\]'"):
        checked(korean)


def test_the_best_checkpoint_is_that_of_the_metric_that_the_settings_name(settings, splits, tmp_path: Path) -> None:
    common = {"eval_strategy": "steps", "eval_steps": 2, "report_to": [], "learning_rate": 2e-2, "num_train_epochs": 6}
    config = settings(
        **common, eval_generation_rows=4, eval_generation_metric="length", metric_for_best_model="eval_length"
    )
    summary = train_in_process(config, splits, Seat(), output=Location.at(tmp_path / "a"))
    history = [json.loads(line) for line in (tmp_path / "a/history.jsonl").read_text().splitlines()]
    evaluated = {row["step"]: row for row in history if "eval_length" in row}
    least = min(row["eval_length"] for row in evaluated.values())
    assert summary.metric == "eval_length" and summary.best == least
    assert summary.best_step == next(step for step, row in evaluated.items() if row["eval_length"] == least)
    # Of what lies there, answers are as many words off as then: these are the weights of that step.
    model = AutoModelForCausalLM.from_pretrained(settings().model_path, attn_implementation="sdpa")
    adapted = PeftModel.from_pretrained(model, tmp_path / "a").eval()
    rows = TokenRows(splits["validation"], str(tmp_path))
    again = check(adapted, load_tokenizer(settings().model_path), config, [rows[number] for number in range(4)])
    assert again.measure(ALONE)["eval_length"] == pytest.approx(least)


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
        ({"eval_generation_metric": "perplexity"}, "perplexity is not measured on answers alone; take one of accuracy"),
        ({"eval_generation_metric": "choice_accuracy"}, "is not measured on answers alone"),
        (
            {"metric_for_best_model": "eval_bleu"},
            r"eval_bleu is not among what is measured \(eval_loss, eval_perplexity\)",
        ),
        (
            {"metric_for_best_model": "eval_bleu", "eval_generation_rows": 2},
            r"is not among what is measured \(eval_loss, eval_perplexity, eval_exact_match\)",
        ),
        ({"eval_generation_rows": 4, "zero_stage": 3}, "take zero_stage 2"),
        ({"bleu_tokenizer": "words"}, "bleu_tokenizer: must be one of '13a', 'intl', 'zh'"),
        ({"bleu_tokenizer": "zh", "eval_generation_metric": "bleu"}, "bleu_tokenizer: has no effect .* and none are"),
        (
            {"bleu_tokenizer": "zh", "eval_generation_rows": 4},
            "bleu_tokenizer: has no effect .* are measured by exact_match",
        ),
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
    check(model, load_tokenizer(str(tiny_model)), settings(eval_generation_rows=1), [row]).measure(ALONE)
    assert model.config._attn_implementation == SEGMENTS

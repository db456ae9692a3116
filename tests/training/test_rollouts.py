"""Reinforcement: a model that says yes or no learns which is rewarded, by a metric and by a reward model."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import pytest
from sacrebleu.metrics import BLEU

from raytune_ft.core.errors import ConfigError, DataError, ModelError, StoppedError
from raytune_ft.core.storage import Location
from raytune_ft.models.chat import Chat
from raytune_ft.models.generation import Completion
from raytune_ft.models.loading import load_tokenizer
from raytune_ft.training.answers import Question
from raytune_ft.training.batches import PromptRows
from raytune_ft.training.config_alignment import ReinforcementConfig, RewardConfig
from raytune_ft.training.diagnosis import Trouble, diagnose
from raytune_ft.training.guide import departures_from_guide
from raytune_ft.training.judges import MetricJudge, refuse_misfits
from raytune_ft.training.session import Seat, train_in_process

from ..rows import pair_files, prompts_file, turns_file  # noqa: TID252 - tests are no installed package
from .test_preference import history
from .test_ranks import on_ranks, run


@pytest.fixture
def prompts(undecided: Path, tmp_path: Path) -> dict[str, list[str]]:
    """Twelve prompts to learn from and four to be judged by; the row's own answer is no, the less likely one."""
    train = [(f"order {n}", "no") for n in range(12)]
    return {
        "train": [turns_file(undecided, tmp_path / "train-prompts.parquet", train)],
        "validation": [turns_file(undecided, tmp_path / "validation-prompts.parquet", train[:4])],
    }


@pytest.fixture
def reinforcement(undecided: Path, tmp_path: Path):
    def make(**changes: object) -> ReinforcementConfig:
        common = {
            **{"model_path": str(undecided), "output_dir": str(tmp_path / "out"), "dataset_path": "given as splits"},
            **{"reward_metric": "exact_match", "num_generations": 8, "max_new_tokens": 4, "max_steps": 16},
            **{"learning_rate": 2e-3, "method": "full", "lr_scheduler_type": "constant", "eval_generation_rows": 4},
            **{"per_device_train_batch_size": 4, "report_to": [], "warmup_steps": 0, "eval_strategy": "steps"},
            **{"eval_steps": 5, "save_strategy": "no"},
        }
        merged = {**common, **changes}
        return ReinforcementConfig(**{name: value for name, value in merged.items() if value is not None})

    return make


def test_what_is_rewarded_becomes_likelier(reinforcement, prompts, tmp_path: Path) -> None:
    summary = train_in_process(reinforcement(), prompts, Seat(), output=Location.at(tmp_path / "a"))
    rewards = history(tmp_path / "a", "reward")
    assert 0.2 < fmean(rewards[:4]) < 0.6
    assert fmean(rewards[-4:]) > 0.8
    assert (history(tmp_path / "a", "eval_reward")[0], history(tmp_path / "a", "eval_reward")[-1]) == (0, 1)
    assert (summary.metric, summary.best) == ("eval_reward", 1)
    assert not history(tmp_path / "a", "eval_loss")
    assert history(tmp_path / "a", "kl") == [0] * 16
    assert all(0 <= share <= 1 for share in history(tmp_path / "a", "cut_off_share"))
    assert "reward" in (tmp_path / "a/curves.svg").read_text()


def test_prompts_without_an_answer_are_judged_by_their_reference(
    reinforcement, undecided, prompts, tmp_path: Path
) -> None:
    asked = [(f"order {n}", "no") for n in range(12)]
    alone = {
        "train": [prompts_file(undecided, tmp_path / "train-alone.parquet", asked)],
        "validation": [prompts_file(undecided, tmp_path / "validation-alone.parquet", asked[:4])],
    }
    for name, splits in (("answered", prompts), ("alone", alone)):
        train_in_process(reinforcement(max_steps=5), splits, Seat(), output=Location.at(tmp_path / name))
    for metric in ("reward", "loss", "eval_reward"):
        assert history(tmp_path / "alone", metric) == pytest.approx(history(tmp_path / "answered", metric), abs=1e-6)
    unjudged = prompts_file(undecided, tmp_path / "unjudged.parquet", [*asked, ("order 4", None), ("order 5", None)])
    with pytest.raises(DataError, match=r"2 of 14 train rows \(the first is row 13\) have neither an answer nor a"):
        train_in_process(reinforcement(), {**alone, "train": [unjudged]}, Seat(), output=None)


def test_a_reference_that_the_metric_cannot_measure_by_is_named_before_the_first_step(
    reinforcement, undecided, prompts, tmp_path: Path
) -> None:
    turns = [(f"order {n}", '{"a": 1}') for n in range(7)]
    asked = [*[(f"order {n}", '{"a": 1}') for n in range(4)], ("order 9", "sorry")]
    answered = turns_file(undecided, tmp_path / "answered.parquet", turns)
    alone = prompts_file(undecided, tmp_path / "alone.parquet", asked)
    config, steps = reinforcement(reward_metric="field_f1"), []
    with pytest.raises(DataError, match=r"given as splits: train split: field_f1: .* reference of row 12 is 'sorry'"):
        train_in_process(
            config,
            {**prompts, "train": [answered, alone]},
            Seat(),
            output=None,
            report=lambda *told: steps.append(told),
        )
    assert not steps


def test_a_reward_model_judges_as_well(reinforcement, undecided, prompts, tmp_path: Path) -> None:
    pairs = pair_files(undecided, tmp_path, train=18, validation=4)  # yes before no
    settings = {"method": "full", "learning_rate": 2e-3, "num_train_epochs": 4, "per_device_train_batch_size": 6}
    paths = {"model_path": str(undecided), "output_dir": str(tmp_path), "dataset_path": "given"}
    config = RewardConfig(**settings, **paths, report_to=[])
    train_in_process(config, pairs, Seat(), output=Location.at(tmp_path / "reward"))
    assert history(tmp_path / "reward", "eval_reward_accuracy")[-1] == 1
    judged = reinforcement(reward_metric=None, reward_model_path=str(tmp_path / "reward"))
    asked = [prompts_file(undecided, tmp_path / "asked.parquet", [(f"order {n}", None) for n in range(12)])]
    train_in_process(judged, {**prompts, "train": asked}, Seat(), output=Location.at(tmp_path / "a"))
    rewards = history(tmp_path / "a", "reward")
    assert fmean(rewards[-8:]) > rewards[0] + 0.3


def test_the_divergence_holds_the_model_back(reinforcement, prompts, tmp_path: Path) -> None:
    lora = {"method": "lora", "lora_target_modules": "all-linear", "learning_rate": 3e-3}
    for name, changes in (("lora", lora), ("free", {"beta": 0.01}), ("held", {"beta": 5.0})):
        config = reinforcement(**{"beta": 0.01, "max_steps": 16, **changes})
        train_in_process(config, prompts, Seat(), output=Location.at(tmp_path / name))
        apart = history(tmp_path / name, "kl")
        assert apart[0] == pytest.approx(0, abs=1e-5)
        assert max(apart) > 1e-5
    assert history(tmp_path / "held", "kl")[-1] < 0.2 * history(tmp_path / "free", "kl")[-1]


def test_a_stopped_run_gives_the_answers_of_the_unbroken_one(reinforcement, prompts, tmp_path: Path) -> None:
    config = reinforcement(max_steps=6, method="lora", beta=0.1)
    train_in_process(config, prompts, Seat(), output=Location.at(tmp_path / "unbroken"))
    steps: list[int] = []
    with pytest.raises(StoppedError):
        train_in_process(
            config,
            prompts,
            Seat(),
            output=Location.at(tmp_path / "b"),
            report=lambda step, metrics: steps.append(step),
            stop_wanted=lambda: len(steps) == 3,
        )
    train_in_process(config, prompts, Seat(), output=Location.at(tmp_path / "b"))
    for name in ("reward", "loss", "grad_norm"):
        assert history(tmp_path / "b", name) == pytest.approx(history(tmp_path / "unbroken", name), abs=1e-6)


@pytest.mark.ray  # no Ray, but as long as a test with it
def test_layouts_give_the_same_answers_and_steps(reinforcement, prompts, tmp_path: Path) -> None:
    common = {"max_steps": 5, "beta": 0.1}
    whole = reinforcement(**common, per_device_train_batch_size=8)
    train_in_process(whole, prompts, Seat(), output=Location.at(tmp_path / "whole"))
    small = reinforcement(**common, gradient_accumulation_steps=2, max_tokens_per_micro_batch=40)
    train_in_process(small, prompts, Seat(), output=Location.at(tmp_path / "small"))
    two = reinforcement(**common, num_workers=2, max_tokens_per_micro_batch=60)
    on_ranks([run(two, tmp_path / "two")], prompts, tmp_path, world_size=2)
    for name in ("small", "two"):
        for metric in ("reward", "answer_tokens", "loss", "kl", "eval_reward"):
            expected = history(tmp_path / "whole", metric)
            assert history(tmp_path / name, metric) == pytest.approx(expected, abs=1e-5), (name, metric)


def test_equal_rewards_are_said_to_teach_nothing(reinforcement) -> None:
    row = {"loss": 0.0, "grad_norm": 0.0, "learning_rate": 1e-5, "reward": 1.0}
    rows = [{**row, "step": step, "equal_rewards_share": 1.0} for step in range(1, 41)]
    (finding,) = diagnose(rows, reinforcement())
    assert (finding.kind, finding.step) == (Trouble.UNDERFITTING, 8)
    assert "100% of the prompts all answers have the same reward (mean 1)" in str(finding)
    assert not diagnose([{**row, "equal_rewards_share": 0.5} for row in rows], reinforcement())


def test_bleu_rewards_answers_by_the_tokens_that_the_settings_name(reinforcement, undecided) -> None:
    chat, said, right = Chat(load_tokenizer(str(undecided))), "今天天气非常好", "今天天气很好"
    answers, questions = [Completion(said, [], "stop")], [Question([], [], right)]
    judge = MetricJudge(reinforcement(reward_metric="bleu", bleu_tokenizer="zh"), chat)
    expected = BLEU(tokenize="zh", effective_order=True).sentence_score(said, [right]).score
    assert judge.rewards(questions, answers) == [expected]
    assert 10 < expected < 90
    with pytest.raises(DataError, match="zh fits Chinese"):
        MetricJudge(reinforcement(reward_metric="bleu"), chat).rewards(questions, answers)


@pytest.mark.parametrize(("metric", "empty"), [("field_f1", "{}"), ("set_f1", "[]")])
def test_prompts_of_one_step_may_all_want_nothing(metric: str, empty: str, reinforcement, undecided) -> None:
    judge = MetricJudge(reinforcement(reward_metric=metric), Chat(load_tokenizer(str(undecided))))
    answers = [Completion(said, [], "stop") for said in (empty, '{"a": 1}')]
    assert judge.rewards([Question([], [], empty)] * 2, answers) == [1, 0]


def test_references_are_looked_at_by_the_tokens_that_the_settings_name(reinforcement, undecided, tmp_path) -> None:
    rows = prompts_file(undecided, tmp_path / "chinese.parquet", [("order 1", "今天天气很好")])
    splits = {"train": PromptRows([rows], str(tmp_path / "rows"))}
    refuse_misfits(splits, reinforcement(reward_metric="bleu", bleu_tokenizer="zh"), load_tokenizer(str(undecided)))
    with pytest.raises(DataError, match=r"train split: .*zh fits Chinese"):
        refuse_misfits(splits, reinforcement(reward_metric="bleu"), load_tokenizer(str(undecided)))


def test_a_judge_of_other_tokens_is_refused(reinforcement, undecided, prompts, tmp_path: Path) -> None:
    pairs = pair_files(undecided, tmp_path, train=4, validation=2)
    paths = {"model_path": str(undecided), "output_dir": str(tmp_path), "dataset_path": "given", "report_to": []}
    train_in_process(
        RewardConfig(**paths, method="full", max_steps=1), pairs, Seat(), output=Location.at(tmp_path / "r")
    )
    tokenizer = load_tokenizer(str(tmp_path / "r"))
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "r")
    judged = reinforcement(reward_metric=None, reward_model_path=str(tmp_path / "r"))
    with pytest.raises(ModelError, match="has other tokens than"):
        train_in_process(judged, prompts, Seat(), output=Location.at(tmp_path / "a"))
    with pytest.raises(ModelError, match="writes text; a reward model gives scores"):
        again = judged.with_overrides(reward_model_path=str(undecided))
        train_in_process(again, prompts, Seat(), output=Location.at(tmp_path / "b"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward_metric": None}, "give either reward_model_path"),
        ({"reward_model_path": "x"}, "give either reward_model_path"),
        ({"reward_metric": "perplexity"}, "reward_metric: perplexity is not measured on answers alone"),
        ({"zero_stage": 3, "eval_generation_rows": 0, "eval_strategy": "no"}, "answering wants the whole weights"),
        ({"num_generations": 1}, "num_generations"),
        ({"bleu_tokenizer": "zh"}, "bleu_tokenizer: has no effect .* measured by exact_match"),
        ({"eval_generation_metric": "bleu"}, "eval_generation_metric: has no effect here"),
        ({"per_device_eval_batch_size": 9}, "per_device_eval_batch_size: has no effect here"),
        ({"eval_generation_rows": 0}, "leaves evaluations nothing to judge"),
        ({"method": "prompt_tuning", "beta": 0.1}, "which are no reference"),
        ({"method": "qlora", "beta": 0.1, "adapter_path": "a"}, "merge the adapter first"),
        ({"metric_for_best_model": "eval_loss"}, "eval_loss is not among what is measured"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message, reinforcement) -> None:
    with pytest.raises(ConfigError, match=message):
        reinforcement(**changes)


def test_the_guide_has_ranges_of_its_own_for_rewards(reinforcement) -> None:
    said = departures_from_guide(reinforcement(method="lora", learning_rate=1e-5))
    assert not [words for words in said if words.startswith("learning_rate is")]

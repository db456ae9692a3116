"""A search space is checked whole before anything starts."""

from __future__ import annotations

import pytest

from raytune_ft.core.errors import ConfigError
from raytune_ft.training.config import FineTuningConfig
from raytune_ft.tuning.config import SweepConfig
from raytune_ft.tuning.space import GUIDE, settings_at

COMMON = {"output_dir": "sweep", "training": {"model_path": "m", "dataset_path": "d", "max_steps": 4}}


def sweep(**changes: object) -> SweepConfig:
    return SweepConfig(**{**COMMON, "space": {"lora_r": [4, 8]}, **changes})


def test_a_grid_has_as_many_trials_as_combinations() -> None:
    config = sweep(space={"lora_r": [4, 8], "learning_rate": [1e-4, 1e-3, 1e-2]})
    assert config.trials == 6


def test_trials_write_below_the_sweeps_folder() -> None:
    assert sweep().training.output_dir == "sweep/trials"


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "space"),
        ({"lora_rank": [4]}, "did you mean lora_r"),
        ({"model_path": ["a", "b"]}, "cannot be searched"),
        ({"bleu_tokenizer": ["13a", "zh"]}, "cannot be searched"),
        ({"lora_r": []}, "has no values"),
        ({"lora_r": [4, 0]}, "lora_r: must be at least 1 .got 0"),
    ],
)
def test_a_space_that_cannot_be_searched_says_why(space: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sweep(space=space)


def test_a_range_whose_ends_are_turned_round_is_refused() -> None:
    with pytest.raises(ConfigError, match="is not below"):
        sweep(space={"learning_rate": {"loguniform": [1e-2, 1e-4]}}, searcher="random", num_trials=2)


@pytest.mark.parametrize(
    ("key", "choice", "message"),
    [
        ("lora_r", {"quniform": [5, 32, 4]}, "space.lora_r: quniform draws multiples of its step, 4, and .*5 and 32"),
        ("lora_r", {"quniform": [4, 32, 0]}, "space.lora_r: quniform wants a step above 0"),
        ("lora_r", {"quniform": [4, 32, 0.5]}, r"space.lora_r: must be a whole number \(got 4.5\); the range has such"),
        ("lora_r", {"uniform": [4, 32]}, "space.lora_r: must be a whole number .*take quniform with another step"),
        ("weight_decay", {"loguniform": [0, 0.1]}, "space.weight_decay: loguniform wants a low end above 0"),
        ("learning_rate", {"uniform": [1e-4, float("inf")]}, r"uniform.*finite number.*inf\)"),
        ("learning_rate", {"quniform": [1e-4, 1e-2, float("nan")]}, "quniform.*finite number"),
    ],
)
def test_a_range_that_nothing_can_be_drawn_from_is_refused(key: str, choice: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sweep(space={key: choice}, searcher="random", num_trials=2)


def test_ranges_of_whole_and_of_broken_numbers_are_taken() -> None:
    space = {"lora_r": {"quniform": [4, 32, 4]}, "learning_rate": {"quniform": [1e-4, 1e-2, 1e-4]}}
    space |= {"lora_dropout": {"uniform": [0, 0.5]}, "weight_decay": {"loguniform": [1e-4, 0.1]}}
    assert len(sweep(space=space, searcher="random", num_trials=2).space) == 4


def test_sampling_needs_a_random_search_and_a_number_of_trials() -> None:
    space = {"learning_rate": {"loguniform": [1e-4, 1e-2]}}
    with pytest.raises(ConfigError, match="searcher: random"):
        sweep(space=space)
    with pytest.raises(ConfigError, match="num_trials"):
        sweep(space=space, searcher="random")
    assert sweep(space=space, searcher="random", num_trials=3).num_trials == 3


OF_ANSWERS = {**COMMON["training"], "eval_generation_rows": 8, "eval_generation_metric": "rouge"}


def test_a_sweep_compares_by_what_answers_are_measured_by_and_its_trials_keep_their_best_by_it() -> None:
    config = sweep(metric="eval_rouge", training=OF_ANSWERS)
    assert (config.goal.mode, config.training.metric_for_best_model) == ("max", "eval_rouge")
    as_object = sweep(metric="eval_rouge", mode="max", training=FineTuningConfig(**OF_ANSWERS, output_dir="elsewhere"))
    assert (as_object.training.metric_for_best_model, as_object.training.output_dir) == ("eval_rouge", "elsewhere")
    shorter = sweep(metric="eval_length", training={**OF_ANSWERS, "eval_generation_metric": "length"})
    assert shorter.goal.mode == "min"
    assert sweep(metric="eval_perplexity").training.metric_for_best_model == "eval_perplexity"
    assert sweep(training=OF_ANSWERS).training.metric_for_best_model == "eval_loss"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "eval_rouge"}, r"no trial reports eval_rouge, only loss, eval_loss, eval_perplexity; answers are"),
        ({"metric": "accuracy"}, "no trial reports accuracy"),
        (
            {"metric": "eval_bleu", "training": OF_ANSWERS},
            "reports eval_bleu, only loss, .*, eval_rouge;",
        ),
        ({"mode": "max"}, "mode: lower values of eval_loss are better; leave it out or say min"),
        (
            {"metric": "eval_rouge", "mode": "min", "training": OF_ANSWERS},
            "higher values of eval_rouge are better",
        ),
        (
            {"metric": "eval_rouge", "training": {**OF_ANSWERS, "metric_for_best_model": "eval_loss"}},
            "trials keep their best by eval_loss, but are compared by eval_rouge",
        ),
        ({"space": {"eval_generation_rows": [1, 2]}}, "cannot be searched; all trials of a sweep share it"),
        (
            {"training": {**COMMON["training"], "offload": "optimizer"}},
            "training.offload: trials on one worker",
        ),
        *(
            ({"training": {**COMMON["training"], key: value}}, f"training.{key}: a trial saves, .*evaluated .eval_str")
            for key, value in [("save_steps", 2), ("save_strategy", "no"), ("logging_steps", 1)]
        ),
        ({"training": {**COMMON["training"], "zero_stage": 3}}, "training.zero_stage: trials on one worker go without"),
        ({"space": {"save_steps": [1, 2]}}, "space.save_steps: cannot be searched"),
        ({"training": {**COMMON["training"], "cpus_per_worker": 2}}, "is given cpus_per_trial; set that"),
        ({"training": {**COMMON["training"], "resume_from_checkpoint": "x"}}, "the same command goes on with a sweep"),
        (
            {"training": {**COMMON["training"], "deepspeed_config": {"zero_optimization": {"stage": 2}}}},
            "training.deepspeed_config: trials on one worker go without",
        ),
    ],
)
def test_what_would_be_ignored_or_contradicts_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sweep(**changes)


def test_a_metric_that_no_trial_would_report_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs evaluations"):
        sweep(training={**COMMON["training"], "eval_strategy": "no"})


def test_guide_stands_for_the_guides_values() -> None:
    config = sweep(space={"lora_r": "guide", "lora_alpha": "guide"})
    assert config.space["lora_r"] == GUIDE["lora_r"] == [4, 8, 16, 32]
    assert config.trials == 4
    with pytest.raises(ConfigError, match=r"space.seed: the guide gives no range for it; it does for learning_rate"):
        sweep(space={"seed": "guide"})


def test_alpha_follows_the_rank_of_its_trial() -> None:
    assert sweep(space={"lora_alpha": {"times_rank": [1, 2]}}).trials == 2
    shared = {"lora_r": 8, "method": "lora"}
    assert settings_at({"lora_alpha.times_rank": 2.0, "lora_r": 16}, shared) == {"lora_r": 16, "lora_alpha": 32}
    assert settings_at({"lora_alpha.times_rank": 2.0}, shared) == {"lora_alpha": 16}
    with pytest.raises(ConfigError, match="times_rank is for lora_alpha"):
        sweep(space={"lora_r": {"times_rank": [1, 2]}})


ENDLESS = {"model_path": "m", "dataset_path": "d"}


def test_the_last_step_is_that_of_the_trials_that_make_most() -> None:
    assert sweep().last_step == 4
    assert sweep(training=ENDLESS).last_step is None
    assert sweep(space={"max_steps": [8, 16]}, grace_steps=8).last_step == 16
    assert sweep(space={"max_steps": [8, None]}).last_step is None
    drawn = {"searcher": "random", "num_trials": 2, "space": {"max_steps": {"quniform": [8, 64, 8]}}}
    assert sweep(**drawn, training=ENDLESS).last_step == 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scheduler": "hyperband", "training": ENDLESS}, "hyperband plans its rounds from the last step"),
        (
            {"scheduler": "hyperband", "space": {"max_steps": [8, None]}},
            "hyperband plans its rounds from the last step",
        ),
        (
            {"scheduler": "hyperband", "max_concurrent_trials": 1},
            "max_concurrent_trials: hyperband compares the trials that .* wants all 2 of them .got 1.",
        ),
        ({"scheduler": "pbt"}, "space.lora_r: under scheduler pbt trials go on from each other's states"),
        (
            {"scheduler": "pbt", "space": {"lora_target_modules": [["q_proj"], ["v_proj"]]}},
            "space.lora_target_modules: under scheduler pbt",
        ),
        (
            {"scheduler": "pbt", "space": {"learning_rate": [1e-4, 1e-3]}, "searcher": "optuna", "num_trials": 2},
            "searcher: under scheduler pbt",
        ),
        (
            {"scheduler": "pbt", "space": {"learning_rate": [1e-4, 1e-3]}, "repeat_top": 1},
            "repeat_top: under scheduler pbt settings change on the way",
        ),
        ({"repeat_top": 1, "space": {"seed": [1, 2]}}, "repeat_top: repeats settings with fresh seeds, but the space"),
        ({"repeat_top": 3}, "repeat_top: 3 of the 2 trials that the search makes cannot be repeated"),
        ({"searcher": "optuna"}, "num_trials: a search with searcher optuna needs a number of trials"),
        ({"scheduler": "pbt", "packed": "never"}, "scheduler: pbt pauses trials, which only packed ones can"),
        ({"grace_steps": 5}, "grace_steps: 5 is beyond the last step .4."),
        ({"grace_steps": 7, "space": {"max_steps": [2, 6]}}, "grace_steps: 7 is beyond the last step .6."),
        ({"max_tokens": 0}, "max_tokens: must be at least 1"),
        ({"max_hours": 0}, "max_hours"),
    ],
)
def test_a_schedule_or_budget_that_cannot_work_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sweep(**changes)

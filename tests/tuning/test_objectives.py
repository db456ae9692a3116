"""Sweeps over what else is trained than examples: preferences, reward models and rewards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raytune_ft.core.artifacts import open_artifact
from raytune_ft.core.errors import ConfigError
from raytune_ft.core.storage import Location
from raytune_ft.training.config import FineTuningConfig
from raytune_ft.training.config_alignment import PreferenceConfig, ReinforcementConfig
from raytune_ft.training.distill import write_student
from raytune_ft.training.folder import read_history
from raytune_ft.training.inputs import splits_of
from raytune_ft.training.session import Seat, train_in_process
from raytune_ft.tuning.config import SweepConfig
from raytune_ft.tuning.homes import apart
from raytune_ft.tuning.packs import Packs
from raytune_ft.tuning.result import SweepResult
from raytune_ft.tuning.run import HyperparameterSweep


def sweep(**changes: object) -> SweepConfig:
    settings = {
        **{"output_dir": "out", "objective": "align", "space": {"beta": [0.1, 0.5]}},
        **{"metric": "eval_reward_accuracy", "training": {"model_path": "m", "dataset_path": "d"}},
    }
    return SweepConfig(**{**settings, **changes})


def distillation(**changes: object) -> SweepConfig:
    settings = {"objective": "distill", "metric": "eval_loss", "space": {"student_layers": [1, 3]}}
    return sweep(**{**settings, "training": {"teacher_path": "t", "dataset_path": "d"}, **changes})


def test_the_training_settings_are_those_of_the_verb() -> None:
    config = sweep()
    assert isinstance(config.training, PreferenceConfig)
    assert (config.training.beta, config.training.metric_for_best_model) == (0.1, "eval_reward_accuracy")
    assert config.resolved()["training"]["beta"] == 0.1
    assert config.with_overrides(max_hours=1).training == config.training
    assert config.identity() != sweep(training={"model_path": "m", "dataset_path": "d", "beta": 0.2}).identity()
    given = PreferenceConfig(model_path="m", dataset_path="d", output_dir="x", metric_for_best_model="eval_chosen_nll")
    named = SweepConfig(output_dir="out", space={"lora_r": [2]}, metric="eval_chosen_nll", training=given)
    assert (named.objective, type(named.training)) == ("align", PreferenceConfig)
    assert type(sweep(objective="train", space={"lora_r": [2]}, metric="eval_loss").training) is FineTuningConfig
    rewards = {"model_path": "m", "dataset_path": "d", "reward_metric": "exact_match"}
    found = sweep(objective="reinforce", metric="eval_reward", space={"num_generations": [4, 8]}, training=rewards)
    assert isinstance(found.training, ReinforcementConfig)
    assert distillation().training.student_layers == 1  # a size that is searched need not be named as well
    assert distillation(metric="eval_perplexity").training.metric_for_best_model == "eval_perplexity"


def why_apart(config: SweepConfig) -> dict[str, str]:
    return apart(config, Packs.of(config.space, config.training))


def test_trials_on_preferences_share_a_base_and_the_others_say_why_not() -> None:
    models = {"model_path": "m", "dataset_path": "d"}
    assert why_apart(sweep()) == {}
    assert why_apart(sweep(training={**models, "use_dora": True}))["all trials"].startswith("a packed sweep adds low-r")
    assert why_apart(sweep(training={**models, "loss_type": "kto"})) == {}
    assert why_apart(distillation()) == {
        "all trials": "objective: distill; a shared base is for trials that train on examples, or align"
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"metric": "eval_loss"},
            "eval_loss is another quantity for every beta.*take eval_reward_accuracy or eval_chos",
        ),
        ({"metric": "eval_reward_margin"}, "eval_reward_margin is another quantity for every beta"),
        ({"space": {"bet": [1]}}, r"space\.bet: is no training setting; did you mean beta\?"),
        ({"space": {"beta": [0.1, -1]}}, r"space\.beta: must be more than 0"),
        ({"space": {"loss_type": ["dpo", "kto"]}}, "kto learns from rated answers, the others from pairs"),
        ({"objective": "train", "metric": "eval_loss"}, r"space\.beta: is no training setting"),
        ({"objective": "reward", "metric": "eval_perplexity", "space": {"lora_r": [1]}}, "no trial reports"),
        ({"training": {"model_path": "m", "dataset_path": "d", "beta": 0}}, r"training\.beta: must be more than 0"),
        ({"training": {"model_path": "m", "dataset_path": "d", "temperature": 1}}, r"training\.temperature"),
    ],
)
def test_what_does_not_fit_the_verb_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sweep(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {"temperature": [1, 2]}}, "training: give either model_path"),
        ({"space": {"student_layers": {"quniform": [1, 4, 1]}}}, "give either model_path"),
        ({"space": {"student_layers": [0, 1]}}, r"student_layers: must be at least 1"),
        ({"space": {"teacher_path": ["a", "b"], "student_layers": [1]}}, r"teacher_path: cannot be searched"),
        (
            {"space": {"student_layers": [1], "temperature": [1, 2]}, "metric": "loss"},
            "quantity for every temp",
        ),
    ],
)
def test_what_does_not_fit_a_distillation_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        distillation(**changes)
    given = {"teacher_path": "t", "dataset_path": "d", "student_layers": 2}
    with pytest.raises(ConfigError, match=r"student_layers: give a list.*a student is made for each value"):
        distillation(training=given, space={"student_layers": {"quniform": [1, 4, 1]}})


def pairs(path: Path) -> str:
    records = [
        {"prompt": f"order {n} for Paris", "chosen": "yes " * (n % 3 + 2), "rejected": "no " * (n % 2 + 1)}
        for n in range(24)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def curves_equal_those_of_runs_alone(
    config: SweepConfig, alone: FineTuningConfig, tmp_path: Path, measures: tuple[str, ...]
) -> None:
    """Runs the sweep, then each trial's settings in this process, and compares what every evaluation measured."""
    artifact = HyperparameterSweep(config).run()
    result = SweepResult.from_json(artifact.read_json("result.json"))
    assert [trial.ending for trial in result.trials] == ["finished"] * 2
    splits = splits_of(alone, Location.at(tmp_path / "tokens"))
    for trial in result.trials:
        where = Location.at(tmp_path / f"alone-{trial.name}")
        settings = {key: value for key, value in trial.settings.items() if key != "student_layers"}
        train_in_process(alone.with_overrides(**settings), splits, Seat(), output=where)
        for name in measures:
            expected = [row[name] for row in read_history(where) if name in row]
            assert [row[name] for row in trial.curve] == pytest.approx(expected, abs=1e-5), name


TRAINING = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 5e-3, "report_to": []}


@pytest.mark.ray
def test_trials_on_preferences_have_the_curves_of_such_runs_alone(
    ray_cluster, tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    caplog.set_level("INFO", "raytune_ft")
    training = {"model_path": str(tiny_model), "dataset_path": pairs(tmp_path / "pairs.jsonl"), **TRAINING}
    config = sweep(output_dir=str(tmp_path / "sweep"), training=training, scheduler="none")
    measures = ("eval_reward_accuracy", "eval_chosen_nll", "eval_reward_margin")
    curves_equal_those_of_runs_alone(config, config.training, tmp_path, measures)
    assert "2 trials, 2 at a time on one frozen base" in caplog.text
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "sweep/best")


@pytest.mark.ray
def test_trials_that_learn_from_a_teacher_have_the_curves_of_such_runs_alone(
    ray_cluster, tiny_model: Path, orders: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    training = {"teacher_path": str(tiny_model), "dataset_path": str(orders), **TRAINING}
    space = {"student_layers": [1], "hard_loss_weight": [0.0, 1.0]}
    config = distillation(output_dir=str(tmp_path / "sweep"), training=training, space=space, scheduler="none")
    write_student(str(tiny_model), Location.at(tmp_path / "student"), 1)
    alone = config.training.with_overrides(model_path=str(tmp_path / "student"), student_layers=None)
    curves_equal_those_of_runs_alone(config, alone, tmp_path, ("eval_loss", "eval_perplexity"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "sweep/best").config.num_hidden_layers == 1
    assert {parent.role for parent in open_artifact(tmp_path / "sweep").manifest.parents} == {"teacher", "dataset"}

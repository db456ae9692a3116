"""Sweeps over what else is trained than examples: preferences, reward models and rewards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raytune_ft.core.errors import ConfigError
from raytune_ft.core.storage import Location
from raytune_ft.training.config import FineTuningConfig
from raytune_ft.training.config_alignment import PreferenceConfig, ReinforcementConfig
from raytune_ft.training.folder import read_history
from raytune_ft.training.run import splits_of
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


def test_the_training_settings_are_those_of_the_verb() -> None:
    config = sweep()
    assert isinstance(config.training, PreferenceConfig)
    assert (config.training.beta, config.training.metric_for_best_model) == (0.1, "eval_reward_accuracy")
    assert config.resolved()["training"]["beta"] == 0.1
    assert config.with_overrides(seed=1).training == config.training
    assert config.identity() != sweep(training={"model_path": "m", "dataset_path": "d", "beta": 0.2}).identity()
    given = PreferenceConfig(model_path="m", dataset_path="d", output_dir="x", metric_for_best_model="eval_chosen_nll")
    named = SweepConfig(output_dir="out", space={"lora_r": [2]}, metric="eval_chosen_nll", training=given)
    assert (named.objective, type(named.training)) == ("align", PreferenceConfig)
    assert type(sweep(objective="train", space={"lora_r": [2]}, metric="eval_loss").training) is FineTuningConfig
    rewards = {"model_path": "m", "dataset_path": "d", "reward_metric": "exact_match"}
    found = sweep(objective="reinforce", metric="eval_reward", space={"num_generations": [4, 8]}, training=rewards)
    assert isinstance(found.training, ReinforcementConfig)


def test_such_trials_share_no_base() -> None:
    config = sweep()
    assert apart(config, Packs.of(config.space, config.training)) == {
        "all trials": "objective: align; a shared base is for trials on examples"
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


def pairs(path: Path) -> str:
    records = [
        {"prompt": f"order {n} for Paris", "chosen": "yes " * (n % 3 + 2), "rejected": "no " * (n % 2 + 1)}
        for n in range(24)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.mark.ray
def test_trials_on_preferences_have_the_curves_of_such_runs_alone(
    ray_cluster, tiny_model: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    training = {
        **{"model_path": str(tiny_model), "dataset_path": pairs(tmp_path / "pairs.jsonl"), "max_steps": 4},
        **{"eval_strategy": "steps", "eval_steps": 2, "learning_rate": 5e-3, "report_to": []},
    }
    config = sweep(output_dir=str(tmp_path / "sweep"), space={"beta": [0.1, 0.5]}, training=training, scheduler="none")
    artifact = HyperparameterSweep(config).run()
    result = SweepResult.from_json(artifact.read_json("result.json"))
    assert [trial.ending for trial in result.trials] == ["finished"] * 2
    splits = splits_of(config.training, Location.at(tmp_path / "tokens"))
    for trial in result.trials:
        alone = PreferenceConfig(**{**training, **trial.settings}, output_dir=str(tmp_path / "alone"))
        where = Location.at(tmp_path / f"alone-{trial.settings['beta']}")
        train_in_process(alone, splits, Seat(), output=where)
        for name in ("eval_reward_accuracy", "eval_chosen_nll", "eval_reward_margin"):
            expected = [row[name] for row in read_history(where) if name in row]
            assert [row[name] for row in trial.curve] == pytest.approx(expected, abs=1e-5), name
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "sweep/best")

"""A search under Ray Tune's own scheduler, each trial a real training run."""

from __future__ import annotations

import logging
import pickle
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raytune_ft.core import cluster
from raytune_ft.core.draft import begin
from raytune_ft.core.errors import ArtifactError, ConfigError, RunError
from raytune_ft.core.manifest import ArtifactKind
from raytune_ft.core.storage import Location
from raytune_ft.tuning.config import SweepConfig
from raytune_ft.tuning.report import cost_in_words
from raytune_ft.tuning.result import SweepResult, Trial
from raytune_ft.tuning.run import HyperparameterSweep, _as_it_began, _keep, _of_those_measured, _second_stage, _tuner
from raytune_ft.tuning.space import POINT


def test_settings_that_were_tried_twice_are_repeated_once() -> None:
    training = {"model_path": "m", "dataset_path": "d", "seed": 5}
    config = SweepConfig(output_dir="o", training=training, space={"lora_r": [2, 4]}, repeat_top=2)
    trials = tuple(
        Trial(name, {"lora_r": rank}, "finished", [{"global_step": 4.0, "eval_loss": loss}])
        for name, rank, loss in [("a", 4, 1.0), ("b", 4, 1.0), ("c", 2, 2.0)]
    )
    stage = _second_stage(config, SweepResult("eval_loss", trials), 3)
    points = stage.space[POINT]["grid_search"]
    assert points == [{"lora_r": rank, "seed": seed} for rank in (4, 2) for seed in (6, 7)]
    assert (stage.searched.max_concurrent_trials, stage.stop) == (3, None)


@pytest.mark.parametrize("left", [0, 20])
def test_a_search_of_whose_beginning_a_part_was_written_is_refused(left: int, tmp_path: Path) -> None:
    config = SweepConfig(output_dir="o", training={"model_path": "m", "dataset_path": "d"}, space={"lora_r": [2, 4]})
    stage = _second_stage(config, SweepResult("eval_loss", ()), 1)
    folder = tmp_path / stage.name
    folder.mkdir()
    (folder / "tuner.pkl").write_bytes(pickle.dumps({"param_space": config.space})[:left])  # as a full disk leaves it
    arrangement: Any = SimpleNamespace(trainable=print, proxies=True)
    with pytest.raises(RunError, match=f"{stage.name}: the state of the search cannot be read.*delete this folder"):
        _tuner(config, arrangement, Location.at(tmp_path), stage, None)  # type: ignore[arg-type]


def test_steps_and_tokens_are_those_of_repeats_too(tmp_path: Path) -> None:
    config = SweepConfig(output_dir="o", training={"model_path": "m", "dataset_path": "d"}, space={"lora_r": [2, 4]})
    draft = begin(tmp_path / "sweep", ArtifactKind.SWEEP, settings={})
    row = {"global_step": 4.0, "last_step": 4.0, "eval_loss": 1.0, "tokens": 100.0}
    parts = [{"after": 0, "settings": {"lora_r": 2}}]
    best = Trial("a", {"lora_r": 2}, "finished", [row], schedule=parts)
    repeats = (Trial("c", {"lora_r": 2, "seed": 1}, "finished", [row]),)
    result = SweepResult("eval_loss", (best, Trial("b", {"lora_r": 4}, "finished", [row])), repeats)
    with draft:
        _keep(draft, result, config, 7)
    assert (draft.numbers["steps"], draft.numbers["tokens"], draft.numbers["trials"]) == (12, 300.0, 2)
    assert draft.numbers["best_schedule"] == parts


def test_trials_that_the_budget_was_spent_before_are_told_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    training = {"model_path": "m", "dataset_path": "d"}
    config = SweepConfig(output_dir="o", training=training, space={"lora_r": [2, 4, 8, 16]}, max_hours=0.5)
    measured = Trial("a", {"lora_r": 2}, "stopped early", [{"global_step": 4.0, "eval_loss": 1.0}])
    failed, waiting = Trial("b", {"lora_r": 4}, "failed", []), Trial("c", {"lora_r": 8}, "stopped early", [])
    with caplog.at_level(logging.WARNING, logger="raytune_ft"):
        found = _of_those_measured(SweepResult("eval_loss", (measured, failed, waiting)), config)
    assert (found.trials, found.not_begun) == ((measured, failed), 2)
    assert "max_hours: 0.5 was spent before 2 of 4 trials were evaluated" in caplog.text
    assert "2 more were not evaluated" in cost_in_words(found, 1.0)
    assert SweepResult.from_json(found.to_json()) == found
    with pytest.raises(RunError, match=r"max_hours: 0.5: was spent before any of 4 trials was evaluated; raise it"):
        _of_those_measured(SweepResult("eval_loss", (waiting,)), config)


def test_a_search_that_goes_on_has_as_many_trials_at_a_time_as_it_began_with(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    training = {"model_path": "m", "dataset_path": "d"}
    config = SweepConfig(output_dir="o", training=training, space={"lora_r": [2, 4]}, max_concurrent_trials=1)
    output = Location.at(tmp_path)
    (output / "ray/together.json").write(b"6")
    assert _as_it_began(config, output) == config  # Ray Tune has not begun
    (output / "ray/tuner.pkl").write(b"")
    with caplog.at_level(logging.WARNING, logger="raytune_ft"):
        assert _as_it_began(config, output).max_concurrent_trials == 6
    assert "goes on with 6 trials at a time, as it began; max_concurrent_trials: 1 is for a new search" in caplog.text
    assert _as_it_began(config.model_copy(update={"max_concurrent_trials": None}), output).max_concurrent_trials == 6


def test_a_scheduler_that_pauses_is_refused_before_anything_starts_where_trials_share_no_base(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cluster, "connect", lambda: pytest.fail("it started"))
    training = {"model_path": "m", "dataset_path": "d", "max_steps": 8, "use_dora": True}
    space = {"learning_rate": [1e-4, 1e-3]}
    for name in ("hyperband", "pbt"):
        config = SweepConfig(output_dir="o", training=training, space=space, scheduler=name)
        with pytest.raises(ConfigError, match=f"scheduler: {name} pauses trials, which only those on a shared"):
            HyperparameterSweep(config).run()


def test_an_output_folder_that_cannot_be_used_is_refused_before_a_cluster_starts(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path, orders: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(cluster, "connect", lambda: pytest.fail("it started"))
    (tmp_path / "file").touch()
    training = {"model_path": str(tiny_model), "dataset_path": str(orders), "report_to": []}
    config = SweepConfig(output_dir=str(tmp_path / "file"), training=training, space={"lora_r": [2, 4]})
    with pytest.raises(ArtifactError, match="file: is a file; a folder is needed to write the sweep into"):
        HyperparameterSweep(config).run()


@pytest.mark.ray
def test_what_the_rows_do_not_allow_is_refused_before_any_trial(
    ray_cluster, tiny_model: Path, orders: Path, tmp_path: Path
) -> None:
    common = {"model_path": str(tiny_model), "dataset_path": str(orders), "report_to": []}
    steps = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2}
    rates = {"learning_rate": [1e-3, 1e-2]}
    # 22 rows of training make 6 steps an epoch, of which there are 3.
    for number, (message, training, more) in enumerate(
        [
            ("max_tokens: 10 do not take 2 trials to their first evaluation", steps, {"max_tokens": 10}),
            (r"grace_steps: 100 is beyond the last step of the longest trial \(18\)", {}, {"grace_steps": 100}),
            (
                r"space.max_length: trials would be compared by eval_loss on other validation rows each",
                steps,
                {"space": {"max_length": [53, 512]}},
            ),
        ]
    ):
        given = {"space": rates, "grace_steps": 1, **more, "training": {**common, **training}}
        with pytest.raises(ConfigError, match=message):
            HyperparameterSweep(SweepConfig(output_dir=str(tmp_path / str(number)), **given)).run()
        assert not (tmp_path / str(number) / "ray").exists()


@pytest.mark.ray
def test_a_budget_that_is_spent_before_any_evaluation_is_told_in_words(
    ray_cluster, tiny_model: Path, orders: Path, tmp_path: Path
) -> None:
    training = {"model_path": str(tiny_model), "dataset_path": str(orders), "max_steps": 4, "report_to": []}
    more = {"max_hours": 1e-6, "scheduler": "none"}
    config = SweepConfig(output_dir=str(tmp_path / "sweep"), training=training, space={"lora_r": [2, 4]}, **more)
    with pytest.raises(RunError, match="max_hours: 1e-06: was spent before any of 2 trials was evaluated"):
        HyperparameterSweep(config).run()


@pytest.mark.ray
def test_asha_stops_the_slow_learners_and_the_best_settings_are_found(
    ray_cluster, tiny_model: Path, orders: Path, tmp_path: Path
) -> None:
    import ray

    config = SweepConfig(
        output_dir=str(tmp_path / "sweep"),
        space={"lora_r": [2, 8], "learning_rate": [2e-2, 1e-6]},
        grace_steps=4,
        max_concurrent_trials=1,  # then a slow learner always meets a fast one's result at the rung
        training={
            "model_path": str(tiny_model),
            "dataset_path": str(orders),
            "max_steps": 8,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "per_device_train_batch_size": 8,
            "lora_target_modules": "all-linear",
        },
    )
    artifact = HyperparameterSweep(config).run()
    result = SweepResult.from_json(artifact.read_json("result.json"))
    assert len(result.trials) == 4
    assert {trial.ending for trial in result.trials} == {"finished", "stopped early"}
    assert result.best.settings["learning_rate"] == 2e-2
    assert artifact.numbers["best_settings"] == result.best.settings
    for trial in result.trials:
        assert [row["global_step"] for row in trial.curve] == [2.0, 4.0, 6.0, 8.0][: len(trial.curve)]
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU") != 2.0 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert ray.available_resources()["CPU"] == 2.0  # stopped trials hold nothing

    assert HyperparameterSweep(config).run().digest == artifact.digest

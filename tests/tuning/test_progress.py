"""Curves that Ray Tune's own files would lose parts of."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import tune
from ray.train._internal.checkpoint_manager import _CheckpointManager
from ray.train._internal.session import _TrainingResult

from raytune_ft.core.errors import RunError
from raytune_ft.core.storage import Location
from raytune_ft.training import checkpoint
from raytune_ft.training.checkpoint import Checkpoint
from raytune_ft.training.config import Tracking
from raytune_ft.training.trackers import TensorBoard
from raytune_ft.tuning.pointer import read_pointer
from raytune_ft.tuning.progress import Progress, curves_in, of_its_state, seconds_before_in, tracker_failures_in
from raytune_ft.tuning.result import Trial
from raytune_ft.tuning.space import POINT
from raytune_ft.tuning.tracking import Tracked

from ..training.test_trackers import scalars  # noqa: TID252 - tests are no installed package


def counts() -> type[tune.Trainable]:
    """A class that travels whole: workers cannot import a module of tests."""

    class Counts(tune.Trainable):
        """Its steps."""

        def setup(self, config: dict) -> None:
            self.made = 0

        def step(self) -> dict:
            self.made += 1
            loss = float("nan") if self.made == 2 else self.config["height"] / self.made
            return {"global_step": self.made, "eval_loss": loss, "done": self.made == 9}

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            (Path(checkpoint_dir) / "made.json").write_text(json.dumps(self.made))

        def load_checkpoint(self, checkpoint_dir: str) -> None:
            self.made = json.loads((Path(checkpoint_dir) / "made.json").read_text())

        def reset_config(self, new_config: dict) -> bool:
            self.config, self.made = new_config, 0
            return True

    return Counts


class Ears(tune.Callback):
    """The steps of each trial that any callback is told."""

    def __init__(self) -> None:
        self.told: dict[str, set[int]] = {}

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
        self.told.setdefault(trial.trial_id, set()).add(result["global_step"])


@pytest.mark.ray
def test_a_trial_that_was_paused_keeps_all_of_its_curve(ray_cluster, tmp_path) -> None:
    """Population-based training pauses what it replaces; Ray then puts its own files back to their last upload."""
    folder, ears = Location.at(tmp_path / "ray"), Ears()
    population = tune.schedulers.PopulationBasedTraining(
        time_attr="global_step", perturbation_interval=1, hyperparam_mutations={"height": [1.0, 2.0, 3.0]}
    )
    tune.Tuner(
        tune.with_resources(counts(), {"memory": 1}),  # no CPU, since Ray's own population may leave a process behind
        param_space={"height": tune.grid_search([1.0, 2.0, 3.0])},
        tune_config=tune.TuneConfig(scheduler=population, metric="eval_loss", mode="min", reuse_actors=True),
        run_config=tune.RunConfig(
            name="ray",
            storage_path=str(tmp_path),
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=1, num_to_keep=4),
            callbacks=[Progress(folder, "eval_loss", Tracked((), folder, {"method": "lora"})), ears],
            verbose=0,
        ),
    ).fit()
    curves = curves_in(folder)
    assert len(ears.told) == 3
    assert {trial: {row["global_step"] for row in curve} for trial, curve in curves.items()} == ears.told
    for curve in curves.values():
        assert all(("eval_loss" in row) == (row["global_step"] != 2) for row in curve)


def test_a_restored_trial_forgets_the_checkpoints_that_were_deleted(tmp_path: Path) -> None:
    """The state may be older than the folders: Ray would delete the first one again, and fail to."""
    manager = _CheckpointManager(tune.CheckpointConfig(num_to_keep=2))

    def saved(number: int) -> _TrainingResult:
        (tmp_path / str(number)).mkdir()
        told = {"snapshot": f"state-{number}", "global_step": number}
        return _TrainingResult(tune.Checkpoint.from_directory(str(tmp_path / str(number))), told)

    for number in (0, 1):
        manager.register_checkpoint(saved(number))
    for number in (0, 1):
        (tmp_path / str(number)).rmdir()
    progress = Progress(Location.at(tmp_path), "eval_loss", Tracked((), Location.at(tmp_path), {}))
    progress.set_state({"curves": {"t": [{"global_step": 2}], "even": [{"global_step": 4, "eval_loss": 0.5}]}})
    last = {"global_step": 4, "eval_loss": 0.5, "snapshot": "state-1"}  # Ray's part of the state is newer
    metadata = SimpleNamespace(checkpoint_manager=manager)
    fresh = SimpleNamespace(checkpoint_manager=_CheckpointManager(tune.CheckpointConfig()))
    even = SimpleNamespace(trial_id="even", last_result=last, run_metadata=fresh)
    progress.on_step_begin(0, [SimpleNamespace(trial_id="t", last_result=last, run_metadata=metadata), even])
    assert progress.get_state()["curves"] == {
        "t": [{"global_step": 2}, {"global_step": 4, "eval_loss": 0.5}],
        "even": [{"global_step": 4, "eval_loss": 0.5}],
    }
    assert read_pointer(str(tmp_path / "1")) == ("state-1", 1), "the newest is there again"
    for number in (2, 3):
        manager.register_checkpoint(saved(number))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]


@pytest.mark.parametrize("packed", [True, False])
def test_what_a_restored_trial_told_between_the_curves_and_rays_part_of_the_state_is_in_its_own(
    packed: bool, tmp_path: Path
) -> None:
    """The driver was killed between two of Ray's writes: the curves are of the version before."""

    def row(step: int) -> dict[str, float]:
        return {"step": step, "loss": 4.0, "tokens": 10} | ({"eval_loss": 4.0 / step} if step % 2 == 0 else {})

    def on_curve(step: int) -> dict[str, float]:
        return {"global_step": step, "last_step": 9, "loss": 4.0, "tokens": 10 * step, "eval_loss": 4.0 / step}

    state = Checkpoint(8, {}, {}, {"history": [row(step) for step in range(1, 9)]})
    folder = tmp_path / ("snapshots/t" if packed else "trials/t/checkpoints")
    where = checkpoint.write(Location.at(folder), state, keep=1)
    (folder / "step-00000009").mkdir()  # which was being written
    last = {**on_curve(8), "loss": 3.0, "snapshot": where.uri if packed else None}
    managed = SimpleNamespace(checkpoint_manager=_CheckpointManager(tune.CheckpointConfig()))
    trial = SimpleNamespace(trial_id="t", last_result=last, run_metadata=managed)
    for known, steps in (([2], [2, 4, 6]), ([], [2, 4, 6]), ([2, 4, 6], [2, 4, 6])):
        progress = Progress(Location.at(tmp_path / "ray"), "eval_loss", Tracked((), Location.at(tmp_path), {}))
        progress.set_state({"curves": {"t": [on_curve(step) for step in known]} if known else {}})
        progress.on_step_begin(0, [trial])
        told = {name: value for name, value in last.items() if name != "snapshot"}
        assert progress.get_state()["curves"] == {"t": [*map(on_curve, steps), told]}


def test_a_repeat_is_called_by_its_settings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = Location.at(tmp_path)
    progress = Progress(folder, "eval_loss", Tracked((), folder, {"lora_r": 8, "method": "lora"}))
    trial = SimpleNamespace(trial_id="t", config={POINT: {"lora_alpha.times_rank": 2, "seed": 1}})
    with caplog.at_level(logging.INFO, logger="raytune_ft"):
        progress.on_trial_result(0, [], trial, {"global_step": 2, "last_step": 4, "eval_loss": 0.5})
    assert caplog.messages == ["trial seed=1, lora_alpha=16: step 2, eval_loss 0.5000"]


def test_a_step_that_was_reported_again_counts_once(tmp_path) -> None:
    folder = Location.at(tmp_path)
    told = [{"global_step": step, "eval_loss": loss} for step, loss in [(4, 3.0), (2, 5.0), (4, 2.0)]]
    (folder / "curves.json").write(json.dumps({"a": told}).encode())
    assert curves_in(folder) == {"a": [told[1], told[2]]}


def test_what_was_told_before_anothers_state_was_taken_over_is_not_of_the_model_that_is_left(tmp_path) -> None:
    def config(rate: float) -> dict:
        return {"learning_rate": rate, "lora_r": 8, "seed": 0}

    history = [
        {"step": 1, "loss": 3.0, "learning_rate": 0.1, "grad_norm": 1.0, "tokens": 10},
        {"step": 2, "loss": 2.9, "learning_rate": 0.1, "grad_norm": 1.0, "tokens": 20, "eval_loss": 2.8},
        {"step": 3, "loss": float("inf"), "learning_rate": 0.2, "grad_norm": 1.0, "tokens": 30},
    ]
    earlier = [{"until": 1, "config": config(0.1)}, {"until": 2, "config": {**config(0.1), "seed": 1}}]
    progress = {"history": history, "earlier": earlier, "config": {**config(0.2), "seed": 1}}
    where = checkpoint.write(Location.at(tmp_path), Checkpoint(3, {}, {}, progress), keep=1)
    told = [{"global_step": 1.0, "last_step": 8.0, "eval_loss": 1.5}]  # better, but its model is gone
    trial = Trial("t", {"learning_rate": 0.3}, "finished", told, snapshot=where.uri)
    found = of_its_state(trial)
    assert found.best("eval_loss") == 2.8
    assert found.curve == [
        {"global_step": 2, "last_step": 8, "loss": 2.9, "learning_rate": 0.1, "tokens": 30, "eval_loss": 2.8},
        {"global_step": 3, "last_step": 8, "learning_rate": 0.2, "tokens": 60},
    ]
    assert found.settings == {"learning_rate": 0.2}  # the 0.3 was chosen, and never used
    assert found.schedule == [
        {"after": 0, "settings": {"learning_rate": 0.1}},
        {"after": 2, "settings": {"learning_rate": 0.2}},
    ]
    assert of_its_state(replace(trial, snapshot=None)) == replace(trial, snapshot=None)
    with pytest.raises(RunError, match=r"the state of trial learning_rate=0.3 is lost: .*step-00000009"):
        of_its_state(replace(trial, snapshot=str(tmp_path / "step-00000009")))


def test_a_curve_of_training_losses_has_every_step_of_its_state(tmp_path) -> None:
    history = [{"step": step, "loss": 4.0 / step, "tokens": 10} for step in (1, 2)]
    progress = {"history": history, "config": {"learning_rate": 0.1}}
    where = checkpoint.write(Location.at(tmp_path), Checkpoint(2, {}, {}, progress), keep=1)
    found = of_its_state(Trial("t", {"learning_rate": 0.1}, "finished", [], snapshot=where.uri))
    assert [(row["global_step"], row["loss"], row["tokens"]) for row in found.curve] == [(1, 4.0, 10), (2, 2.0, 20)]


def test_how_a_trial_ended_is_said_and_told_to_its_trackers(
    tmp_path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[str] = []
    monkeypatch.setattr(TensorBoard, "close", lambda self, status: ended.append(status))
    folder = Location.at(tmp_path)
    progress = Progress(folder, "eval_loss", Tracked((Tracking.TENSORBOARD,), folder, {"method": "lora"}))
    last = {"global_step": 2, "last_step": 4, "eval_loss": 0.5}
    trials = [
        SimpleNamespace(trial_id=name, config={"seed": number}, last_result={**last, **more})
        for number, (name, more) in enumerate(
            {"cut": {}, "done": {"global_step": 4}, "wild": {"infeasible": "nan"}, "lost": {}}.items()
        )
    ]
    for trial in trials:
        progress.on_trial_result(0, trials, trial, trial.last_result)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="raytune_ft"):
        for trial in trials[:3]:
            progress.on_trial_complete(0, trials, trial)
        progress.on_trial_error(0, trials, trials[3])
    assert caplog.messages == [
        "trial seed=0: stopped early at step 2, best eval_loss 0.5000",
        "trial seed=1: done at step 4, best eval_loss 0.5000",
        "trial seed=2: infeasible at step 2, best eval_loss 0.5000",
        "trial seed=3: failed",
    ]
    assert ended == ["stopped", "finished", "failed", "failed"]
    progress.on_experiment_end(trials)
    assert len(ended) == 4


def test_the_time_of_earlier_drivers_is_kept_with_the_state(tmp_path) -> None:
    folder = Location.at(tmp_path)
    first, second = (Progress(folder, "eval_loss", Tracked((), folder, {})) for _ in range(2))
    first._began -= 100.0
    second.set_state(first.get_state())
    second.on_experiment_end([])
    assert 100.0 <= seconds_before_in(folder) < 110.0
    assert 100.0 <= second.get_state()["seconds"] < 110.0


def test_trackers_hear_of_trials_that_ended_before_this_driver_went_on(tmp_path) -> None:
    """What an earlier driver wrote was cleared away when this one took over; its curves came with Tune's state."""
    folder = Location.at(tmp_path / "ray")
    tracked = Tracked((Tracking.TENSORBOARD,), Location.at(tmp_path), {"method": "lora"})
    progress = Progress(folder, "eval_loss", tracked)
    curve = [{"global_step": 2.0, "eval_loss": 3.0}, {"global_step": 4.0, "eval_loss": 2.0}]
    progress.set_state({"curves": {"a": curve}})
    ended, going = (
        SimpleNamespace(trial_id=name, config={"lora_r": rank}, last_result={"global_step": 4}, status="TERMINATED")
        for name, rank in (("a", 4), ("b", 8))
    )
    progress.on_trial_result(0, [ended, going], going, {"global_step": 2, "eval_loss": 5.0, "pid": 7})
    progress.on_trial_complete(0, [ended, going], going)
    progress.on_experiment_end([ended, going])
    assert scalars(tmp_path / "tensorboard/a_lora_r=4") == [(2, "eval_loss", 3.0), (4, "eval_loss", 2.0)]
    assert scalars(tmp_path / "tensorboard/b_lora_r=8") == [(2, "eval_loss", 5.0)]
    assert curves_in(folder) == {"a": curve, "b": [{"global_step": 2.0, "eval_loss": 5.0}]}
    assert tracker_failures_in(folder) == {}


@pytest.mark.ray
def test_a_search_whose_state_was_cut_is_refused_instead_of_begun_without_a_space(
    ray_cluster: object, tmp_path: Path
) -> None:
    told = Progress(Location.at(tmp_path / "ray"), "eval_loss", Tracked((), Location.at(tmp_path), {"method": "lora"}))
    run = tune.RunConfig(name="ray", storage_path=str(tmp_path), callbacks=[told], verbose=0)
    tune.Tuner(counts(), param_space={"height": tune.grid_search([9.0])}, run_config=run).fit()
    again = tune.Tuner.restore(str(tmp_path / "ray"), trainable=counts()).fit()
    assert [result.metrics["global_step"] for result in again] == [9]
    state = max((tmp_path / "ray").glob("experiment_state-*.json"))
    state.write_bytes(state.read_bytes()[:-100])  # as a full disk leaves it
    with pytest.raises(RunError, match=r"ray: the state of the search cannot be read.*delete this folder"):
        tune.Tuner.restore(str(tmp_path / "ray"), trainable=counts()).fit()

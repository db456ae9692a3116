"""Curves that Ray Tune's own files would lose parts of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ray import tune

from raytune_ft.core.storage import Location
from raytune_ft.tuning.progress import Progress, curves_in
from raytune_ft.tuning.tracking import Tracked


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
        tune.with_resources(counts(), {"cpu": 0.01}),
        param_space={"height": tune.grid_search([1.0, 2.0, 3.0])},
        tune_config=tune.TuneConfig(scheduler=population, metric="eval_loss", mode="min", reuse_actors=True),
        run_config=tune.RunConfig(
            name="ray",
            storage_path=str(tmp_path),
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=1, num_to_keep=4),
            callbacks=[Progress(folder, "eval_loss", 9, Tracked((), folder, {})), ears],
            verbose=0,
        ),
    ).fit()
    curves = curves_in(folder)
    assert len(ears.told) == 3
    assert {trial: {row["global_step"] for row in curve} for trial, curve in curves.items()} == ears.told
    for curve in curves.values():
        assert all(("eval_loss" in row) == (row["global_step"] != 2) for row in curve)


def test_a_step_that_was_reported_again_counts_once(tmp_path) -> None:
    folder = Location.at(tmp_path)
    told = [{"global_step": step, "eval_loss": loss} for step, loss in [(4, 3.0), (2, 5.0), (4, 2.0)]]
    (folder / "curves.json").write(json.dumps({"a": told}).encode())
    assert curves_in(folder) == {"a": [told[1], told[2]]}

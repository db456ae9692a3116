"""Trials in trackers: a run each, whole after a restart, and a tracker's failure stops no search."""

from __future__ import annotations

import logging
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from raytune_ft.core.errors import ConfigError, MissingDependencyError
from raytune_ft.core.storage import Location
from raytune_ft.training.config import Tracking
from raytune_ft.training.trackers import TensorBoard
from raytune_ft.tuning.tracking import Tracked, TrackedTrials

from ..training.test_trackers import scalars  # noqa: TID252 - tests are no installed package
from ..wandb_runs import Offline  # noqa: TID252

POINTS = [{"global_step": float(step), "eval_loss": 4.0 / step} for step in (2, 4)]


def tracked(folder: Path, *names: Tracking) -> Tracked:
    return Tracked(names or (Tracking.TENSORBOARD,), Location.at(folder), {"lora_r": 8, "method": "lora"})


def test_each_trial_has_event_files_with_its_whole_curve_also_after_a_restart(tmp_path: Path) -> None:
    before = TrackedTrials(tracked(tmp_path))
    before.log("t1", "lora_r=4", {"lora_r": 4}, POINTS[:1])
    after = TrackedTrials(tracked(tmp_path))  # another process, which knows the curve so far
    after.log("t1", "lora_r=4", {"lora_r": 4}, POINTS)
    after.log("t2", "adapter=a/b, lora_target_modules=['q_proj']", {}, POINTS[:1])
    after.end("t1", "done")
    after.close()
    assert scalars(tmp_path / "tensorboard/t1_lora_r=4") == [(2, "eval_loss", 2.0), (4, "eval_loss", 1.0)]
    assert scalars(tmp_path / "tensorboard/t2_adapter=a_b,lora_target_modules=_q_proj_") == [(2, "eval_loss", 2.0)]
    assert after.failures == {}


def test_a_trial_of_many_long_settings_has_a_name_that_disks_take(tmp_path: Path) -> None:
    trials = TrackedTrials(tracked(tmp_path))
    trials.log("t1", "lora_target_modules=" + "q_proj+" * 99, {}, POINTS)
    trials.close()
    assert trials.failures == {}
    (folder,) = (tmp_path / "tensorboard").iterdir()
    assert folder.name.startswith("t1_lora_target_modules=q_proj") and len(scalars(folder)) == 2


def test_event_files_of_a_sweep_on_an_object_store_come_there_at_its_end(gs_bucket: str, tmp_path: Path) -> None:
    output = Location.at(f"{gs_bucket}/sweep")
    remote = Tracked((Tracking.TENSORBOARD,), output, {"method": "lora"})
    with remote.sweep({}) as told:
        trials = TrackedTrials(remote)
        trials.log("t1", "lora_r=4", {}, POINTS)
        trials.close()
        told.log({"step": 1, "best_eval_loss": 1.0})
    assert not remote.folder.exists()
    (output / "tensorboard").download(tmp_path)
    assert scalars(tmp_path / "t1_lora_r=4")[-1] == (4, "eval_loss", 1.0)
    assert scalars(tmp_path / "sweep") == [(1, "best_eval_loss", 1.0)]


def test_a_tracker_that_cannot_start_ends_the_sweep_before_it_began(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    with pytest.raises(ConfigError, match="tensorboard cannot start"), tracked(tmp_path).sweep({}):
        pytest.fail("nothing may begin")


def test_a_tracker_that_is_not_installed_ends_the_sweep_before_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as good as not installed, where it is
    sweep = tracked(tmp_path, Tracking.WANDB).sweep({})
    with pytest.raises(MissingDependencyError, match="pip install wandb"), sweep:
        pytest.fail("nothing may begin")


def test_a_trials_tracker_that_cannot_start_is_said_once_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    trials = TrackedTrials(tracked(tmp_path))
    with caplog.at_level(logging.WARNING, logger="raytune_ft"):
        for name in ("t1", "t2"):
            trials.log(name, name, {}, POINTS)
            trials.log(name, name, {}, POINTS)
    trials.close()
    assert trials.failures == {"tensorboard": 2}
    assert caplog.text.count("the sweep goes on") == 1


def test_a_tracker_that_fails_later_is_said_once_for_all_trials_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: TensorBoard, row: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(TensorBoard, "log", full)
    trials = TrackedTrials(tracked(tmp_path))
    with caplog.at_level(logging.WARNING, logger="raytune_ft"):
        for name in ("t1", "t2", "t2"):
            trials.log(name, name, {}, POINTS[:1])
        trials.close()
    assert trials.failures == {"tensorboard": 3}
    assert caplog.text.count("No space left") == 1


@pytest.mark.skipif(find_spec("mlflow") is None, reason="the extra `trackers` is not installed")
def test_mlflow_has_a_run_for_each_trial_with_its_own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/m.db")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/m.db")
    made = tracked(tmp_path, Tracking.MLFLOW)
    with made.sweep({"searcher": "grid"}) as told:
        trials = TrackedTrials(made)
        trials.log("t1", "lora_alpha.times_rank=2", {"lora_alpha.times_rank": 2}, POINTS)
        trials.log("t2", "lora_r=4", {"lora_r": 4}, POINTS)
        trials.end("t2", "failed")
        trials.close()
        told.log({"step": 2, "best_eval_loss": 1.0})
    client = mlflow.MlflowClient()
    runs = client.search_runs([client.get_experiment_by_name("raytune_ft").experiment_id])
    by_name = {run.info.run_name: run for run in runs}
    assert {name: run.info.status for name, run in by_name.items()} == {
        "sweep": "FINISHED",
        "t1_lora_alpha.times_rank=2": "KILLED",
        "t2_lora_r=4": "FAILED",
    }
    assert by_name["t1_lora_alpha.times_rank=2"].data.params == {"lora_r": "8", "method": "lora", "lora_alpha": "16"}
    assert by_name["sweep"].data.metrics == {"best_eval_loss": 1.0}


def test_wandb_has_a_run_for_each_trial_beside_that_of_the_sweep(tmp_path: Path, offline_wandb: Offline) -> None:
    """They are open at the same time, in one process."""
    made = tracked(tmp_path, Tracking.WANDB)
    with made.sweep({"searcher": "grid"}) as told:
        trials = TrackedTrials(made)
        trials.log("t1", "lora_r=4", {"lora_r": 4}, POINTS[:1])
        trials.log("t2", "lora_r=2", {"lora_r": 2}, POINTS[:1])
        trials.end("t2", "failed")
        trials.log("t1", "lora_r=4", {"lora_r": 4}, POINTS)
        trials.close()
        told.log({"step": 2, "best_eval_loss": 1.0})
    assert trials.failures == {} and told.failures == {"wandb": 0}
    sweep, first, second = offline_wandb.runs()
    assert len({run.key for run in (sweep, first, second)}) == 3
    assert [run.name for run in (sweep, first, second)] == ["sweep", "t1_lora_r=4", "t2_lora_r=2"]
    assert (sweep.settings["searcher"], first.settings, second.settings["lora_r"]) == (
        "grid",
        {"lora_r": 4, "method": "lora"},
        2,
    )
    assert sweep.rows == [{"step": 2, "best_eval_loss": 1.0}]
    assert first.rows == [{"step": 2, "eval_loss": 2.0}, {"step": 4, "eval_loss": 1.0}]
    assert second.rows == [{"step": 2, "eval_loss": 2.0}]
    assert [run.exit_code for run in (sweep, first, second)] == [0, 0, 1]

"""Trials on Ray Train workers of their own, and the models of all trials that share no base.

Meets Ray, beside `run.py`, because such a trial is a function of Ray Tune's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
from ray import tune as ray_tune

from raytune_ft.core import cluster
from raytune_ft.core.errors import InfeasibleError
from raytune_ft.core.placement import Demand, ResourcePlan, misfit
from raytune_ft.core.storage import Location
from raytune_ft.training import checkpoint
from raytune_ft.training.folder import CHECKPOINTS, SUMMARY
from raytune_ft.training.goal import Goal
from raytune_ft.training.run import RAY_STATE, Reported, run_workers, worker_demand
from raytune_ft.tuning.config import SweepConfig
from raytune_ft.tuning.own import Own
from raytune_ft.tuning.result import Trial
from raytune_ft.tuning.space import settings_at

_DRIVER_CPUS = 0.01


def start_on_workers(config: SweepConfig, own: Own, connected: cluster.Cluster, trials: int) -> tuple[Any, int]:
    """What Ray Tune starts for each trial, and how many at a time; prints the plan.

    Args:
        config: the sweep's.
        own: what the trials' runs have in common.
        connected: where the trials run.
        trials: how many there are.

    Raises:
        ClusterError: if the cluster has no room for one.
    """
    training = config.training
    one = worker_demand(training, use_gpu=own.gpus > 0)
    together = min(trials, config.max_concurrent_trials or trials)
    while together > 1 and misfit(_plan(one, together), connected.nodes) is not None:
        together -= 1
    connected.admit(_plan(one, together))
    settings = training.model_dump(mode="json")
    trial = ray_tune.with_parameters(on_workers, settings=settings, own=own, goal=config.goal)
    return ray_tune.with_resources(trial, {"CPU": _DRIVER_CPUS}), together


def _plan(worker: Demand, together: int) -> ResourcePlan:
    workers = replace(worker, count=worker.count * together)
    return ResourcePlan("tune", (workers, Demand("driver of a trial", together, _DRIVER_CPUS)))


def on_workers(space: dict[str, Any], *, settings: dict[str, Any], own: Own, goal: Goal) -> None:
    """One trial on Ray Train workers: this process only drives it, and passes its evaluations on to Tune."""
    from ray.tune.integration.ray_train import TuneReportCallback

    config = own.trial({**settings, **settings_at(space, settings)})
    where = own.folder(str(ray_tune.get_context().get_trial_id()))
    reported = Reported(callbacks=(TuneReportCallback(),))
    with _told_if_infeasible(goal):
        run_workers(config, own.splits[config.max_length], where, use_gpu=own.gpus > 0, reported=reported)


@contextmanager
def _told_if_infeasible(goal: Goal) -> Iterator[None]:
    """A trial that diverges, or that memory does not hold, says so as its last word: no attempt would end otherwise."""
    try:
        yield
    except InfeasibleError as error:
        ray_tune.report({goal.metric: goal.worst, "global_step": error.step, "infeasible": str(error)})


def leave_best(config: SweepConfig, own: Own, folder: Location, best: Trial) -> bool:
    """Copies the model of a trial to `folder`; of one that was stopped, it is made of the state that it told of last.

    Ray Train workers run further ahead of what Ray Tune has heard, so theirs may be of a later, better evaluation.

    Args:
        config: the sweep's.
        own: what the trials' runs have in common.
        folder: where to.
        best: the trial.

    Returns:
        Whether there is one: a trial that was never evaluated, or whose states storage did not take, has none.

    Raises:
        RaytuneError: if it cannot be written.
    """
    made = own.folder(best.name)
    if not (made / SUMMARY).exists():
        _forget_after(best.steps, made / CHECKPOINTS)
        saved = checkpoint.newest(made / CHECKPOINTS)
        if saved is None:
            return False
        _write_model(config, own, best, saved.step, made)
    for leftover in (CHECKPOINTS, RAY_STATE):
        (made / leftover).delete()
    with TemporaryDirectory(prefix="raytune-ft-best-") as scratch:
        made.download(Path(scratch))
        folder.upload(Path(scratch))
    return True


def _forget_after(step: int, folder: Location) -> None:
    """Deletes the checkpoints after that of a step, if there is one of it; else the newest knows the same best."""
    saved = checkpoint.steps_below(folder)
    for later in saved if step in saved else []:
        if later > step:
            checkpoint.folder_of(folder, later).delete()


def _write_model(config: SweepConfig, own: Own, trial: Trial, step: int, output: Location) -> None:
    """Ends a stopped trial's run at a step that was saved: no step is made, and its best weights are written."""
    ended = own.trial({**config.training.model_dump(mode="json"), **trial.settings, "max_steps": step})
    if ended.num_workers > 1:
        (output / RAY_STATE).delete()
        run_workers(ended, own.splits[ended.max_length], output, use_gpu=own.gpus > 0)
        return
    write = ray.remote(Own.train).options(num_cpus=own.cpus, num_gpus=own.gpus)
    with cluster.own_errors():
        ray.get(write.remote(own, ended, output))

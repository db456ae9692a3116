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
from raytune_ft.training.config import FineTuningConfig
from raytune_ft.training.folder import CHECKPOINTS, SUMMARY
from raytune_ft.training.goal import Goal
from raytune_ft.training.run import RAY_STATE, Reported, run_workers, worker_demand
from raytune_ft.tuning.config import SweepConfig
from raytune_ft.tuning.own import Own, Splits, saving_where_evaluated
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
    use_gpu = own.gpus > 0
    given = {
        "settings": training.model_dump(mode="json"),
        "splits": own.splits,
        "output": own.output,
        "goal": config.goal,
    }
    one = worker_demand(training, use_gpu=use_gpu)
    together = min(trials, config.max_concurrent_trials or trials)
    while together > 1 and misfit(_plan(one, together), connected.nodes) is not None:
        together -= 1
    connected.admit(_plan(one, together))
    trial = ray_tune.with_parameters(on_workers, **given, use_gpu=use_gpu)
    return ray_tune.with_resources(trial, {"CPU": _DRIVER_CPUS}), together


def _plan(worker: Demand, together: int) -> ResourcePlan:
    workers = replace(worker, count=worker.count * together)
    return ResourcePlan("tune", (workers, Demand("driver of a trial", together, _DRIVER_CPUS)))


def on_workers(
    space: dict[str, Any], *, settings: dict[str, Any], splits: Splits, output: str, goal: Goal, use_gpu: bool
) -> None:
    """One trial on Ray Train workers: this process only drives it, and passes its evaluations on to Tune."""
    from ray.tune.integration.ray_train import TuneReportCallback

    config = saving_where_evaluated(FineTuningConfig(**{**settings, **settings_at(space, settings)}))
    where = Location(output) / str(ray_tune.get_context().get_trial_id())
    reported = Reported(callbacks=(TuneReportCallback(),))
    with _told_if_infeasible(goal):
        run_workers(config, splits[config.max_length], where, use_gpu=use_gpu, reported=reported)


@contextmanager
def _told_if_infeasible(goal: Goal) -> Iterator[None]:
    """A trial that diverges, or that memory does not hold, says so as its last word: no attempt would end otherwise."""
    try:
        yield
    except InfeasibleError as error:
        ray_tune.report({goal.metric: goal.worst, "global_step": error.step, "infeasible": str(error)})


def leave_best(config: SweepConfig, own: Own, folder: Location, best: Trial) -> bool:
    """Copies the model of a trial to `folder`; of one that was stopped, it is made of the last state that was saved.

    Ray Train workers run ahead of what Ray Tune has heard, so theirs may be of a later, better evaluation.

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
    made = Location(own.output) / best.name
    if not (made / SUMMARY).exists():
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


def _write_model(config: SweepConfig, own: Own, trial: Trial, step: int, output: Location) -> None:
    """Ends a stopped trial's run at the step that was saved last: no step is made, and its best weights are written."""
    settings = {**config.training.model_dump(mode="json"), **trial.settings, "max_steps": step}
    ended = saving_where_evaluated(FineTuningConfig(**settings))
    if ended.num_workers > 1:
        (output / RAY_STATE).delete()
        run_workers(ended, own.splits[ended.max_length], output, use_gpu=own.gpus > 0)
        return
    write = ray.remote(_ended).options(num_cpus=own.cpus, num_gpus=own.gpus)
    with cluster.own_errors():
        ray.get(write.remote(own, ended, output))


def _ended(own: Own, config: FineTuningConfig, output: Location) -> None:
    own.train(config, output)

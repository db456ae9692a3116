"""Trials that share no base: a training run each, in the trial's own process or on Ray Train workers of its own.

Meets Ray, beside `run.py`, because such a trial is a function of Ray Tune's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ray import tune as ray_tune

from raytune_ft.core import cluster
from raytune_ft.core.errors import InfeasibleError
from raytune_ft.core.placement import Demand, ResourcePlan, misfit
from raytune_ft.core.storage import Location
from raytune_ft.training.config import FineTuningConfig
from raytune_ft.training.folder import CHECKPOINTS
from raytune_ft.training.goal import Goal
from raytune_ft.training.reporting import EvaluationReport
from raytune_ft.training.run import RAY_STATE, Reported, run_workers, worker_demand
from raytune_ft.training.session import Seat, train_in_process
from raytune_ft.tuning.config import SweepConfig
from raytune_ft.tuning.space import settings_at

Splits = Mapping[int, dict[str, list[str]]]
"""Parquet files of the tokenized splits, by the longest row."""
_DRIVER_CPUS = 0.01


def start_alone(
    config: SweepConfig, splits: Splits, output: Location, connected: cluster.Cluster, trials: int
) -> tuple[Any, int]:
    """What Ray Tune starts for each trial, and how many at a time; prints the plan.

    Args:
        config: the sweep's.
        splits: see `Splits`.
        output: folder or URI below which each trial keeps checkpoints and leaves its model.
        connected: where the trials run.
        trials: how many there are.

    Raises:
        ClusterError: if the cluster has no room for one.
    """
    training = config.training
    given = {"settings": training.model_dump(mode="json"), "splits": splits, "output": output.uri, "goal": config.goal}
    if training.num_workers == 1:
        together = concurrency(config, connected, trials)
        threads = max(1, math.floor(config.cpus_per_trial))
        demand = Demand("trial", together, config.cpus_per_trial, 0, threads)
        connected.admit(ResourcePlan("tune", (demand,)))
        trial = ray_tune.with_parameters(in_process, **given, threads=threads)
        return ray_tune.with_resources(trial, {"CPU": config.cpus_per_trial}), together
    use_gpu = training.on_gpu(connected.gpus)
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


def concurrency(config: SweepConfig, connected: cluster.Cluster, trials: int) -> int:
    """Trials of one process each that run at the same time: as many as the nodes have room for, at least one."""
    room = sum(math.floor(node.cpus / config.cpus_per_trial) * min(node.count, trials) for node in connected.nodes)
    return max(1, min(trials, room, config.max_concurrent_trials or trials))


def in_process(
    space: dict[str, Any], *, settings: dict[str, Any], splits: Splits, output: str, goal: Goal, threads: int
) -> None:
    """One trial in this process: a training run that reports its evaluations to Tune."""
    import torch

    torch.set_num_threads(threads)
    config, where = _trial_settings(space, settings), _folder(output)
    report = EvaluationReport(config, ray_tune.report)
    with _told_if_infeasible(goal, report):
        train_in_process(config, splits[config.max_length], Seat(), output=where, report=report, golden=False)
        report.model_is_written()


def on_workers(
    space: dict[str, Any], *, settings: dict[str, Any], splits: Splits, output: str, goal: Goal, use_gpu: bool
) -> None:
    """One trial on Ray Train workers: this process only drives it, and passes its evaluations on to Tune."""
    from ray.tune.integration.ray_train import TuneReportCallback

    config, where = _trial_settings(space, settings), _folder(output)
    reported = Reported(callbacks=(TuneReportCallback(),))
    with _told_if_infeasible(goal):
        run_workers(config, splits[config.max_length], where, use_gpu=use_gpu, reported=reported)


@contextmanager
def _told_if_infeasible(goal: Goal, report: EvaluationReport | None = None) -> Iterator[None]:
    """A trial that diverges, or that memory does not hold, says so as its last word: no attempt would end otherwise."""
    try:
        yield
    except InfeasibleError as error:
        step = error.step or (report.step if report is not None else 0)
        ray_tune.report({goal.metric: goal.worst, "global_step": step, "infeasible": str(error)})


def _trial_settings(space: dict[str, Any], settings: dict[str, Any]) -> FineTuningConfig:
    """The settings at a point of the space; a trial saves where it evaluates, and leaves trackers to the sweep."""
    config = FineTuningConfig(**{**settings, **settings_at(space, settings)})
    return config.with_overrides(
        save_strategy=config.eval_strategy, save_steps=config.eval_steps, save_total_limit=1, report_to=[]
    )


def _folder(output: str) -> Location:
    return Location(output) / str(ray_tune.get_context().get_trial_id())


def keep_best(trials: Location, trial: str, folder: Location) -> bool:
    """Copies the model of a trial that made all its steps to `folder`; whether there is one."""
    made = trials / trial
    if not (made / "summary.json").exists():
        return False
    for leftover in (CHECKPOINTS, RAY_STATE):
        (made / leftover).delete()
    with TemporaryDirectory(prefix="raytune-ft-best-") as scratch:
        made.download(Path(scratch))
        folder.upload(Path(scratch))
    return True

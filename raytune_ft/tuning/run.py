"""Where the search meets Ray: Tune's scheduler over trials, each a training run in a process of its own."""

from __future__ import annotations

import logging
import math
import time
from typing import Any

from ray import tune as ray_tune
from ray.tune import FailureConfig, RunConfig, TuneConfig, Tuner
from ray.tune.callback import Callback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

from raytune_ft.core import cluster
from raytune_ft.core.artifacts import Artifact
from raytune_ft.core.draft import begin
from raytune_ft.core.manifest import ArtifactKind
from raytune_ft.core.storage import Location
from raytune_ft.data.run import tokenized_splits
from raytune_ft.models.loading import model_parent, shared_model
from raytune_ft.training.config import FineTuningConfig
from raytune_ft.training.loop import Decision, Metrics
from raytune_ft.training.run import data_parent
from raytune_ft.training.session import Seat, train_in_process
from raytune_ft.tuning.config import SweepConfig
from raytune_ft.tuning.result import Ending, SweepResult, Trial
from raytune_ft.tuning.space import Choice, LogUniform, QUniform, Sampled, Uniform, grid_size

logger = logging.getLogger("raytune_ft")

_RAY_STATE = "ray"


class HyperparameterSweep:
    """Searches training settings as its own settings say."""

    def __init__(self, config: SweepConfig) -> None:
        self.config = config

    def run(self) -> Artifact:
        """Runs the trials on the cluster and returns the finished sweep artifact (``result.json`` holds the trials).

        Run again with the same settings, it finds the finished sweep, or goes on with the trials that are left.

        Raises:
            UserError: for what the user can mend.
            RunError: if no trial reported the metric.
        """
        return tune(self.config)


def tune(config: SweepConfig) -> Artifact:
    """The verb: see `HyperparameterSweep.run`."""
    connected = cluster.connect()
    output = Location.at(config.output_dir)
    model_path = shared_model(config.training.model_path, output.parent)
    draft = begin(
        output,
        ArtifactKind.SWEEP,
        settings=config.resolved(),
        identity=config.identity(),
        parents=[model_parent(model_path), data_parent(config.training.dataset_path)],
        keep=(_RAY_STATE,),
    )
    if draft.finished:
        logger.info("tune: found finished at %s", output)
        return draft.finished
    with draft:
        trials = config.num_trials or grid_size(config.space)
        concurrent = concurrency(config, connected, trials)
        threads = max(1, math.floor(config.cpus_per_trial))
        connected.admit(
            cluster.ResourcePlan("tune", (cluster.Demand("trial", concurrent, config.cpus_per_trial, 0, threads),))
        )
        logger.info("tune: %d trials, %d at a time, scheduler %s", trials, concurrent, config.scheduler)
        training = config.training.with_overrides(model_path=model_path)
        splits = tokenized_splits(training.dataset_path, model_path, output / "tokens", max_length=training.max_length)
        started = time.perf_counter()
        result = _collect(config, _tuner(config, training, splits, output, concurrent).fit())
        draft.write_json("result.json", result.to_json())
        best = result.best
        draft.numbers |= {
            "trials": len(result.trials),
            "stopped_early": sum(trial.ending == "stopped early" for trial in result.trials),
            "failed": sum(trial.ending == "failed" for trial in result.trials),
            "steps": sum(trial.steps for trial in result.trials),
            "seconds": round(time.perf_counter() - started, 1),
            f"best_{config.metric}": best.best(config.metric),
            "best_settings": best.settings,
        }
        logger.info("tune: best trial %s, %s %.4f", best.label(), config.metric, best.best(config.metric))
        for leftover in (_RAY_STATE, "tokens"):
            (output / leftover).delete()
    return draft.artifact


def concurrency(config: SweepConfig, connected: cluster.Cluster, trials: int) -> int:
    """Trials that run at the same time: as many as the nodes have room for, at least one."""
    room = sum(math.floor(node.cpus / config.cpus_per_trial) * min(node.count, trials) for node in connected.nodes)
    return max(1, min(trials, room, config.max_concurrent_trials or trials))


def _tuner(
    config: SweepConfig, training: FineTuningConfig, splits: dict[str, list[str]], output: Location, concurrent: int
) -> Tuner:
    trainable = ray_tune.with_resources(
        ray_tune.with_parameters(
            _trial, settings=training.model_dump(mode="json"), splits=splits, cpus=config.cpus_per_trial
        ),
        {"CPU": config.cpus_per_trial},
    )
    where = (output / _RAY_STATE).uri
    if Tuner.can_restore(where):
        logger.info("tune: resumes the trials that are left")
        return Tuner.restore(where, trainable=trainable, resume_unfinished=True, restart_errored=True)
    return Tuner(
        trainable,
        param_space={key: _domain(choice, config.searcher) for key, choice in config.space.items()},
        tune_config=TuneConfig(
            metric=config.metric,
            mode="min",
            scheduler=_scheduler(config),
            num_samples=config.num_trials or 1,
            max_concurrent_trials=concurrent,
            reuse_actors=True,
        ),
        run_config=RunConfig(
            name=_RAY_STATE,
            storage_path=output.uri,
            failure_config=FailureConfig(max_failures=1),
            callbacks=[_Progress(config.metric)],
            verbose=0,
        ),
    )


def _scheduler(config: SweepConfig) -> Any:
    if config.scheduler == "none":
        return FIFOScheduler()
    return ASHAScheduler(
        time_attr="global_step",
        grace_period=config.grace_steps,
        reduction_factor=config.reduction_factor,
        max_t=config.training.max_steps or 10**9,
    )


def _domain(choice: list[Any] | Sampled, searcher: str) -> Any:
    match choice:
        case Choice():
            return ray_tune.choice(choice.choice)
        case Uniform():
            return ray_tune.uniform(*choice.uniform)
        case LogUniform():
            return ray_tune.loguniform(*choice.loguniform)
        case QUniform():
            return ray_tune.quniform(*choice.quniform)
    return ray_tune.grid_search(choice) if searcher == "grid" else ray_tune.choice(choice)


def _trial(space: dict[str, Any], *, settings: dict[str, Any], splits: dict[str, list[str]], cpus: float) -> None:
    """One trial, in its own process: a training run that reports its evaluations to Tune."""
    import torch

    torch.set_num_threads(max(1, math.floor(cpus)))
    config = FineTuningConfig(**{**settings, **space, "num_workers": 1})

    def report(step: int, metrics: Metrics) -> Decision:
        if "eval_loss" in metrics or config.eval_strategy == "no":
            ray_tune.report({"global_step": step, **metrics})
        return Decision.CONTINUE

    train_in_process(config, splits, Seat(), output=None, report=report)


class _Progress(Callback):  # type: ignore[misc]  # Ray's classes count as Any
    """Says each evaluation and ending of a trial."""

    def __init__(self, metric: str) -> None:
        self.metric = metric

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        values = result["global_step"], self.metric, result.get(self.metric, math.nan)
        logger.info("trial %s: step %d, %s %.4f", _label(trial), *values)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        logger.warning("trial %s: failed", _label(trial))


def _label(trial: Any) -> str:
    return Trial(trial.trial_id, dict(trial.config), "finished", []).label()


def _collect(config: SweepConfig, grid: Any) -> SweepResult:
    trials = []
    for result in grid:
        frame = result.metrics_dataframe
        columns = ["global_step", "loss", "eval_loss", "learning_rate", "tokens"]
        rows = [] if frame is None else frame[[c for c in columns if c in frame]].to_dict("records")
        curve = [{key: float(value) for key, value in row.items()} for row in rows]
        made = curve[-1]["global_step"] if curve else 0
        ending: Ending = "finished"
        if result.error is not None:
            ending = "failed"
        elif config.training.max_steps is not None and made < config.training.max_steps:
            ending = "stopped early"
        settings = {key: result.config[key] for key in config.space}
        error = str(result.error).strip().splitlines()[-1] if result.error is not None else None
        name = result.metrics.get("trial_id", "") if result.metrics else ""
        trials.append(Trial(name, settings, ending, curve, error))
    return SweepResult(config.metric, tuple(trials))

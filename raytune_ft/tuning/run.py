"""Where the search meets Ray: Tune's scheduler over trials, each a training run in a process of its own."""

from __future__ import annotations

import json
import logging
import math
import time
from typing import Any

from ray import tune as ray_tune
from ray.tune import CheckpointConfig, FailureConfig, RunConfig, TuneConfig, Tuner
from ray.tune.callback import Callback
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
)
from ray.tune.search import BasicVariantGenerator
from ray.tune.stopper import Stopper

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
from raytune_ft.tuning import packed
from raytune_ft.tuning.config import SweepConfig
from raytune_ft.tuning.report import render
from raytune_ft.tuning.result import Ending, SweepResult, Trial
from raytune_ft.tuning.space import (
    Choice,
    Domain,
    LogUniform,
    QUniform,
    TimesRank,
    Uniform,
    dimension,
    grid_size,
    settings_at,
)

logger = logging.getLogger("raytune_ft")

_RAY_STATE = "ray"
_SNAPSHOTS = "snapshots"
_TIME = "global_step"
_MOST_TOGETHER = 64
_FAILURES = 2
_ENDINGS: dict[str, Ending] = {"stopped_early": "stopped early", "failed": "failed", "infeasible": "infeasible"}


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
        keep=(_RAY_STATE, _SNAPSHOTS),
    )
    if draft.finished:
        logger.info("tune: found finished at %s", output)
        return draft.finished
    with draft:
        training = config.training.with_overrides(model_path=model_path)
        splits = tokenized_splits(training.dataset_path, model_path, output / "tokens", max_length=training.max_length)
        started = time.perf_counter()
        result = _search(config, training, splits, output, connected)
        seconds = round(time.perf_counter() - started, 1)
        draft.write_json("result.json", result.to_json())
        page = render(result, seconds, config.training.max_steps)
        (draft.folder / "report.html").write_text(page, encoding="utf-8")
        best = result.best
        draft.numbers |= {
            "trials": len(result.trials),
            **{key: sum(trial.ending == ending for trial in result.trials) for key, ending in _ENDINGS.items()},
            "steps": sum(trial.steps for trial in result.trials),
            "tokens": sum(trial.tokens for trial in result.trials),
            "seconds": seconds,
            f"best_{config.metric}": best.best(config.metric),
            "best_settings": best.settings,
        }
        logger.info("tune: best trial %s, %s %.4f", best.label(), config.metric, best.best(config.metric))
        for leftover in (_RAY_STATE, _SNAPSHOTS, "tokens"):
            (output / leftover).delete()
    return draft.artifact


def _search(
    config: SweepConfig,
    training: FineTuningConfig,
    splits: dict[str, list[str]],
    output: Location,
    connected: cluster.Cluster,
) -> SweepResult:
    """All trials of the sweep: on shared bases, or each in a process of its own."""
    trials = config.num_trials or grid_size(config.space)
    why = packed.why_alone(config)
    if why is None:
        together = min(trials, config.max_concurrent_trials or _MOST_TOGETHER)
        logger.info(
            "tune: %d trials, %d at a time on one frozen base, scheduler %s", trials, together, config.scheduler
        )
        banks = packed.start_banks(connected, training, splits, (output / _SNAPSHOTS).uri, together)
        if isinstance(banks, packed.Banks):
            try:
                return _packed_search(config, training, output, banks, together)
            finally:
                banks.close()
        why = banks
    concurrent = concurrency(config, connected, trials)
    threads = max(1, math.floor(config.cpus_per_trial))
    connected.admit(
        cluster.ResourcePlan("tune", (cluster.Demand("trial", concurrent, config.cpus_per_trial, 0, threads),))
    )
    logger.info("tune: each trial on a base of its own (%s)", why)
    logger.info("tune: %d trials, %d at a time, scheduler %s", trials, concurrent, config.scheduler)
    settings = training.model_dump(mode="json")
    trial = ray_tune.with_parameters(_trial, settings=settings, splits=splits, cpus=config.cpus_per_trial)
    trainable = ray_tune.with_resources(trial, {"CPU": config.cpus_per_trial})
    return _collect(config, _tuner(config, trainable, output, concurrent).fit())


def _packed_search(
    config: SweepConfig, training: FineTuningConfig, output: Location, banks: packed.Banks, together: int
) -> SweepResult:
    settings = training.model_dump(mode="json")
    proxy = ray_tune.with_parameters(packed.Proxy, settings=settings, banks=banks.actors)
    trainable = ray_tune.with_resources(proxy, {"CPU": packed.PROXY_CPUS})
    result = _collect(config, _tuner(config, trainable, output, together, checkpoints=True).fit())
    best = result.best
    if best.snapshot is not None:
        banks.save({**settings, **best.settings}, best.snapshot, output / "best")
    return result


def concurrency(config: SweepConfig, connected: cluster.Cluster, trials: int) -> int:
    """Trials that run at the same time: as many as the nodes have room for, at least one."""
    room = sum(math.floor(node.cpus / config.cpus_per_trial) * min(node.count, trials) for node in connected.nodes)
    return max(1, min(trials, room, config.max_concurrent_trials or trials))


def _tuner(
    config: SweepConfig, trainable: Any, output: Location, concurrent: int, *, checkpoints: bool = False
) -> Tuner:
    where = (output / _RAY_STATE).uri
    if Tuner.can_restore(where):
        logger.info("tune: resumes the trials that are left")
        return Tuner.restore(where, trainable=trainable, resume_unfinished=True, restart_errored=True)
    return Tuner(
        trainable,
        param_space={dimension(key, choice): _domain(choice, config.searcher) for key, choice in config.space.items()},
        tune_config=TuneConfig(
            metric=config.metric,
            mode="min",
            scheduler=_scheduler(config, output),
            search_alg=_searcher(config),
            num_samples=config.num_trials or 1,
            time_budget_s=config.max_hours and config.max_hours * 3600,
            max_concurrent_trials=concurrent,
            reuse_actors=True,
        ),
        run_config=RunConfig(
            name=_RAY_STATE,
            storage_path=output.uri,
            checkpoint_config=CheckpointConfig(checkpoint_frequency=1 if checkpoints else 0, num_to_keep=2),
            failure_config=FailureConfig(max_failures=_FAILURES),
            stop=_TokenBudget(config.max_tokens) if config.max_tokens else None,
            callbacks=[_Progress(config.metric)],
            verbose=0,
        ),
    )


def _scheduler(config: SweepConfig, output: Location) -> Any:
    most = config.training.max_steps or 10**9
    match config.scheduler:
        case "none":
            return FIFOScheduler()
        case "median":
            return MedianStoppingRule(time_attr=_TIME, grace_period=config.grace_steps, min_samples_required=2)
        case "hyperband":
            return HyperBandScheduler(time_attr=_TIME, max_t=most, reduction_factor=config.reduction_factor)
        case "pbt":
            return PopulationBasedTraining(
                time_attr=_TIME,
                perturbation_interval=config.grace_steps,
                hyperparam_mutations={
                    dimension(key, choice): _mutation(choice) for key, choice in config.space.items()
                },
                require_attrs=False,
            )
    return RememberedASHA(
        output / _RAY_STATE / "rungs.json",
        time_attr=_TIME,
        grace_period=config.grace_steps,
        reduction_factor=config.reduction_factor,
        max_t=most,
    )


def _searcher(config: SweepConfig) -> Any:
    if config.searcher == "optuna":
        from ray.tune.search.optuna import OptunaSearch

        return OptunaSearch(seed=config.seed)
    return BasicVariantGenerator(random_state=config.seed)


def _mutation(choice: Domain) -> Any:
    """What population-based training draws a changed setting from; PBT's explicit lists are neighbours in order."""
    if isinstance(choice, list):
        return list(choice)
    return _domain(choice, "random")


class _TokenBudget(Stopper):  # type: ignore[misc]  # Ray's classes count as Any
    """Stops all trials once they have trained on `most` tokens together."""

    def __init__(self, most: int) -> None:
        self._most, self._spent = most, dict[str, float]()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        self._spent[trial_id] = float(result.get("tokens", 0.0))
        return self.stop_all()

    def stop_all(self) -> bool:
        """Ray Tune's hook: whether the budget is spent."""
        return sum(self._spent.values()) >= self._most


class RememberedASHA(ASHAScheduler):  # type: ignore[misc]  # Ray's classes count as Any
    """ASHA whose rungs outlive the driver; Ray's own forgets on restore which results its cutoffs were made of."""

    def __init__(self, memory: Location, **settings: Any) -> None:
        super().__init__(**settings)
        self._memory, self._recalled = memory, False

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Ray Tune's hook: decides as ASHA does, and writes the rungs before the decision takes effect."""
        self._recall()
        decision: str = super().on_trial_result(tune_controller, trial, result)
        rungs = [[[milestone, recorded] for milestone, recorded in bracket._rungs] for bracket in self._brackets]
        self._memory.write(json.dumps(rungs).encode())
        return decision

    def _recall(self) -> None:
        if self._recalled or not self._memory.exists():
            self._recalled = True
            return
        self._recalled = True
        for bracket, rungs in zip(self._brackets, json.loads(self._memory.read()), strict=True):
            for (_, recorded), (_, remembered) in zip(bracket._rungs, rungs, strict=True):
                recorded.update(remembered)


def _domain(choice: Domain, searcher: str) -> Any:
    match choice:
        case TimesRank():
            return _domain(list(choice.times_rank), searcher)
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
    config = FineTuningConfig(**{**settings, **settings_at(space, settings), "num_workers": 1})

    tokens = 0.0

    def report(step: int, metrics: Metrics) -> Decision:
        nonlocal tokens
        tokens += metrics["tokens"]
        if "eval_loss" in metrics or config.eval_strategy == "no":
            ray_tune.report({"global_step": step, **metrics, "tokens": tokens})
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
        curve = [{key: float(value) for key, value in row.items() if math.isfinite(value)} for row in rows]
        last = result.metrics or {}
        shared = config.training.model_dump(mode="json")
        point = {name: result.config[name] for name in (dimension(*item) for item in config.space.items())}
        settings = settings_at(point, shared)
        ending, error = _ending(config, result, curve)
        trials.append(Trial(last.get("trial_id", ""), settings, ending, curve, error, last.get("snapshot")))
    return SweepResult(config.metric, tuple(trials))


def _ending(config: SweepConfig, result: Any, curve: list[dict[str, float]]) -> tuple[Ending, str | None]:
    if result.error is not None:
        return "failed", str(result.error).strip().splitlines()[-1]
    infeasible = (result.metrics or {}).get("infeasible")
    if infeasible:
        return "infeasible", str(infeasible)
    made = curve[-1]["global_step"] if curve else 0
    if config.training.max_steps is not None and made < config.training.max_steps:
        return "stopped early", None
    return "finished", None

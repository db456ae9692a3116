"""Where the search meets Ray: Tune's scheduler over trials, which share bases or are training runs of their own."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ray import tune as ray_tune
from ray.tune import CheckpointConfig, FailureConfig, RunConfig, TuneConfig, Tuner
from ray.tune.schedulers import FIFOScheduler

from raytune_ft.core import cluster
from raytune_ft.core.artifacts import Artifact
from raytune_ft.core.draft import Draft, begin
from raytune_ft.core.errors import last_line
from raytune_ft.core.manifest import ArtifactKind
from raytune_ft.core.storage import Location
from raytune_ft.training.run import data_parent, model_parents, reachable, refuse_other_student, splits_of
from raytune_ft.training.trackers import Trackers, refuse_missing
from raytune_ft.tuning import homes
from raytune_ft.tuning.arrangement import SNAPSHOTS, TRIALS, Arrangement, Ground
from raytune_ft.tuning.budget import refuse_small_budget
from raytune_ft.tuning.config import SweepConfig
from raytune_ft.tuning.packs import Packs
from raytune_ft.tuning.progress import Progress, curves_in, tracker_failures_in
from raytune_ft.tuning.report import render
from raytune_ft.tuning.result import Ending, SweepResult, Trial
from raytune_ft.tuning.schedulers import TokenBudget, domain, scheduler, searcher
from raytune_ft.tuning.space import REPEAT, dimension, grid_size, settings_at
from raytune_ft.tuning.tracking import Tracked

logger = logging.getLogger("raytune_ft")

_RAY_STATE = "ray"
_RAY_REPEATS = "ray-repeats"
_KEPT = (_RAY_STATE, _RAY_REPEATS, SNAPSHOTS, TRIALS)
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
    refuse_other_student(config.training)
    refuse_missing(config.training.report_to)
    homes.refuse_pausing(config, homes.apart(config, Packs.of(config.space, config.training)))
    connected = cluster.connect()
    output = Location.at(config.output_dir)
    draft = begin(
        output,
        ArtifactKind.SWEEP,
        settings=config.resolved(),
        identity=config.identity(),
        parents=[*model_parents(config.training, output.parent), data_parent(config.training.dataset_path)],
        keep=_KEPT,
    )
    if draft.finished:
        logger.info("tune: found finished at %s", output)
        return draft.finished
    tracked = Tracked(tuple(config.training.report_to), output, config.training.resolved())
    with draft, tracked.sweep(config.resolved()) as told:
        config = config.model_copy(update={"training": reachable(config.training, output.parent)})
        packs = Packs.of(config.space, config.training)
        splits = {
            most: splits_of(config.training.with_overrides(max_length=most), output / "tokens" / str(most))
            for most in packs.lengths()
        }
        trials = config.num_trials or grid_size(config.space)
        refuse_small_budget(config, trials, next(iter(splits.values()))["train"])
        started = time.perf_counter()
        ground = Ground(config, packs, splits, output, connected, trials)
        with ground.arranged() as arrangement:
            result = _search(config, arrangement, output, tracked)
        _keep(draft, result, config, round(time.perf_counter() - started, 1))
        told.log({"step": len(result.trials), f"best_{config.metric}": draft.numbers[f"best_{config.metric}"]})
        _count_failures(draft, told, [_RAY_STATE, *([_RAY_REPEATS] if config.repeat_top else [])])
        for leftover in (*_KEPT, "tokens"):
            (output / leftover).delete()
    return draft.artifact


def _keep(draft: Draft, result: SweepResult, config: SweepConfig, seconds: float) -> None:
    """Writes what was found: every trial, the page, and the numbers of the manifest."""
    draft.write_json("result.json", result.to_json())
    page = render(result, seconds)
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
        **({"repeats": [asdict(again) for again in result.repeated]} if result.repeats else {}),
    }
    logger.info("tune: best trial %s, %s %.4f", best.label(), config.metric, best.best(config.metric))


def _count_failures(draft: Draft, told: Trackers, stages: Sequence[str]) -> None:
    """Notes how often each tracker failed that did, for trials, repeats and the sweep itself."""
    failures = Counter({name: count for name, count in told.failures.items() if count})
    for stage in stages:
        failures += Counter(tracker_failures_in(draft.location / stage))
    if failures:
        draft.numbers["tracker_failures"] = dict(failures)


@dataclass(frozen=True)
class _Stage:
    """A run of Ray Tune's below the sweep's folder: the points, who chooses and stops, and a budget."""

    name: str
    space: dict[str, Any]
    searched: TuneConfig
    stop: Any = None


def _search(config: SweepConfig, arrangement: Arrangement, output: Location, tracked: Tracked) -> SweepResult:
    """All trials, the best ones again with fresh seeds if that is wished, and the best adapter on storage."""

    def trials(stage: _Stage) -> tuple[Trial, ...]:
        told = Progress(output / stage.name, config.metric, tracked)
        return _trials(config, arrangement, output, stage, told)

    result = SweepResult(config.metric, trials(_first_stage(config, output)))
    if config.repeat_top:
        result = replace(result, repeats=trials(_second_stage(config, result)))
    if not arrangement.leave_best(result.best):
        logger.warning("tune: the best trial was stopped before it saved a model; train with its settings to get one")
    return result


def _first_stage(config: SweepConfig, output: Location) -> _Stage:
    grid = config.searcher == "grid"
    searched = TuneConfig(
        scheduler=scheduler(config, output / _RAY_STATE / "rungs.json"),
        search_alg=searcher(config),
        num_samples=config.num_trials or 1,
        time_budget_s=config.max_hours and config.max_hours * 3600,
    )
    space = {dimension(key, choice): domain(choice, grid=grid) for key, choice in config.space.items()}
    return _Stage(_RAY_STATE, space, searched, TokenBudget(config.max_tokens) if config.max_tokens else None)


def _second_stage(config: SweepConfig, result: SweepResult) -> _Stage:
    points = [
        {**trial.settings, "seed": config.training.seed + number}
        for trial in result.ranked[: config.repeat_top]
        for number in range(1, config.repeat_seeds + 1)
    ]
    return _Stage(_RAY_REPEATS, {REPEAT: ray_tune.grid_search(points)}, TuneConfig(scheduler=FIFOScheduler()))


def _tuner(config: SweepConfig, arrangement: Arrangement, output: Location, stage: _Stage, told: Progress) -> Tuner:
    where = (output / stage.name).uri
    if Tuner.can_restore(where):
        logger.info("tune: resumes the trials that are left")
        return Tuner.restore(where, trainable=arrangement.trainable, resume_unfinished=True, restart_errored=True)
    together = {"max_concurrent_trials": arrangement.together, "reuse_actors": True}
    pointers = CheckpointConfig(checkpoint_frequency=1, num_to_keep=homes.POINTERS_KEPT)
    return Tuner(
        arrangement.trainable,
        param_space=stage.space,
        tune_config=replace(stage.searched, metric=config.goal.metric, mode=config.goal.mode, **together),
        run_config=RunConfig(
            name=stage.name,
            storage_path=output.uri,
            checkpoint_config=pointers if arrangement.proxies else CheckpointConfig(),
            failure_config=FailureConfig(max_failures=config.training.max_failures),
            stop=stage.stop,
            callbacks=[told],
            verbose=0,
        ),
    )


def _trials(
    config: SweepConfig, arrangement: Arrangement, output: Location, stage: _Stage, told: Progress
) -> tuple[Trial, ...]:
    grid = _tuner(config, arrangement, output, stage, told).fit()
    curves, trials = curves_in(output / stage.name), []
    for result in grid:
        last = result.metrics or {}
        name, shared = last.get("trial_id", ""), config.training.model_dump(mode="json")
        trial = Trial(name, settings_at(result.config, shared), "finished", curves.get(name, []))
        ending, error = _ending(trial, result)
        trials.append(replace(trial, ending=ending, error=error, snapshot=last.get("snapshot")))
    return tuple(trials)


def _ending(trial: Trial, result: Any) -> tuple[Ending, str | None]:
    if result.error is not None:
        return "failed", last_line(result.error)
    infeasible = (result.metrics or {}).get("infeasible")
    if infeasible:
        return "infeasible", str(infeasible)
    if trial.last_step is None or trial.steps < trial.last_step:  # None: the budget was spent before it began
        return "stopped early", None
    return "finished", None

"""Where the search meets Ray: Tune's scheduler over trials, which share bases or are training runs of their own."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pickle import UnpicklingError
from typing import Any

from ray import tune as ray_tune
from ray.tune import CheckpointConfig, FailureConfig, RunConfig, TuneConfig, Tuner
from ray.tune.schedulers import FIFOScheduler
from ray.tune.stopper import Stopper

from raytune_ft.core import cluster
from raytune_ft.core.artifacts import Artifact
from raytune_ft.core.draft import Draft, begin
from raytune_ft.core.errors import RunError, last_line
from raytune_ft.core.grammar import number_of
from raytune_ft.core.manifest import ArtifactKind
from raytune_ft.core.storage import Location
from raytune_ft.training.inputs import (
    data_parent,
    model_parents,
    reachable,
    refuse_missing_packages,
    refuse_other_student,
    splits_of,
)
from raytune_ft.training.trackers import Trackers
from raytune_ft.tuning import homes, refusals
from raytune_ft.tuning.arrangement import SNAPSHOTS, TRIALS, Arrangement, Ground
from raytune_ft.tuning.budget import (
    refuse_late_grace,
    refuse_other_rows,
    refuse_small_budget,
    tokens_to_first_evaluation,
)
from raytune_ft.tuning.combinations import idle_everywhere
from raytune_ft.tuning.config import SweepConfig
from raytune_ft.tuning.packs import Packs
from raytune_ft.tuning.progress import (
    NoEventFiles,
    Progress,
    curves_in,
    lost_state,
    of_its_state,
    seconds_before_in,
    tracker_failures_in,
)
from raytune_ft.tuning.report import render
from raytune_ft.tuning.result import Ending, SweepResult, Trial
from raytune_ft.tuning.schedulers.budgets import limits
from raytune_ft.tuning.schedulers.choice import domain, scheduler, searcher
from raytune_ft.tuning.space import POINT, dimension, settings_at
from raytune_ft.tuning.tracking import Tracked

logger = logging.getLogger("raytune_ft")

_RAY_STATE = "ray"
_RAY_REPEATS = "ray-repeats"
_TOGETHER = "together.json"
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
    refuse_missing_packages(config.training)
    homes.refuse_pausing(config, homes.apart(config, Packs.of(config.space, config.training)))
    output = Location.at(config.output_dir)
    draft = begin(
        output,
        ArtifactKind.SWEEP,
        settings=config.resolved(),
        identity=config.identity(),
        parents=[*model_parents(config.training, output.parent), data_parent(config.training.dataset_path)],
        keep=_KEPT,
        idle=config.idle,
    )
    if draft.finished:
        logger.info("tune: found finished at %s", output)
        return draft.finished
    for name, why in idle_everywhere(config.space, config.training).items():
        if config.training.differs(name):
            logger.warning("tune: training.%s is set and changes nothing: it %s", name, why)
    tracked = Tracked(tuple(config.training.report_to), output, config.training.resolved())
    with draft, tracked.sweep(config.resolved()) as told:
        connected = cluster.connect()
        config = config.model_copy(update={"training": reachable(config.training, output.parent)})
        config = _as_it_began(config, output)
        packs = Packs.of(config.space, config.training)
        splits = {
            most: splits_of(config.training.with_overrides(max_length=most), output / "tokens" / str(most))
            for most in packs.lengths()
        }
        refuse_other_rows(config, splits)
        split = next(iter(splits.values()))
        refuse_late_grace(config, split)
        refuse_small_budget(config, config.trials, split)
        first = tokens_to_first_evaluation(config, split) if config.max_tokens else 0
        limit = limits(config, output / _RAY_STATE, first)
        started = time.perf_counter()
        ground = Ground(config, packs, splits, output, connected, config.trials)
        with ground.arranged() as arrangement:
            result = _search(config, arrangement, output, tracked, limit)
        stages = [_RAY_STATE, *([_RAY_REPEATS] if config.repeat_top else [])]
        seconds = time.perf_counter() - started + sum(seconds_before_in(output / stage) for stage in stages)
        _keep(draft, result, config, round(seconds, 1))
        told.log({"step": len(result.trials), f"best_{config.metric}": draft.numbers[f"best_{config.metric}"]})
        _count_failures(draft, told, stages)
        for leftover in (*_KEPT, "tokens"):
            (output / leftover).delete()
    return draft.artifact


def _as_it_began(config: SweepConfig, output: Location) -> SweepConfig:
    """The settings with as many trials at a time as the search has begun with, if it has: Ray Tune goes on with those.

    The cluster, or `max_concurrent_trials`, may be another now.
    """
    began = output / _RAY_STATE / _TOGETHER
    if not (began.exists() and Tuner.can_restore(*(output / _RAY_STATE).for_ray)):
        return config
    together = int(json.loads(began.read()))
    if config.max_concurrent_trials not in {None, together}:
        logger.warning(
            "tune: goes on with %s at a time, as it began; max_concurrent_trials: %d is for a new search",
            number_of(together, "trial"),
            config.max_concurrent_trials,
        )
    return config.model_copy(update={"max_concurrent_trials": together})


def _keep(draft: Draft, result: SweepResult, config: SweepConfig, seconds: float) -> None:
    """Writes what was found: every trial, the page, and the numbers of the manifest.

    Steps and tokens are those of the search and its repeats.

    Args:
        draft: the sweep's artifact.
        result: what was found.
        config: the sweep's.
        seconds: of this driver, and of those before it as far as their state tells.
    """
    draft.write_json("result.json", result.to_json())
    page = render(result, seconds)
    (draft.folder / "report.html").write_text(page, encoding="utf-8")
    best, everyone = result.best, (*result.trials, *result.repeats)
    draft.numbers |= {
        "trials": len(result.trials),
        "not_begun": result.not_begun,
        **{key: sum(trial.ending == ending for trial in result.trials) for key, ending in _ENDINGS.items()},
        "steps": sum(trial.steps for trial in everyone),
        "tokens": sum(trial.tokens for trial in everyone),
        "seconds": seconds,
        f"best_{config.metric}": best.best(config.metric),
        "best_settings": best.settings,
        **({"repeats": [asdict(again) for again in result.repeated]} if result.repeats else {}),
        **({"best_schedule": best.schedule} if best.schedule else {}),
    }
    logger.info("tune: best trial %s, %s %.4f", best.label(), config.metric, best.best(config.metric))
    if len(best.schedule) > 1:
        logger.info("tune: its settings changed on the way (best_schedule); the last ones alone make another model")


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


def _search(
    config: SweepConfig, arrangement: Arrangement, output: Location, tracked: Tracked, limit: Stopper | None
) -> SweepResult:
    """All trials, the best ones again with fresh seeds if that is wished, and the best adapter on storage."""

    def trials(stage: _Stage) -> tuple[Trial, ...]:
        told = Progress(output / stage.name, config.metric, tracked)
        return _trials(config, arrangement, output, stage, told)

    if not Tuner.can_restore(*(output / _RAY_STATE).for_ray):
        (output / _RAY_STATE / _TOGETHER).write(json.dumps(arrangement.together).encode())
    stage = _first_stage(config, output, arrangement.together, limit)
    result = _of_those_measured(SweepResult(config.metric, trials(stage)), config)
    if config.repeat_top:
        stage = _second_stage(config, result, arrangement.together)
        if config.max_tokens or config.max_hours:
            logger.info("tune: the repeats are made beyond the search's budget")
        result = replace(result, repeats=trials(stage))
    if result.best in result.repeats:
        logger.info("tune: the search stopped the best trial early, so its finished repeat is left as the best model")
    if not arrangement.leave_best(result.best):
        logger.warning("tune: the best trial was stopped before it saved a model; train with its settings to get one")
    return result


def _of_those_measured(result: SweepResult, config: SweepConfig) -> SweepResult:
    """Without the trials that the budget was spent before, which are told, and counted.

    Raises:
        RunError: if it was spent before any was measured.
    """
    measured = tuple(trial for trial in result.trials if trial.curve or trial.ending != "stopped early")
    missing = config.trials - len(measured)
    if not (missing and (config.max_tokens or config.max_hours)):
        return result
    budget = " and ".join(f"{key}: {value:,}" for key in ("max_tokens", "max_hours") if (value := getattr(config, key)))
    if not measured:
        raise RunError(
            f"{budget}: was spent before any of {config.trials} trials was evaluated; raise it, or evaluate earlier "
            "(training.eval_strategy, training.eval_steps)"
        )
    logger.warning(
        "tune: %s was spent before %d of %d trials were evaluated: these are not compared; raise it to try all",
        budget,
        missing,
        config.trials,
    )
    return replace(result, trials=measured, not_begun=missing)


def _first_stage(config: SweepConfig, output: Location, together: int, limit: Stopper | None) -> _Stage:
    grid = config.searcher == "grid"
    searched = TuneConfig(
        scheduler=scheduler(config, output / _RAY_STATE / "rungs.json"),
        search_alg=searcher(config, together),
        num_samples=config.num_trials or 1,
    )
    space = {dimension(key, choice): domain(choice, grid=grid) for key, choice in config.space.items()}
    if grid and config.grid.left_out:
        space = {POINT: ray_tune.grid_search(list(config.grid.points))}
    return _Stage(_RAY_STATE, space, searched, limit)


def _second_stage(config: SweepConfig, result: SweepResult, together: int) -> _Stage:
    points = [
        {**trial.settings, "seed": config.training.seed + number}
        for trial in result.distinct[: config.repeat_top]
        for number in range(1, config.repeat_seeds + 1)
    ]
    searched = TuneConfig(scheduler=FIFOScheduler(), max_concurrent_trials=together)
    return _Stage(_RAY_REPEATS, {POINT: ray_tune.grid_search(points)}, searched)


def _tuner(config: SweepConfig, arrangement: Arrangement, output: Location, stage: _Stage, told: Progress) -> Tuner:
    where, filesystem = refusals.for_ray(output / stage.name)
    if Tuner.can_restore(where, filesystem):
        logger.info("tune: resumes the trials that are left")
        try:
            return Tuner.restore(
                where,
                trainable=arrangement.trainable,
                resume_unfinished=True,
                restart_errored=True,
                storage_filesystem=filesystem,
            )
        except (EOFError, UnpicklingError):
            raise lost_state(output / stage.name) from None
    pointers = CheckpointConfig(checkpoint_frequency=1, num_to_keep=homes.POINTERS_KEPT)
    return Tuner(
        arrangement.trainable,
        param_space=stage.space,
        tune_config=replace(
            stage.searched, metric=config.goal.metric, mode=config.goal.mode, reuse_actors=arrangement.proxies
        ),
        run_config=RunConfig(
            name=stage.name,
            storage_path=refusals.for_ray(output)[0],
            storage_filesystem=filesystem,
            checkpoint_config=pointers if arrangement.proxies else CheckpointConfig(),
            failure_config=FailureConfig(max_failures=config.training.max_failures),
            stop=stage.stop,
            callbacks=[told, NoEventFiles()],
            verbose=0,
        ),
    )


def _trials(
    config: SweepConfig, arrangement: Arrangement, output: Location, stage: _Stage, told: Progress
) -> tuple[Trial, ...]:
    with refusals.told_of():
        grid = _tuner(config, arrangement, output, stage, told).fit()
    curves, trials = curves_in(output / stage.name), []
    shared = config.training.model_dump(mode="json")
    # A result knows the settings of its trial only if that reported any, and so Ray's own trials are asked.
    for result, of_ray in zip(grid, grid._experiment_analysis.trials, strict=True):
        last, name = result.metrics or {}, of_ray.trial_id
        settings, curve = settings_at(of_ray.config, shared), curves.get(name, [])
        trial = Trial(name, settings, "finished", curve, snapshot=last.get("snapshot"))
        if config.scheduler == "pbt":
            trial = of_its_state(trial)
        ending, error = _ending(trial, result)
        trials.append(replace(trial, ending=ending, error=error))
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

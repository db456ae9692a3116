"""The scheduler, the searcher and the domains that settings name."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

from ray import tune as ray_tune
from ray.tune.schedulers import FIFOScheduler, HyperBandScheduler
from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter

from raytune_ft.core.storage import Location
from raytune_ft.tuning.config import SweepConfig
from raytune_ft.tuning.schedulers.memory import TIME
from raytune_ft.tuning.schedulers.population import LockstepPopulation
from raytune_ft.tuning.schedulers.remembered import RememberedASHA, RememberedHyperBand, RememberedMedian
from raytune_ft.tuning.space import Choice, Domain, LogUniform, QUniform, TimesRank, Uniform, dimension

logger = logging.getLogger("raytune_ft")


def scheduler(config: SweepConfig, memory: Location) -> Any:
    """The scheduler; what it has decided by, it keeps in the file `memory`."""
    most = config.last_step or 10**9
    match config.scheduler:
        case "none":
            return FIFOScheduler()
        case "median":
            return RememberedMedian(memory, time_attr=TIME, grace_period=config.grace_steps, min_samples_required=2)
        case "hyperband":
            made = RememberedHyperBand(memory, time_attr=TIME, max_t=most, reduction_factor=config.reduction_factor)
            _warn_if_all_run_to_the_end(made, config.trials, most)
            return made
        case "pbt":
            return LockstepPopulation(
                seed=config.seed,
                time_attr=TIME,
                perturbation_interval=config.grace_steps,
                hyperparam_mutations={
                    dimension(key, choice): _mutation(choice) for key, choice in config.space.items()
                },
                custom_explore_fn=partial(_within, config.space),
                require_attrs=False,
            )
    return RememberedASHA(
        memory,
        time_attr=TIME,
        grace_period=config.grace_steps,
        reduction_factor=config.reduction_factor,
        max_t=most,
    )


def _warn_if_all_run_to_the_end(hyperband: HyperBandScheduler, trials: int, last_step: int) -> None:
    """HyperBand's first bracket, which trials fall to first, has no rung before the last step."""
    first = hyperband._get_n0(0)
    if trials <= first:
        logger.warning(
            "tune: hyperband stops none of %d trials: the first %d run to step %d; search more, or set scheduler: asha",
            trials,
            first,
            last_step,
        )


def searcher(config: SweepConfig, together: int) -> Any:
    """What chooses the points of the space, and lets `together` of them be tried at the same time.

    It sees to that itself: beside a searcher that one names, Ray Tune takes no heed of its own `max_concurrent_trials`.
    """
    if config.searcher == "optuna":
        from ray.tune.search.optuna import OptunaSearch

        return ConcurrencyLimiter(OptunaSearch(seed=config.seed), max_concurrent=together)
    return BasicVariantGenerator(random_state=config.seed, max_concurrent=together)


def domain(choice: Domain, *, grid: bool) -> Any:
    """What Ray Tune draws a setting from; a list is a grid, or values that are each as likely."""
    match choice:
        case TimesRank():
            return domain(list(choice.times_rank), grid=grid)
        case Choice():
            return ray_tune.choice(choice.choice)
        case Uniform():
            return ray_tune.uniform(*choice.uniform)
        case LogUniform():
            return ray_tune.loguniform(*choice.loguniform)
        case QUniform():
            return ray_tune.quniform(*choice.quniform)
    return ray_tune.grid_search(choice) if grid else ray_tune.choice(choice)


def _mutation(choice: Domain) -> Any:
    """What population-based training draws a changed setting from; PBT's explicit lists are neighbours in order."""
    if isinstance(choice, list):
        return list(choice)
    if isinstance(choice, Choice):
        return list(choice.choice)
    if isinstance(choice, TimesRank):
        return list(choice.times_rank)
    return domain(choice, grid=False)


def _within(space: Mapping[str, Domain], point: dict[str, Any]) -> dict[str, Any]:
    """A point that population-based training made, with what it multiplied put back into its range."""
    for key, choice in space.items():
        match choice:
            case Uniform(uniform=(low, high)) | LogUniform(loguniform=(low, high)):
                point[key] = min(max(point[key], low), high)
            case QUniform(quniform=(low, high, step)):
                point[key] = min(max(step * round(point[key] / step), low), high)
    return point

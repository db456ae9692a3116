"""What settings of a space do to each other: some leave others without effect, and some do not go together."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

from raytune_ft.core.errors import ConfigError
from raytune_ft.training.config import FineTuningConfig
from raytune_ft.training.without_effect import DECIDING, idle_beside
from raytune_ft.tuning.packs import with_values
from raytune_ft.tuning.space import Domain, TimesRank, dimension, extremes, settings_at

_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")


def refuse_without_effect(space: Mapping[str, Domain], training: FineTuningConfig) -> None:
    """Checks that every key of the space decides something: else trials would differ in name only.

    Raises:
        ValueError: if one does not, with the reason.
    """
    for key, why in idle_everywhere(space, training).items():
        if key in space:
            raise ValueError(f"space.{key}: would change nothing: it {why}; leave it out")


def idle_everywhere(space: Mapping[str, Domain], training: FineTuningConfig) -> dict[str, str]:
    """Names of the training settings that decide nothing in any trial of a space, each with the reason."""
    keys = [key for key in DECIDING if key in space]
    points = product(*(_telling(space[key]) for key in keys))
    found = [idle_beside({**dict(training), **dict(zip(keys, point, strict=True))}) for point in points]
    always = [name for name in found[0] if all(name in idle for idle in found)]
    return {name: " and ".join(dict.fromkeys(idle[name] for idle in found)) for name in always}


@dataclass(frozen=True)
class Grid:
    """Combinations of a space of lists, as points for Ray Tune; how many are `left_out` beside these, and why."""

    points: tuple[dict[str, Any], ...]
    left_out: int = 0
    reasons: tuple[str, ...] = ()

    @classmethod
    def whole(cls, space: Mapping[str, Domain]) -> Grid:
        """All combinations."""
        names = [dimension(key, choice) for key, choice in space.items()]
        return cls(tuple(dict(zip(names, values, strict=True)) for values in product(*map(extremes, space.values()))))

    @classmethod
    def of_runs(cls, space: Mapping[str, Domain], training: FineTuningConfig) -> Grid:
        """Of the combinations that come to the same run, the first one each."""
        shared, everything = training.model_dump(mode="json"), cls.whole(space).points
        found, reasons = dict[str, dict[str, Any]](), list[str]()
        for point in everything:
            settings = settings_at(point, shared)
            first = found.setdefault(_run_of(settings, shared), point)
            if first is not point:
                reasons += _why_same(point, first, idle_beside({**shared, **settings}))
        return cls(tuple(found.values()), len(everything) - len(found), tuple(dict.fromkeys(reasons)))


def _run_of(settings: Mapping[str, Any], shared: Mapping[str, Any]) -> str:
    """What of a trial's settings makes its run another one: how a batch is laid out does not."""
    rows = math.prod(settings.get(name, shared[name]) for name in _BATCH)
    told = {name: value for name, value in settings.items() if name not in _BATCH}
    return json.dumps({**told, "rows": rows}, sort_keys=True)


def _why_same(point: Mapping[str, Any], other: Mapping[str, Any], idle: Mapping[str, str]) -> list[str]:
    names = {name.partition(".")[0] for name, value in point.items() if value != other[name]}
    reasons = [f"{name} {why}" for name, why in idle.items() if name in names]
    if names & set(_BATCH):
        reasons.append(f"of {' and '.join(_BATCH)} the product counts")
    return reasons or ["a value is given twice"]


def refuse_invalid_pairs(space: Mapping[str, Domain], training: FineTuningConfig) -> None:
    """Checks that the values of any two keys go together, so that no trial fails where it begins.

    Raises:
        ValueError: if two do not.
    """
    searched = {key: _telling(choice) for key, choice in space.items() if not isinstance(choice, TimesRank)}
    for keys in combinations(searched, 2):
        for values in product(*(searched[key] for key in keys)):
            try:
                with_values(training, dict(zip(keys, values, strict=True)))
            except ConfigError as error:
                raise ValueError(str(error)) from None


def _telling(choice: Domain) -> list[Any]:
    """The values that tell whether all are valid beside others: of numbers, the lowest and the highest."""
    values = extremes(choice)
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    others = [value for value in values if isinstance(value, bool) or not isinstance(value, int | float)]
    return [*others, *({min(numbers), max(numbers)} if numbers else ())]

"""Search spaces: which training settings are tried, with which values. Checked before anything runs."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

from pydantic import Field

from raytune_ft.core.config import Config
from raytune_ft.core.errors import ConfigError
from raytune_ft.training.config import FineTuningConfig

_FIXED = {"model_path", "output_dir", "dataset_path", "num_workers", "use_gpu", "cpus_per_worker", "zero_stage"}


class Choice(Config):
    """One of several values, each as likely."""

    choice: list[Any] = Field(min_length=1)


class Uniform(Config):
    """A number between two others."""

    uniform: tuple[float, float]


class LogUniform(Config):
    """A number between two others, each order of magnitude as likely."""

    loguniform: tuple[float, float]


class QUniform(Config):
    """A multiple of the third number between the first two."""

    quniform: tuple[float, float, float]


Sampled = Choice | Uniform | LogUniform | QUniform
Space = Annotated[dict[str, list[Any] | Sampled], Field(min_length=1)]
Kind = Literal["choice", "uniform", "loguniform", "quniform"]


def extremes(choice: list[Any] | Sampled) -> list[Any]:
    """The values that decide whether a whole choice is valid: all of a list, both ends of a range."""
    match choice:
        case Choice():
            return list(choice.choice)
        case Uniform():
            return list(choice.uniform)
        case LogUniform():
            return list(choice.loguniform)
        case QUniform():
            return list(choice.quniform[:2])
    return list(choice)


def check_space(space: dict[str, list[Any] | Sampled], training: FineTuningConfig) -> None:
    """Tries every setting of the space on the training settings.

    Raises:
        ValueError: if a key is unknown or cannot be searched, has no values, or has a value that is not valid.
    """
    for key, choice in space.items():
        if key not in FineTuningConfig.model_fields:
            near = difflib.get_close_matches(key, list(FineTuningConfig.model_fields), n=1)
            raise ValueError(f"space.{key}: is no training setting" + (f"; did you mean {near[0]}?" if near else ""))
        if key in _FIXED:
            raise ValueError(f"space.{key}: cannot be searched; all trials of a sweep share it")
        values = extremes(choice)
        if not values:
            raise ValueError(f"space.{key}: has no values")
        if not isinstance(choice, list | Choice) and values[0] >= values[1]:
            raise ValueError(f"space.{key}: the low end {values[0]} is not below the high end {values[1]}")
        for value in values:
            try:
                training.with_overrides(**{key: value})
            except ConfigError as error:
                raise ValueError(f"space.{str(error).removeprefix('FineTuningConfig: ')}") from None


def grid_size(space: dict[str, list[Any] | Sampled]) -> int:
    """Number of combinations of a space of lists."""
    size = 1
    for choice in space.values():
        size *= len(choice) if isinstance(choice, list) else 1
    return size

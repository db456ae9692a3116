"""A search space as people give it, made plain: numbers of numpy, the guide's values, and domains by their names."""

from __future__ import annotations

from typing import Any

from raytune_ft.core.config import Config
from raytune_ft.core.errors import ConfigError
from raytune_ft.core.grammar import meant
from raytune_ft.tuning.space import GUIDE, Choice, LogUniform, QUniform, TimesRank, Uniform, with_guide

_KINDS: dict[str, type[Config]] = {
    "choice": Choice,
    "uniform": Uniform,
    "loguniform": LogUniform,
    "quniform": QUniform,
    "times_rank": TimesRank,
}


def plain_space(space: Any) -> Any:
    """The space with every domain read; ``guide`` alone is all that the guide gives values for.

    Raises:
        ValueError: if a domain is none, in one line.
    """
    if isinstance(space, str) and space == "guide":
        space = dict.fromkeys(GUIDE, "guide")
    if not isinstance(space, dict):
        return space
    named = with_guide({key: plain(choice) for key, choice in space.items()})
    return {key: _domain(key, choice) for key, choice in named.items()}


def plain(value: Any) -> Any:
    """`value` with lists and numbers of Python's own for what numpy has."""
    if isinstance(value, Config):
        return plain(value.model_dump())
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | range):
        return [plain(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value


def _domain(key: str, choice: Any) -> Any:
    if isinstance(choice, list):
        return choice
    wanted = f"wanted a list of values, guide, or one of {', '.join(_KINDS)} ({{uniform: [low, high]}}, say)"
    if not isinstance(choice, dict):
        raise ValueError(f"space.{key}: {wanted}; got {choice!r}; did you mean [{choice}]?")
    if len(choice) != 1 or next(iter(choice)) not in _KINDS:
        hint = next(filter(None, (meant(str(name), _KINDS) for name in choice)), "")
        raise ValueError(f"space.{key}: {wanted}; got {choice!r}{hint}")
    [kind] = (_KINDS[name] for name in choice)
    try:
        return kind(**choice)
    except ConfigError as error:
        faults = str(error).replace(f"{kind.__name__}: ", "").splitlines()
        raise ValueError(f"space.{key}: {'; '.join(faults)}") from None

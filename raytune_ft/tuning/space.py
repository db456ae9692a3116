"""Search spaces: which training settings are tried, with which values. Checked before anything runs."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import Field

from raytune_ft.core.config import Config
from raytune_ft.core.errors import ConfigError
from raytune_ft.core.grammar import meant
from raytune_ft.training.config import FineTuningConfig
from raytune_ft.training.config_alignment import PreferenceConfig
from raytune_ft.training.without_effect import idle_beside

OF_WORKERS = ("cpus_per_worker", "zero_stage", "offload", "deepspeed_config")
"""Training settings that trials on one worker have no use for."""
OF_RUNS = (
    *("resume_from_checkpoint", "save_strategy", "save_steps", "save_total_limit"),
    *("logging_strategy", "logging_steps"),
)
"""Training settings that no trial has a use for: trials start afresh, and save and speak where they are evaluated."""
_FIXED = {
    *("model_path", "output_dir", "dataset_path", "num_workers", "use_gpu", "max_failures", "report_to"),
    "max_tokens_per_micro_batch",
    *(*OF_WORKERS, *OF_RUNS),
    *("eval_generation_rows", "eval_generation_metric", "bleu_tokenizer", "metric_for_best_model"),
    *("reward_model_path", "reward_metric", "max_new_tokens", "teacher_path"),
}
_MADE_FOR_EACH = {"max_length": "the data is tokenized", "student_layers": "a student is made"}
"""Settings for whose values something is made before the trials start."""


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


class TimesRank(Config):
    """`lora_alpha` as a multiple of the trial's rank (the guide: usually twice)."""

    times_rank: list[float] = Field(min_length=1)


Sampled = Choice | Uniform | LogUniform | QUniform
Domain = list[Any] | Sampled | TimesRank
Space = Annotated[dict[str, Domain], Field(min_length=1)]

_ALPHA_TIMES_RANK = "lora_alpha.times_rank"
POINT = "point"
"""The name under which a whole trial's settings are given at once."""

GUIDE: dict[str, Any] = {
    "learning_rate": [1e-4, 2e-4, 5e-4],
    "lora_r": [4, 8, 16, 32],
    "lora_alpha": {"times_rank": [2.0]},
    "lora_dropout": [0.05, 0.1],
    "per_device_train_batch_size": [1, 2, 4, 8],
    "num_train_epochs": [2, 3, 4, 5],
    "weight_decay": [0.01, 0.1],
    "warmup_ratio": [0.1],
}
"""The guide's ranges as grids, for ``key: guide``. Its learning rates, 1e-5 to 5e-5, are for full fine-tuning; an
adapter's are ten times those."""


def with_guide(space: Any) -> Any:
    """The space with every ``key: guide`` replaced by the guide's values for that key.

    Raises:
        ValueError: if the guide names none.
    """
    if not isinstance(space, dict):
        return space
    unknown = [key for key, choice in space.items() if choice == "guide" and key not in GUIDE]
    if unknown:
        raise ValueError(f"space.{unknown[0]}: the guide gives no range for it; it does for {', '.join(GUIDE)}")
    return {key: GUIDE[key] if choice == "guide" else choice for key, choice in space.items()}


def dimension(key: str, choice: Domain) -> str:
    """The name that a setting is searched under: alphas that follow the rank are searched as factors."""
    return _ALPHA_TIMES_RANK if isinstance(choice, TimesRank) else key


def settings_at(point: dict[str, Any], shared: dict[str, Any]) -> dict[str, Any]:
    """The training settings at a point of the space: a factor of the rank becomes an alpha; without those of no effect.

    Args:
        point: what Ray Tune chose, by `dimension`.
        shared: the settings that all trials have in common.
    """
    settings = dict(point.get(POINT, point))
    if _ALPHA_TIMES_RANK in settings:
        settings["lora_alpha"] = settings.pop(_ALPHA_TIMES_RANK) * settings.get("lora_r", shared["lora_r"])
    idle = idle_beside({**shared, **settings})
    return {key: value for key, value in settings.items() if key not in idle}


def extremes(choice: Domain) -> list[Any]:
    """The values that decide whether a whole choice is valid: all of a list, both ends of a range."""
    match choice:
        case TimesRank():
            return list(choice.times_rank)
        case Choice():
            return list(choice.choice)
        case Uniform():
            return list(choice.uniform)
        case LogUniform():
            return list(choice.loguniform)
        case QUniform():
            return list(choice.quniform[:2])
    return list(choice)


def _inside(choice: Domain) -> list[float]:
    """A value between the ends of a range, which is no whole number where some of its values are not."""
    match choice:
        case Uniform(uniform=(low, high)):
            return [low + (high - low) / math.pi]
        case LogUniform(loguniform=(low, high)):
            return [low * (high / low) ** (1 / math.pi)]
        case QUniform(quniform=(low, _, step)):
            return [low + step]
    return []


def _refuse_range(key: str, choice: Domain) -> None:
    """Checks that there are numbers to draw from a range, as Ray Tune draws them.

    Raises:
        ValueError: if there are not.
    """
    if not isinstance(choice, Uniform | LogUniform | QUniform):
        return
    [(kind, numbers)] = choice.model_dump().items()
    low, high, *steps = numbers
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError(f"space.{key}: {kind} wants finite numbers (got {', '.join(map(str, numbers))})")
    if low >= high:
        raise ValueError(f"space.{key}: the low end {low} is not below the high end {high}")
    if kind == "loguniform" and low <= 0:
        raise ValueError(
            f"space.{key}: loguniform wants a low end above 0 (got {low}); take uniform, or a small number"
        )
    for step in steps:
        if step <= 0:
            raise ValueError(f"space.{key}: quniform wants a step above 0 (got {step})")
        if not all(math.isclose(end / step, round(end / step)) for end in (low, high)):
            raise ValueError(
                f"space.{key}: quniform draws multiples of its step, {step:g}, and its ends must be some, too (got "
                f"{low:g} and {high:g})"
            )


def check_space(space: dict[str, Domain], training: FineTuningConfig) -> None:
    """Tries every setting of the space on the training settings.

    Raises:
        ValueError: if a key is unknown or cannot be searched, has no values, or has a value that is not valid.
    """
    kind = type(training)
    for key, choice in space.items():
        if key not in kind.model_fields:
            raise ValueError(f"space.{key}: is no training setting{meant(key, kind.model_fields)}")
        if key in _FIXED:
            raise ValueError(f"space.{key}: cannot be searched; all trials of a sweep share it")
        if key in _MADE_FOR_EACH and not isinstance(choice, list | Choice):
            raise ValueError(f"space.{key}: give a list, or {{choice: [...]}}: {_MADE_FOR_EACH[key]} for each value")
        if isinstance(choice, TimesRank) and key != "lora_alpha":
            raise ValueError(f"space.{key}: times_rank is for lora_alpha")
        values = extremes(choice)
        if not values:
            raise ValueError(f"space.{key}: has no values")
        _refuse_range(key, choice)
        for value in [*values, *_inside(choice)]:
            try:
                training.with_overrides(**{key: value})
            except ConfigError as error:
                why = f"space.{str(error).removeprefix(f'{kind.__name__}: ')}"
                if value not in values:
                    why += "; the range has such values between its ends: take quniform with another step, or a list"
                raise ValueError(why) from None
        rated = isinstance(training, PreferenceConfig) and training.loss_type == "kto"
        if key == "loss_type" and any((value == "kto") != rated for value in values):
            raise ValueError(
                "space.loss_type: kto learns from rated answers, the others from pairs; search values of the kind that "
                "training.loss_type is"
            )

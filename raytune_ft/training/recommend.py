"""Which method and starting values fit a model, the memory at hand and the data: the guide's tables as a function."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

from raytune_ft.core.errors import ConfigError
from raytune_ft.core.grammar import agreeing, number_of
from raytune_ft.data.findings import quantity_of
from raytune_ft.training.config import FineTuningMethod
from raytune_ft.training.memory import Load, MemoryPeak, ModelShape, predict_peak

Goal = Literal["balanced", "slight_domain_adaptation", "multiple_related_tasks", "complete_task_change"]

_BATCH = 4
_FITTED = (FineTuningMethod.FULL, FineTuningMethod.LORA, FineTuningMethod.QLORA)
_SIZE = re.compile(r"(\d+(?:\.\d+)?(?:e\d+)?)\s*([KMBT]?)", re.IGNORECASE)


@dataclass(frozen=True)
class Recommendation:
    """A method with starting values for `FineTuningConfig`, the memory it needs at its peak, and why."""

    method: FineTuningMethod
    settings: dict[str, Any]
    peak: MemoryPeak
    reasons: tuple[str, ...]

    @property
    def memory_gib(self) -> float:
        """GiB at the peak."""
        return self.peak.gib


def recommend_method(
    *,
    memory_gib: float,
    parameters: float | None = None,
    model: str | None = None,
    rows: int | None = None,
    goal: Goal = "balanced",
    max_length: int = 1024,
    world_size: int = 1,
) -> Recommendation:
    """The method that the guide's selection table gives, with its recommended starting values.

    Args:
        memory_gib: memory of one device, in GiB.
        parameters: number of weights of the base model, if no `model` is given; a typical shape is assumed then.
        model: a model reference, whose shape is read, or a number of weights such as ``8B`` or ``135M``.
        rows: number of training rows, if known.
        goal: what the tuned model is for.
        max_length: tokens of a row; all rows are taken to be so long.
        world_size: workers that share the optimizer's state and the gradients.

    Raises:
        ConfigError: if even a 4-bit base does not fit, a number is out of range, the goal is none of
            those known, or neither or both of model and parameters are given.
        ModelError: if `model` leads to no model.
    """
    positive = {"memory_gib": memory_gib, "max_length": max_length, "world_size": world_size}
    for name, value in (positive if rows is None else {**positive, "rows": rows}).items():
        _refuse_below_zero(name, value)
    if goal not in get_args(Goal):
        raise ConfigError(f"goal: must be one of {', '.join(get_args(Goal))} (got {goal!r})")
    shape = _shape(parameters, model)
    tokens = _Tokens(max_length, world_size)
    batches = {m: _fitting_batch(shape, m, memory_gib, tokens) for m in _FITTED}
    wanted, reasons = _wanted(memory_gib, goal)
    if batches[FineTuningMethod.QLORA] is None:
        tokens = _Tokens(max_length, world_size, checkpointing=True)
        batches = {m: _fitting_batch(shape, m, memory_gib, tokens) for m in _FITTED}
        reasons.append("gradient_checkpointing computes activations twice, since they do not fit")
    if batches[FineTuningMethod.QLORA] is None:
        least = _peak(shape, FineTuningMethod.QLORA, 1, tokens).gib
        raise ConfigError(
            f"{shape.parameters / 1e9:.1f}B weights need {least:.1f} GiB even quantized to 4 bits, with gradient "
            f"checkpointing and one row at a time, {memory_gib:g} GiB are there: take a smaller model, a smaller "
            "max_length, or a larger device"
        )
    fitting = [m for m in _FITTED if batches[m] is not None]
    method = wanted if wanted in fitting else fitting[0] if wanted is FineTuningMethod.FULL else fitting[-1]
    if method is not wanted:
        least = _peak(shape, wanted, 1, tokens).gib
        reasons.append(f"{wanted} would need {least:.1f} GiB of {memory_gib:g} even with one row at a time")
    batch = batches[method] or 1
    if batch < _BATCH:
        reasons.append(
            f"{number_of(batch, 'row')} at a time {agreeing(batch, 'fits', 'fit')}; gradient_accumulation_steps keeps "
            f"{_BATCH} rows a step"
        )
    if rows is not None:
        reasons += _on_rows(shape.parameters, rows)
    peak = _peak(shape, method, batch, tokens)
    settings = _settings(method, goal, batch, rows)
    if tokens.checkpointing:
        settings["gradient_checkpointing"] = True
    return Recommendation(method, settings, peak, tuple(reasons))


def _shape(parameters: float | None, model: str | None) -> ModelShape:
    if (parameters is None) == (model is None):
        raise ConfigError("give either model (a reference, or a size such as 8B) or parameters")
    size = _SIZE.fullmatch(model.strip()) if model is not None else None
    if size is not None:
        parameters = float(size[1]) * {"": 1, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[size[2].upper()]
    if model is None or size is not None:
        _refuse_below_zero("model" if size is not None else "parameters", float(parameters or 0))
        return ModelShape.typical(float(parameters or 0))
    from transformers import AutoConfig

    from raytune_ft.models.references import resolve_model
    from raytune_ft.models.size import parameter_count

    count = parameter_count(model)
    return ModelShape.of(AutoConfig.from_pretrained(resolve_model(model).base, trust_remote_code=False), count)


def _refuse_below_zero(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ConfigError(f"{name}: must be a number above 0 (got {value:g})")


@dataclass(frozen=True)
class _Tokens:
    """What of a run decides its activations, besides the batch."""

    max_length: int
    world_size: int
    checkpointing: bool = False


def _fitting_batch(shape: ModelShape, method: FineTuningMethod, memory_gib: float, tokens: _Tokens) -> int | None:
    """The guide's batch of 4, or 2, or 1: the largest that fits; None if none does."""
    return next((n for n in (_BATCH, 2, 1) if _peak(shape, method, n, tokens).gib <= memory_gib), None)


def _peak(shape: ModelShape, method: FineTuningMethod, batch: int, tokens: _Tokens) -> MemoryPeak:
    load = Load(
        method,
        batch * tokens.max_length,
        world_size=tokens.world_size,
        accumulates=batch < _BATCH,
        gradient_checkpointing=tokens.checkpointing,
    )
    return predict_peak(shape, load)


def _wanted(memory_gib: float, goal: Goal) -> tuple[FineTuningMethod, list[str]]:
    if goal == "complete_task_change":
        return FineTuningMethod.FULL, ["a complete change of task wants full fine-tuning"]
    if goal in {"multiple_related_tasks", "slight_domain_adaptation"}:
        return FineTuningMethod.LORA, [f"LoRA suits {goal.replace('_', ' ')}"]
    if memory_gib < 12:
        return FineTuningMethod.QLORA, [f"{memory_gib:g} GiB is limited memory (below 12)"]
    if memory_gib <= 24:
        return FineTuningMethod.LORA, [f"{memory_gib:g} GiB is medium memory (12 to 24)"]
    return FineTuningMethod.FULL, [f"{memory_gib:g} GiB is much memory (above 24)"]


def _settings(method: FineTuningMethod, goal: Goal, batch: int, rows: int | None) -> dict[str, Any]:
    few = rows is not None and rows < 1_000
    settings: dict[str, Any] = {
        "method": method,
        "learning_rate": 2e-5 if method is FineTuningMethod.FULL else 2e-4,
        "num_train_epochs": 5 if few else 3,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": _BATCH // batch,
        "weight_decay": 0.01,
        "warmup_ratio": 0.1,
        "early_stopping_patience": 3,
    }
    if method is FineTuningMethod.FULL:
        return settings
    rank = {"slight_domain_adaptation": 4, "complete_task_change": 32}.get(goal, 8)
    settings |= {"lora_r": rank, "lora_alpha": max(16, 2 * rank), "lora_dropout": 0.05}
    if method is FineTuningMethod.QLORA:
        settings |= {"bits": 4, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return settings


def _on_rows(parameters: float, rows: int) -> list[str]:
    least, enough = quantity_of(int(parameters)).minimum
    if rows < least:
        return [f"{rows} rows are few: the guide wants at least {least} to {enough} for a model of this size"]
    return [f"{rows} rows are enough for a model of this size (the guide: at least {least} to {enough})"]

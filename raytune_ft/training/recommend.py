"""Which method and starting values fit a model, the memory at hand and the data: the guide's tables as a function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from raytune_ft.core.errors import ConfigError
from raytune_ft.training.config import FineTuningMethod

Goal = Literal["balanced", "slight_domain_adaptation", "multiple_related_tasks", "complete_task_change"]

_GIB = 1 << 30
_ROWS = ((1e9, 500, 1_000), (10e9, 1_000, 2_000), (float("inf"), 2_000, 5_000))
_OVERHEAD = 1.25
"""Activations, buffers and fragmentation, beside weights, gradients and optimizer state."""


@dataclass(frozen=True)
class Recommendation:
    """A method with starting values for `FineTuningConfig`, the memory it needs at least, and why."""

    method: FineTuningMethod
    settings: dict[str, Any]
    memory_gib: float
    reasons: tuple[str, ...]


def recommend_method(
    *, parameters: float, memory_gib: float, rows: int | None = None, goal: Goal = "balanced"
) -> Recommendation:
    """The method that the guide's selection table gives, with its recommended starting values.

    Args:
        parameters: number of weights of the base model.
        memory_gib: memory of one device, in GiB.
        rows: number of training rows, if known.
        goal: what the tuned model is for.

    Raises:
        ConfigError: if even a 4-bit base does not fit.
    """
    needs = {method: memory_needed(method, parameters) for method in FineTuningMethod}
    if needs[FineTuningMethod.QLORA] > memory_gib:
        raise ConfigError(
            f"{parameters / 1e9:.1f}B weights need {needs[FineTuningMethod.QLORA]:.1f} GiB even quantized to 4 bits, "
            f"{memory_gib:g} GiB are there: take a smaller model, or more workers"
        )
    wanted, reasons = _wanted(memory_gib, goal)
    fitting = [
        m for m in (FineTuningMethod.FULL, FineTuningMethod.LORA, FineTuningMethod.QLORA) if needs[m] <= memory_gib
    ]
    method = wanted if wanted in fitting else fitting[0] if wanted is FineTuningMethod.FULL else fitting[-1]
    if method is not wanted:
        reasons.append(f"{wanted} would need {needs[wanted]:.1f} GiB of {memory_gib:g}")
    if rows is not None:
        reasons += _on_rows(parameters, rows)
    return Recommendation(method, _settings(method, goal), needs[method], tuple(reasons))


def memory_needed(method: FineTuningMethod, parameters: float) -> float:
    """GiB for weights, gradients and optimizer state in mixed precision, with a quarter on top for activations.

    Full: 2 (bf16 weights) + 2 (gradients) + 12 (fp32 master weights and two moments) bytes a weight. LoRA: 2, and
    QLoRA: 0.55 (4 bits and quantization constants) a frozen weight; adapters are taken as 1% of the weights.
    """
    adapter = 0.01 * 16
    per_weight = {
        FineTuningMethod.FULL: 16.0,
        FineTuningMethod.LORA: 2 + adapter,
        FineTuningMethod.QLORA: 0.55 + adapter,
        FineTuningMethod.PREFIX_TUNING: 2.0,
        FineTuningMethod.PROMPT_TUNING: 2.0,
    }
    return per_weight[method] * parameters * _OVERHEAD / _GIB


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


def _settings(method: FineTuningMethod, goal: Goal) -> dict[str, Any]:
    common: dict[str, Any] = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 4,
        "weight_decay": 0.01,
        "warmup_ratio": 0.1,
    }
    if method is FineTuningMethod.FULL:
        return {"method": method, "learning_rate": 2e-5, **common}
    rank = {"slight_domain_adaptation": 4, "complete_task_change": 32}.get(goal, 8)
    settings: dict[str, Any] = {
        "method": method,
        "learning_rate": 2e-4,
        **common,
        "lora_r": rank,
        "lora_alpha": 2 * rank,
    }
    settings["lora_dropout"] = 0.05
    if method is FineTuningMethod.QLORA:
        settings |= {"bits": 4, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return settings


def _on_rows(parameters: float, rows: int) -> list[str]:
    least, enough = next((low, high) for limit, low, high in _ROWS if parameters <= limit)
    if rows < least:
        return [f"{rows} rows are few: the guide wants at least {least} to {enough} for a model of this size"]
    return [f"{rows} rows are enough for a model of this size (the guide: at least {least} to {enough})"]

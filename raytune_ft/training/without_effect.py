"""Settings that change nothing beside the others, which a run says: it may be meant otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raytune_ft.training.config import FineTuningConfig, bits_of_base

_OF_LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora", "use_dora")
_OF_FOUR_BITS = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
_OF_EVALUATIONS = ("eval_generation_rows", "metric_for_best_model")
DECIDING = (
    *("method", "bits", "max_steps", "warmup_steps", "hard_loss_weight", "student_layers"),
    *("eval_strategy", "eval_generation_rows", "save_strategy", "logging_strategy"),
)
"""Settings that leave others without effect by some of their values."""


def without_effect(config: FineTuningConfig) -> dict[str, str]:
    """Names of the settings that are not their defaults and decide nothing, each with the reason."""
    return {name: why for name, why in idle_beside(dict(config)).items() if config.differs(name)}


def idle_beside(settings: Mapping[str, Any]) -> dict[str, str]:
    """Names of the settings that decide nothing beside the others of a run, each with the reason."""
    idle = {**_of_other_methods(settings), **_overridden(settings), **_of_other_moments(settings)}
    return {name: why for name, why in idle.items() if name in settings}


def _of_other_methods(settings: Mapping[str, Any]) -> dict[str, str]:
    method, idle = settings["method"], dict[str, str]()
    if method not in {"lora", "qlora"}:
        idle |= dict.fromkeys(_OF_LORA, f"belongs to method lora or qlora (got {method})")
    if method not in {"prefix_tuning", "prompt_tuning"}:
        idle["num_virtual_tokens"] = f"belongs to method prefix_tuning or prompt_tuning (got {method})"
    if bits_of_base(method, settings.get("bits")) != 4:
        idle |= dict.fromkeys(_OF_FOUR_BITS, "belongs to a base of 4 bits (method qlora)")
    return idle


def _overridden(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings in whose place another one decides."""
    idle = dict[str, str]()
    if settings.get("max_steps") is not None:
        idle["num_train_epochs"] = "is overridden by max_steps"
    if settings.get("warmup_steps") is not None:
        idle["warmup_ratio"] = "is overridden by warmup_steps"
    if settings.get("hard_loss_weight") == 1:
        idle["temperature"] = "softens what hard_loss_weight 1 gives no share"
    # A teacher that the student is made of is read all the same.
    if settings.get("student_layers") is None and settings.get("hard_loss_weight") == 1:
        idle["teacher_path"] = "teaches nothing where hard_loss_weight is 1, and is not loaded"
    return idle


def _of_other_moments(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings of what a run does between its steps, where it does not do it."""
    idle = dict[str, str]()
    for event in ("eval", "save", "logging"):
        if settings.get(f"{event}_strategy") in {"no", "epoch"}:
            idle[f"{event}_steps"] = f"belongs to {event}_strategy steps"
    if settings.get("eval_generation_rows") == 0:
        idle["eval_generation_metric"] = "measures answers, and none are generated (eval_generation_rows 0)"
    if settings.get("eval_strategy") == "no":
        idle |= dict.fromkeys(_OF_EVALUATIONS, "needs evaluations (eval_strategy epoch or steps)")
        if "loss_type" not in settings:  # else the reference is asked in such batches, too
            idle["per_device_eval_batch_size"] = "needs evaluations (eval_strategy epoch or steps)"
    if settings.get("save_strategy") == "no":
        idle["save_total_limit"] = "needs checkpoints (save_strategy epoch or steps)"
    return idle

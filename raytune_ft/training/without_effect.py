"""Settings that change nothing beside the others, which a run says: it may be meant otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raytune_ft.training.config import FineTuningConfig, bits_of_base

OF_LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora", "use_dora")
OF_FOUR_BITS = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
_OF_EVALUATIONS = ("eval_generation_rows", "metric_for_best_model")


def without_effect(config: FineTuningConfig) -> dict[str, str]:
    """Names of the settings that are not their defaults and decide nothing, each with where they belong."""
    idle = of_other_methods(dict(config))
    if config.eval_strategy == "no":
        idle |= dict.fromkeys(_OF_EVALUATIONS, "needs evaluations (eval_strategy epoch or steps)")
    return {name: why for name, why in idle.items() if config.differs(name)}


def of_other_methods(settings: Mapping[str, Any]) -> dict[str, str]:
    """Names of the settings that the method of these has no use for, each with where it belongs."""
    method, idle = settings["method"], dict[str, str]()
    if method not in {"lora", "qlora"}:
        idle |= dict.fromkeys(OF_LORA, f"belongs to method lora or qlora (got {method})")
    if method not in {"prefix_tuning", "prompt_tuning"}:
        idle["num_virtual_tokens"] = f"belongs to method prefix_tuning or prompt_tuning (got {method})"
    if bits_of_base(method, settings.get("bits")) != 4:
        idle |= dict.fromkeys(OF_FOUR_BITS, "belongs to a base of 4 bits (method qlora)")
    return idle


def overridden(settings: Mapping[str, Any]) -> dict[str, str]:
    """Names of the settings in whose place another one of these decides, each with that one."""
    idle = dict[str, str]()
    if settings.get("max_steps") is not None:
        idle["num_train_epochs"] = "is overridden by max_steps"
    if settings.get("warmup_steps") is not None:
        idle["warmup_ratio"] = "is overridden by warmup_steps"
    if settings.get("eval_strategy") != "steps":
        idle["eval_steps"] = "belongs to eval_strategy steps"
    if settings.get("hard_loss_weight") == 1:
        idle["temperature"] = "softens what hard_loss_weight 1 gives no share"
    return idle

"""Settings that change nothing beside the others, which a run says: it may be meant otherwise."""

from __future__ import annotations

from raytune_ft.training.config import FineTuningConfig, FineTuningMethod

_LORA = (FineTuningMethod.LORA, FineTuningMethod.QLORA)
_VIRTUAL = (FineTuningMethod.PREFIX_TUNING, FineTuningMethod.PROMPT_TUNING)
OF_LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora", "use_dora")
OF_FOUR_BITS = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
_OF_EVALUATIONS = ("eval_generation_rows", "metric_for_best_model")


def without_effect(config: FineTuningConfig) -> dict[str, str]:
    """Names of the settings that are not their defaults and decide nothing, each with where they belong."""
    idle = dict[str, str]()
    if config.method not in _LORA:
        idle |= dict.fromkeys(OF_LORA, f"belongs to method lora or qlora (got {config.method})")
    if config.method not in _VIRTUAL:
        idle["num_virtual_tokens"] = f"belongs to method prefix_tuning or prompt_tuning (got {config.method})"
    if config.base_bits != 4:
        idle |= dict.fromkeys(OF_FOUR_BITS, "belongs to a base of 4 bits (method qlora)")
    if config.eval_strategy == "no":
        idle |= dict.fromkeys(_OF_EVALUATIONS, "needs evaluations (eval_strategy epoch or steps)")
    return {name: why for name, why in idle.items() if config.differs(name)}

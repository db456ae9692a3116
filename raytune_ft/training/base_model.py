"""The base model of a run as its settings want it: in which number format, quantized or not."""

from __future__ import annotations

import logging
from typing import Any

import torch

from raytune_ft.core.errors import ModelError
from raytune_ft.models.kernels import use_liger
from raytune_ft.models.loading import UNREADABLE, load_tokenizer, model_problem, quiet_transformers, torch_dtype
from raytune_ft.models.references import refuse_scorer, resolve_model
from raytune_ft.models.rewarding import load_scorer
from raytune_ft.training.config import FineTuningConfig
from raytune_ft.training.config_alignment import RewardConfig

logger = logging.getLogger("raytune_ft")


def load_base(config: FineTuningConfig, device: str, *, int8_threshold: float = 6.0) -> Any:
    """The base model as the settings want it (quantized, where they say so), without an adapter.

    Args:
        config: the run's settings.
        device: where it is put.
        int8_threshold: with 8 bits, columns with an activation above it are not quantized; 0 quantizes all, and then
            a row's result does not depend on the rows beside it.

    Raises:
        ModelError: if it cannot be loaded, is an adapter, or has no Liger kernels where the settings insist on them.
    """
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    quiet_transformers()
    resolved = resolve_model(config.model_path)
    if resolved.adapter is not None:
        raise ModelError(
            f"{config.model_path}: is an adapter; give its base as model_path and it as adapter_path, to go on from "
            "it, or merge it first (raytune-ft merge)"
        )
    dtype = torch_dtype(config.precision, device)
    options: dict[str, Any] = {
        "dtype": dtype,
        "device_map": None if is_deepspeed_zero3_enabled() else {"": device},  # DeepSpeed places shards itself
        "quantization_config": _quantization(config, dtype, int8_threshold),
    }
    if isinstance(config, RewardConfig):
        torch.manual_seed(config.seed)  # of a new head
        model = load_scorer(resolved.base, load_tokenizer(config.model_path), options)
    else:
        refuse_scorer(resolved)
        model = _load_writer(resolved.base, options)
    if config.base_bits == 4:
        _keep_differentiable(model)
    use_liger(model, device, wanted=config.use_liger_kernel)
    return model


def _load_writer(base: str, options: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            base,
            config=_without_attention_dropout(base, AutoConfig.from_pretrained(base, trust_remote_code=False)),
            trust_remote_code=False,
            use_safetensors=True,
            **options,
        )
    except UNREADABLE as error:
        raise ModelError(model_problem(base, error)) from None


_ATTENTION_DROPOUT = ("attn_pdrop", "attention_dropout", "attention_probs_dropout_prob")


def _without_attention_dropout(base: str, settings: Any) -> Any:
    """The model's configuration without a dropout of attention weights, which padding-free attention does not have."""
    inner = settings.get_text_config()
    names = [name for name in _ATTENTION_DROPOUT if getattr(inner, name, 0)]
    for name in names:
        logger.warning(
            "%s: %s is %g in its configuration, and 0 here: attention of padding-free batches has no dropout. "
            "lora_dropout is there as before",
            base,
            name,
            getattr(inner, name),
        )
        setattr(inner, name, 0.0)
    return settings


def _keep_differentiable(model: Any) -> None:
    """Keeps bitsandbytes from packing 4-bit weights for CPU inference, which it does at the first evaluation.

    The packed layers have no backward pass: training would go on from there with wrong gradients.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _quantization(config: FineTuningConfig, dtype: torch.dtype, int8_threshold: float) -> Any:
    if config.base_bits is None:
        return None
    from transformers import BitsAndBytesConfig

    whole: dict[str, Any] = {"llm_int8_skip_modules": ["score"]} if isinstance(config, RewardConfig) else {}
    if config.base_bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=int8_threshold, **whole)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=config.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=dtype,
        **whole,
    )

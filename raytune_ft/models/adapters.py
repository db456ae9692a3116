"""LoRA adapters: put upon a model, saved as PEFT folders, and merged in full precision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from raytune_ft.core.errors import ModelError
from raytune_ft.models.config import Precision
from raytune_ft.models.loading import load_model, resolve_model

_PROMPT_METHODS = {"PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING"}
ALL_LINEAR = "all-linear"


def add_lora(
    model: Any,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    target_modules: list[str] | str,
    seed: int,
    base: str,
    use_rslora: bool = False,
) -> Any:
    """A PEFT model with a new LoRA adapter upon `model`; only the adapter is trainable.

    Args:
        model: a transformers causal language model; it is changed in place.
        rank: rank of the two factors.
        alpha: the product is scaled by alpha / rank.
        dropout: share of the adapter's inputs set to zero while training.
        target_modules: names of linear layers, or ``all-linear``.
        seed: of the initial values (PEFT's own initialization).
        base: what the saved adapter names as its base model.
        use_rslora: scales by alpha / sqrt(rank) instead.

    Raises:
        ModelError: if no layer has one of the names.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
        use_rslora=use_rslora,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )
    torch.manual_seed(seed)
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        linear = sorted(
            {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        )
        raise ModelError(
            f"lora_target_modules: {target_modules} fit no layer of this model; its linear layers are "
            f"{', '.join(linear)} ({str(error).splitlines()[0]})"
        ) from None
    adapted.peft_config["default"].base_model_name_or_path = base
    return adapted


def save_adapter(model: Any, tokenizer: Any, folder: Path, *, state: dict[str, torch.Tensor] | None = None) -> None:
    """Saves the adapter (from `state`, if given) with the tokenizer and chat template as a PEFT folder."""
    model.save_pretrained(folder, state_dict=state, safe_serialization=True, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card says nothing
    tokenizer.save_pretrained(folder)


def merge_adapter(reference: str, folder: Path) -> None:
    """Writes the model of an adapter folder with the adapter merged into its weights, in fp32.

    A model without an adapter is copied as it is. The result is a Hugging Face folder with tokenizer and template.

    Raises:
        ModelError: for prompt methods (they have no merge), or if the merged model answers otherwise.
    """
    resolved = resolve_model(reference)
    if resolved.adapter is not None:
        kind = json.loads((resolved.adapter / "adapter_config.json").read_text(encoding="utf-8")).get("peft_type")
        if kind in _PROMPT_METHODS:
            raise ModelError(
                f"{reference}: {kind} adds virtual tokens, not weights, and cannot be merged; serve the adapter"
            )
    loaded = load_model(reference, precision=Precision.FP32, device="cpu")
    model = loaded.model
    if resolved.adapter is not None:
        probe = torch.arange(1, 9).unsqueeze(0) % model.config.vocab_size
        with torch.no_grad():
            before = model(probe).logits
            model = model.merge_and_unload()
            after = model(probe).logits
        drift = float((before - after).abs().max() / before.abs().max())
        if not drift < 1e-3:
            raise ModelError(
                f"{reference}: the merged model's logits differ from the adapter's by {drift:.1e} of their size"
            )
    model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)

"""The frozen model that all trials of a bank share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from raytune_ft.core.errors import ModelError
from raytune_ft.models.attention import SEGMENTS, use_attention
from raytune_ft.models.loading import load_tokenizer
from raytune_ft.models.probe import check_computation
from raytune_ft.models.references import resolve_model
from raytune_ft.models.scoring import check_embeddings
from raytune_ft.training.bank.refusal import rows_interact, why_not_packed
from raytune_ft.training.base_model import load_base
from raytune_ft.training.config import FineTuningConfig


@dataclass(frozen=True)
class FrozenBase:
    """A causal language model with segment attention, none of whose weights is trained.

    `name` is what saved adapters name as their base model.
    """

    model: Any
    tokenizer: Any
    name: str

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = next(self.model.parameters()).device
        return device


def frozen_base(model: Any, tokenizer: Any, name: str) -> FrozenBase:
    """Freezes `model`, in place, once it is known that rows laid side by side don't touch each other in it.

    Raises:
        ModelError: naming why trials cannot share it.
    """
    reason = why_not_packed(model)
    if reason is None:
        check_computation(model)
        model.requires_grad_(False)
        use_attention(model, SEGMENTS)
        if rows_interact(model.eval()):
            reason = f"{type(model).__name__}: a row's hidden states change with the rows beside it"
    if reason is not None:
        raise ModelError(f"{reason}; train these trials one at a time (packed: never)")
    return FrozenBase(model, tokenizer, name)


def load_frozen_base(config: FineTuningConfig, device: str) -> FrozenBase:
    """The base of `config` in its number format; with 8 bits no outliers are looked for, since that joins rows.

    Raises:
        ModelError: if it cannot be loaded, or trials cannot share it.
    """
    model = load_base(config, device, int8_threshold=0.0)
    tokenizer = load_tokenizer(config.model_path)
    check_embeddings(model, tokenizer, f"{config.model_path}: its tokenizer")
    return frozen_base(model, tokenizer, resolve_model(config.model_path).base)

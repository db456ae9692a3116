"""Bases on which trials cannot share a batch, because a row's result depends on the rows beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from raytune_ft.core.errors import ModelError
from raytune_ft.models.attention import takes_segments
from raytune_ft.models.neighbours import carried_state
from raytune_ft.models.scoring import CausalParts

_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_HEADS_ONLY = ("classifier", "summary")


def why_not_packed(model: Any) -> str | None:
    """Why trials on this base cannot be trained in one padding-free batch; None if they can."""
    name = type(model).__name__
    try:
        CausalParts.of(model)
    except ModelError as error:
        return str(error)
    if not getattr(model, "_supports_attention_backend", False) or not takes_segments(model):
        return f"{name}: computes its attention past transformers' attention registry, so segments cannot be kept apart"
    for reason in (_experts(model), carried_state(model), _dropout(model), _outliers(model)):
        if reason is not None:
            return f"{name}: {reason}"
    return None


def _experts(model: Any) -> str | None:
    for key in _EXPERT_COUNTS:
        count = getattr(model.config.get_text_config(), key, None)
        if isinstance(count, int) and count > 1:
            return f"is a mixture of {count} experts, whose auxiliary loss and routing join the rows of a batch"
    return None


def _dropout(model: Any) -> str | None:
    for key, value in model.config.get_text_config().to_dict().items():
        named = key.endswith(("dropout", "pdrop", "dropout_prob", "layerdrop")) and not key.startswith(_HEADS_ONLY)
        if named and isinstance(value, float) and value > 0:
            return f"has dropout of its own ({key} = {value}), drawn from one stream for all rows; set it to 0"
    for path, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            return f"has dropout of its own ({path}: {module.p}), drawn from one stream for all rows; set it to 0"
    return None


def _outliers(model: Any) -> str | None:
    for path, module in model.named_modules():
        threshold = getattr(getattr(module, "state", None), "threshold", 0.0)
        if type(module).__name__ == "Linear8bitLt" and threshold > 0:
            return (
                f"int8 layer {path} looks for outliers over all rows (llm_int8_threshold = {threshold}); "
                "load it with llm_int8_threshold 0"
            )
    return None


@torch.no_grad()
def rows_interact(model: Any, *, rows: int = 3, length: int = 5) -> bool:
    """Whether a row's hidden states change when other rows are laid beside it, seen on a few made-up tokens.

    Args:
        model: its attention must be ``segments``, and it must not be training.
        rows: rows laid end to end; each is also computed alone.
        length: tokens of a row.
    """
    decoder = CausalParts.of(model).decoder
    device = next(model.parameters()).device
    ids = (
        torch.arange(1, rows * length + 1, device=device).view(rows, length) % model.config.get_text_config().vocab_size
    )
    positions = torch.arange(length, device=device)

    def states(some: torch.Tensor) -> torch.Tensor:
        count = len(some)
        starts = torch.arange(0, count * length + 1, length, dtype=torch.int32, device=device)
        hidden: torch.Tensor = decoder(
            input_ids=some.reshape(1, -1),
            position_ids=positions.repeat(count).unsqueeze(0),
            cu_seq_lens_q=starts,
            cu_seq_lens_k=starts,
            max_length_q=length,
            max_length_k=length,
            use_cache=False,
        ).last_hidden_state[0]
        return hidden.float()

    packed = states(ids)
    alone = torch.cat([states(row.unsqueeze(0)) for row in ids])
    size = alone.abs().max()
    tolerance = 1e-3 if next(model.parameters()).dtype == torch.float32 else 5e-2
    return not bool((packed - alone).abs().max() <= tolerance * size)

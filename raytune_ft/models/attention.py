"""Attention that knows segments: sequences laid end to end, none of which sees another.

`use_attention` registers it with transformers as ``segments``. The segments come as ``cu_seq_lens_q`` (the name that
transformers' flash-attention arguments use), so that padding-free batches need no [tokens, tokens] mask.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from raytune_ft.core.errors import ModelError
from raytune_ft.models.virtual import Prefixes

SEGMENTS = "segments"
_UNKNOWN_TO_SEGMENTS = ("softcap", "s_aux")


def segment_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    prefixes: Prefixes | None = None,
    one_segment: bool = False,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each segment.

    Args:
        module: the attention layer; its number in the model says which prefix is its.
        query: [1, heads, tokens, head size]; `key` and `value` may have fewer heads (grouped queries).
        key: as `query`.
        value: as `query`.
        attention_mask: must be None: segments need none.
        cu_seq_lens_q: [segments + 1] int32, where each segment starts, and the number of tokens.
        max_length_q: tokens of the longest segment; without it, it is asked of the device, which has to be waited for.
        scaling: factor of the scores; 1 / sqrt(head size) if None.
        dropout: of the attention weights; only 0 is taken.
        prefixes: learned keys and values before each segment, which every token of it sees (prefix tuning).
        one_segment: whether all tokens are one segment, so that no starts are needed.
        others: further arguments of the layer. `sliding_window` says how many tokens back a token sees, itself
            included; of a layer that leaves it out, its settings say so. Others that change the result are refused.

    Returns:
        [1, tokens, heads, head size], and no weights.

    Raises:
        ModelError: if the layer asks for something that segments don't know.
    """
    if one_segment:
        cu_seq_lens_q = torch.tensor([0, query.shape[2]], dtype=torch.int32, device=query.device)
    if cu_seq_lens_q is None:
        raise ModelError("attention 'segments' was called without segments; use 'sdpa' for padded batches")
    refused = [name for name in _UNKNOWN_TO_SEGMENTS if others.get(name) is not None]
    if refused or dropout:
        what = ", ".join(refused) or f"attention dropout {dropout}"
        raise ModelError(f"padding-free batches do not support {type(module).__name__} with {what}")
    window = others["sliding_window"] if "sliding_window" in others else _window_of(module)
    if prefixes is not None:
        layer: Any = module.layer_idx
        query, key, value = prefixes.before(layer, query, key, value)
        starts = prefixes.extended.cu_seq_lens
        out = _attended(query, key, value, starts, None, scaling=scaling, window=window)
        return out.index_select(1, prefixes.extended.tokens), None
    return _attended(query, key, value, cu_seq_lens_q, max_length_q, scaling=scaling, window=window), None


_WINDOW_IN_MASK = ("phimoe", "qwen2_moe", "doge")


def _window_of(module: Any) -> int | None:
    """That of a layer which leaves it to the mask, of which segments have none. Other models have no window then,
    whatever is left of one in their settings."""
    config = getattr(module, "config", None)
    if getattr(config, "model_type", None) not in _WINDOW_IN_MASK:
        return None
    kinds = getattr(config, "layer_types", None)
    if kinds and kinds[module.layer_idx] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None) or None


def _attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    longest: int | None,
    *,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        return _varlen(query, key, value, starts, longest or _longest(starts), scaling=scaling, window=window)
    return _per_segment(query, key, value, starts, scaling=scaling, window=window)


def _per_segment(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, *, scaling: float | None, window: int | None
) -> Tensor:
    # Split, not sliced: the backward pass of a slice fills a gradient of full size, that of a split joins the parts.
    lengths = (starts[1:] - starts[:-1]).tolist()
    grouped = query.shape[1] != key.shape[1]
    segments = zip(*(torch.split(whole, lengths, dim=2) for whole in (query, key, value)), strict=True)
    outputs = [
        F.scaled_dot_product_attention(
            q, k, v, attn_mask=_band(q, window), is_causal=window is None, scale=scaling, enable_gqa=grouped
        )
        for q, k, v in segments
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def _band(query: Tensor, window: int | None) -> Tensor | None:
    """[tokens, tokens], true where a token sees another: itself and up to `window` - 1 before it; None without one."""
    if window is None:
        return None
    places = torch.arange(query.shape[2], device=query.device)
    ago = places[:, None] - places
    return (ago >= 0) & (ago < window)


def _longest(starts: Tensor) -> int:
    return int((starts[1:] - starts[:-1]).max())


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    longest: int,
    *,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    from torch.nn.attention import varlen

    attend: Any = varlen.varlen_attn  # its arguments change between torch 2.11 and 2.13
    tokens = [x.squeeze(0).transpose(0, 1) for x in (query, key, value)]  # [tokens, heads, head size]
    more: dict[str, Any] = {"window_size": (-1 if window is None else window - 1, 0)}
    if query.shape[1] != key.shape[1] and _has_flag_of_groups():
        more["enable_gqa"] = True
    out: Tensor = attend(*tokens, starts, starts, longest, longest, scale=scaling, **more)
    return out.unsqueeze(0)


@cache
def _has_flag_of_groups() -> bool:
    """Whether grouped queries have to be asked for; torch 2.11 has no such flag, and takes fewer heads as they are."""
    from torch.nn.attention import varlen

    return "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters


def use_attention(model: Any, name: str) -> None:
    """Switches a transformers model (or a PEFT model around one) to a registered attention."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(SEGMENTS, segment_attention)
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    if causal.config._attn_implementation != name:
        causal.set_attn_implementation(name)


@contextmanager
def attention(model: Any, name: str) -> Iterator[None]:
    """Within the block, `model` computes with the attention `name`; afterwards with its former one."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = causal.config._attn_implementation
    use_attention(model, name)
    try:
        yield
    finally:
        use_attention(model, before)

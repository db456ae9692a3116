"""Attention that knows segments: sequences laid end to end, none of which sees another.

`use_attention` registers it with transformers as ``segments``. The segments come as ``cu_seq_lens_q`` (the name that
transformers' flash-attention arguments use), so that padding-free batches need no [tokens, tokens] mask.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from raytune_ft.core.errors import ModelError
from raytune_ft.models.memory import is_out_of_memory
from raytune_ft.models.virtual import Prefixes

SEGMENTS = "segments"


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
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each segment.

    Args:
        module: the attention layer; its number in the model says which prefix is its.
        query: [1, heads, tokens, head size]; `key` and `value` may have fewer heads (grouped queries).
        key: as `query`.
        value: as `query`.
        attention_mask: must be None: segments need none, and a mask that a layer makes itself is not known to them.
        cu_seq_lens_q: [segments + 1] int32, where each segment starts, and the number of tokens.
        max_length_q: tokens of the longest segment; without it, it is asked of the device, which has to be waited for.
        scaling: factor of the scores; 1 / sqrt(head size) if None.
        dropout: of the attention weights; only 0 is taken.
        prefixes: learned keys and values before each segment, which every token of it sees (prefix tuning).
        one_segment: whether all tokens are one segment, so that no starts are needed.
        softcap: bound of the scores, which a tangent bends towards it (Gemma 2: arXiv:2408.00118).
        s_aux: [heads] a score that takes part in each softmax, and has no value (attention sinks, as in gpt-oss).
        others: further arguments of the layer. `sliding_window` says how many tokens back a token sees, itself
            included; of a layer that leaves it out, its settings say so.

    Returns:
        [1, tokens, heads, head size], and no weights.

    Raises:
        ModelError: if the layer asks for something that segments don't know.
    """
    if one_segment:
        max_length_q = query.shape[2]
        cu_seq_lens_q = torch.arange(0, max_length_q + 1, max_length_q, dtype=torch.int32, device=query.device)
    if cu_seq_lens_q is None:
        raise ModelError("attention 'segments' was called without segments; use 'sdpa' for padded batches")
    if attention_mask is not None or dropout:
        what = f"attention dropout {dropout}" if dropout else "a mask of its own"
        raise ModelError(f"padding-free batches do not support {type(module).__name__} with {what}")
    bend = _Bend(softcap, s_aux)
    window = others["sliding_window"] if "sliding_window" in others else _window_of(module)
    if prefixes is not None:
        layer: Any = module.layer_idx
        query, key, value = prefixes.before(layer, query, key, value)
        longer = prefixes.extended
        out = _attended(
            query, key, value, longer.cu_seq_lens, longer.longest, scaling=scaling, window=window, bend=bend
        )
        return out.index_select(1, longer.tokens), None
    return _attended(query, key, value, cu_seq_lens_q, max_length_q, scaling=scaling, window=window, bend=bend), None


@dataclass(frozen=True)
class _Bend:
    """What a layer does to its scores that fused kernels do not know; see `segment_attention`."""

    softcap: float | None
    sinks: Tensor | None

    def __bool__(self) -> bool:
        return self.softcap is not None or self.sinks is not None


_WINDOW_IN_MASK = ("phimoe", "qwen2_moe")


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
    bend: _Bend,
) -> Tensor:
    if bend:
        return _bent(query, key, value, starts, scaling=scaling, window=window, bend=bend)
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
            q,
            k,
            v,
            attn_mask=None if window is None else _band(q, window),
            is_causal=window is None,
            scale=scaling,
            enable_gqa=grouped,
        )
        for q, k, v in segments
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def _bent(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, *, scaling: float | None, window: int | None, bend: _Bend
) -> Tensor:
    """As `_per_segment`, with the scores of a segment, [heads, tokens, tokens], in memory."""
    lengths = (starts[1:] - starts[:-1]).tolist()
    groups = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    outputs = []
    for q, k, v in zip(*(torch.split(whole, lengths, dim=2) for whole in (query, key, value)), strict=True):
        k, v = (part.repeat_interleave(groups, dim=1) for part in (k, v))  # noqa: PLW2901 - of the same segment
        scores = (q @ k.transpose(2, 3)).float() * scale
        if bend.softcap is not None:
            scores = bend.softcap * torch.tanh(scores / bend.softcap)
        seen = _band(q, q.shape[2] if window is None else window)
        scores = scores.masked_fill(~seen, -torch.inf)
        if bend.sinks is not None:
            sinks = bend.sinks.float().reshape(1, -1, 1, 1).expand(len(scores), -1, scores.shape[2], -1)
            weights = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        outputs.append(weights.to(v.dtype) @ v)
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def _band(query: Tensor, window: int) -> Tensor:
    """[tokens, tokens], true where a token sees another: itself and up to `window` - 1 before it."""
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


OWN = "own"
"""In place of a name: what transformers takes by itself, PyTorch's fused attention where the model knows it."""


def without_adapter(model: Any) -> Any:
    """A transformers model, or the one that PEFT has put an adapter upon."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def use_attention(model: Any, name: str) -> None:
    """Switches a transformers model (or a PEFT model around one) to a registered attention.

    One that does not follow segments (`takes_segments`) keeps its own.
    """
    causal = without_adapter(model)
    _switch(causal, OWN if name == SEGMENTS and not takes_segments(causal) else name)


def _switch(causal: Any, name: str) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(SEGMENTS, segment_attention)
    if name == OWN:
        name = "sdpa" if causal._supports_sdpa else "eager"
    if causal.config._attn_implementation != name:
        causal.set_attn_implementation(name)


@contextmanager
def attention(model: Any, name: str) -> Iterator[None]:
    """Within the block, `model` computes with the attention `name`; afterwards with its former one."""
    causal = without_adapter(model)
    before = causal.config._attn_implementation
    use_attention(model, name)
    try:
        yield
    finally:
        _switch(causal, before)


_TAKEN: WeakKeyDictionary[torch.nn.Module, bool] = WeakKeyDictionary()


def takes_segments(model: Any) -> bool:
    """Whether the attention of a causal language model (or its decoder) follows segments, as most do.

    A model is asked once, with a few made-up tokens: there are such as compute attention past transformers' registry,
    or need a mask for more than that. Where no answer would count (`can_be_asked`), what the model's class says does.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    if decoder not in _TAKEN:
        if not hasattr(decoder, "config"):
            return False  # no decoder, but some layer of that name
        said = bool(getattr(decoder, "_supports_attention_backend", False))
        _TAKEN[decoder] = _follows_segments(decoder) if can_be_asked(decoder) else said
    return _TAKEN[decoder]


def can_be_asked(model: Any) -> bool:
    """Whether a few tokens tell how a model computes.

    Not where its weights are spread over workers (ZeRO 3), nor where they are quantized, which makes noise of its own:
    int8 layers look at all rows of a batch for outliers.
    """
    spread = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    return not spread and getattr(model.config, "quantization_config", None) is None


def tolerance(model: Any) -> float:
    """By how much what two ways of computing the same come to may differ, relative to its size."""
    return 1e-3 if model.dtype == torch.float32 else 1e-1


@torch.no_grad()
def _follows_segments(decoder: Any, rows: int = 3, length: int = 5) -> bool:
    device = next(decoder.parameters()).device
    ids = torch.arange(1, rows * length + 1, device=device).view(rows, length) % decoder.config.vocab_size
    starts = torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=device)
    places = torch.arange(length, device=device).repeat(rows)[None]
    lengths = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": length, "max_length_k": length}
    before, training = decoder.config._attn_implementation, decoder.training
    decoder.eval()
    try:
        _switch(decoder, OWN)
        alone = torch.cat([decoder(input_ids=row[None], use_cache=False).last_hidden_state[0] for row in ids]).float()
        _switch(decoder, SEGMENTS)
        found = decoder(input_ids=ids.view(1, -1), position_ids=places, use_cache=False, **lengths)
    except (ModelError, TypeError, ValueError, IndexError, AttributeError, NotImplementedError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        return False
    finally:
        _switch(decoder, before)
        decoder.train(training)
    apart = (found.last_hidden_state[0].float() - alone).norm(dim=-1) / alone.norm(dim=-1)
    return bool(apart.median() < tolerance(decoder))

"""Models in which a row's result would depend on the rows beside it, and what is done so that it does not.

A state that layers carry along a sequence (state-space layers, convolutions, linear attention) would go from one row
into the next: such a model computes each row alone. Two sets of rotary factors, of which transformers takes one for a
whole batch by its longest row (longrope: Ding et al., 2024, arXiv:2402.13753), are chosen for each row here.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from raytune_ft.models.attention import takes_segments, without_adapter
from raytune_ft.models.loading import LoadedModel

logger = logging.getLogger("raytune_ft")

_RECURRENT = re.compile(r"(?i:mamba|rwkv|linearattention|deltanet|recurrent|retention)|SSM|Ssm(?![a-z])")
"""In names of classes; GptOssMLP is none."""
_BESIDE = ("audio", "vision")
"""In names of towers beside the decoder, which see no rows of text."""
_RECURRENT_LAYERS = ("linear_attention", "mamba", "recurrent", "conv", "ssm")


def carried_state(model: Any) -> str | None:
    """What in a model, or the decoder of one, carries state along a sequence, in words; None if nothing does."""
    settings = model.config.get_text_config() if hasattr(model, "config") else None
    kinds = set(getattr(settings, "layer_types", None) or ())
    found = sorted(kind for kind in kinds if any(word in str(kind) for word in _RECURRENT_LAYERS))
    if found:
        return f"has {', '.join(found)} layers, which carry state from one row into the next"
    for name, module in model.named_modules():
        kind = type(module).__name__
        if any(word in name for word in _BESIDE):
            continue
        if isinstance(module, nn.Conv1d | nn.RNNBase) or _RECURRENT.search(kind):
            return (
                f"has a {kind} layer (state-space, linear attention or convolution), which carries state between rows"
            )
    if getattr(model, "_is_stateful", False):
        return "keeps a state of its own beside keys and values, which joins the rows of a batch"
    return None


_KNOW_PADDING = ("stablelm", "llama4_text")
"""Models that know no rows laid end to end, but padded ones, and keep nothing but keys and values."""

_ALONE: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()


def why_alone(model: Any) -> str | None:
    """Why the rows of a causal language model (or of its decoder) are computed one at a time; None if they are not.

    A model is looked at once, and it is said in the log once.
    """
    decoder = _decoder(model)
    if decoder not in _ALONE:
        _ALONE[decoder] = carried_state(decoder) or _by_the_longest(decoder) or _past_the_registry(decoder)
        if _ALONE[decoder] is not None:
            logger.info(
                "%s: %s; its rows are computed one at a time, which is slower", type(decoder).__name__, _ALONE[decoder]
            )
    return _ALONE[decoder]


def _by_the_longest(decoder: nn.Module) -> str | None:
    if dynamic_rotaries(decoder):
        return "chooses rotary factors by the longest of a batch's rows (dynamic)"
    return None


def dynamic_rotaries(decoder: nn.Module) -> list[Any]:
    """Rotary embeddings that grow with the longest row so far; with `max_seq_len_cached` at 0 they forget it."""
    return [module for module in decoder.modules() if getattr(module, "rope_type", None) == "dynamic"]


def _past_the_registry(decoder: nn.Module) -> str | None:
    if takes_segments(decoder):
        return None
    return "computes attention in a way of its own, which knows no rows laid end to end"


def why_answered_alone(model: Any) -> str | None:
    """Why the prompts of a causal language model are answered one at a time; None if they are not."""
    reason = why_alone(model)
    decoder: Any = _decoder(model)
    if reason is None or carried_state(decoder) is not None:
        return reason
    knows_padding = _by_the_longest(decoder) is not None or decoder.config.model_type in _KNOW_PADDING
    return None if knows_padding else reason


def _decoder(model: Any) -> nn.Module:
    causal = without_adapter(model)
    found: nn.Module = causal.get_decoder() if hasattr(causal, "get_decoder") else causal
    return found


def generate_alone(
    loaded: LoadedModel, prompt: Sequence[int], stop_ids: Sequence[int], max_new_tokens: int, **options: Any
) -> Any:
    """What transformers' own loop gives for one prompt: for models that keep more than keys and values.

    Args:
        loaded: the model.
        prompt: token ids.
        stop_ids: tokens that end the answer; with none, it is as long as may be.
        max_new_tokens: most tokens of the answer.
        options: of transformers' ``generate``; greedy by default.
    """
    stops, pad = list(stop_ids), loaded.tokenizer.pad_token_id
    ids = torch.tensor([list(prompt)], device=loaded.device)
    return loaded.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        eos_token_id=stops or [-1],  # None would be those of its own settings
        pad_token_id=pad if pad is not None else (stops or [0])[0],
        use_cache=True,
        **{"do_sample": False, **options},
    )


_ROTARIES: WeakKeyDictionary[nn.Module, tuple[Any, ...]] = WeakKeyDictionary()


def long_from(model: Any) -> int | None:
    """The number of tokens up to which a row has the short factors of longrope; None without longrope."""
    found = _rotaries(_decoder(model))
    return _limit(found[0]) if found else None


@contextmanager
def factors_by_row(model: Any, ends: Tensor) -> Iterator[None]:
    """Within the block, each place of a longrope model has the factors of its own row; other models are left alone.

    Args:
        model: a causal language model, or its decoder.
        ends: [rows, 1], or [1, tokens] of rows laid end to end: how many tokens the row at each place has in all.
    """
    with ExitStack() as stack:
        for rotary in _rotaries(_decoder(model)):
            stack.enter_context(_computes(rotary, partial(_both, rotary.forward, ends, _limit(rotary))))
        yield


@contextmanager
def _computes(module: Any, forward: Any) -> Iterator[None]:
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:  # a hook of accelerate's
            module.forward = before


def _both(usual: Any, ends: Tensor, limit: int, x: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
    """Sines and cosines with the factors of each row: transformers looks at the highest position of a call."""
    short = usual(x, position_ids.clamp_max(limit - 1))
    beyond = torch.full_like(position_ids[:, :1], limit)
    long = (part[:, :-1] for part in usual(x, torch.cat([position_ids, beyond], dim=1)))
    is_long = (ends > limit)[..., None]
    return tuple(torch.where(is_long, *parts) for parts in zip(long, short, strict=True))


def _rotaries(decoder: nn.Module) -> tuple[Any, ...]:
    if decoder not in _ROTARIES:
        _ROTARIES[decoder] = tuple(m for m in decoder.modules() if getattr(m, "rope_type", None) == "longrope")
    return _ROTARIES[decoder]


def _limit(rotary: Any) -> int:
    return int(rotary.config.rope_parameters["original_max_position_embeddings"])

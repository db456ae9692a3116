"""Whether padding-free computation gives what a model itself computes: asked of each model once, on a few tokens."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from raytune_ft.core.errors import ModelError, first_line
from raytune_ft.models.attention import OWN, SEGMENTS, attention, can_be_asked, tolerance, without_adapter
from raytune_ft.models.chat import Encoded
from raytune_ft.models.collate import pack
from raytune_ft.models.memory import is_out_of_memory
from raytune_ft.models.scoring import CausalParts, target_states

_LENGTHS = (7, 4, 9)
"""Tokens of the rows that are compared."""
_FOUND: WeakSet[nn.Module] = WeakSet()


def check_computation(model: Any) -> None:
    """Compares a causal language model's own log-probabilities of a few rows with those of rows laid end to end.

    Tells models that place tokens, or change their logits, in a way of their own, and encoders, whose tokens see what
    comes after them. Most tokens have to agree, as experts may be chosen by a hair. Models that cannot be
    asked (`can_be_asked`) are taken as they are.

    Raises:
        ModelError: if they differ, or cannot be computed.
    """
    causal = without_adapter(model)
    if causal in _FOUND or not can_be_asked(causal):
        return
    name, training = type(causal).__name__, causal.training
    causal.eval()
    try:
        apart, ahead = _apart(causal), _looks_ahead(causal)
    except (TypeError, ValueError, IndexError, AttributeError, NotImplementedError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(f"{name}: cannot be computed padding-free: {first_line(error)}") from None
    finally:
        causal.train(training)
    if ahead:
        raise ModelError(
            f"{name}: its tokens see those that come after them, so it is no causal language model (an encoder, say); "
            "take one that writes text"
        )
    if not apart < tolerance(causal):
        raise ModelError(
            f"{name}: padding-free rows come to other log-probabilities than the model's own (a median difference of "
            f"{apart:.2g}): it places tokens, or changes its logits, in a way of its own; take another model"
        )
    _FOUND.add(causal)


@torch.no_grad()
def _apart(causal: Any) -> float:
    """The median of the tokens' distances, each relative to how far its log-probabilities are from even."""
    parts = CausalParts.of(causal)
    device, vocabulary = next(causal.parameters()).device, causal.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(1, sum(_LENGTHS) + 1) * 7919 % vocabulary).tolist()  # far apart, and not all special
    rows = [ids[sum(_LENGTHS[:number]) :][:length] for number, length in enumerate(_LENGTHS)]
    with attention(causal, OWN):
        own = [causal(input_ids=torch.tensor([row], device=device), use_cache=False).logits[0, :-1] for row in rows]
    with attention(causal, SEGMENTS):
        batch = pack([Encoded(row, [True] * len(row)) for row in rows]).to(device)
        found = parts.head(target_states(parts, batch))
    wanted, found = _even_out(torch.cat(own)), _even_out(found)
    distances = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp_min(1e-12)
    return float(distances.median())


@torch.no_grad()
def _looks_ahead(causal: Any) -> bool:
    """Whether what is said of a row changes with a token that follows."""
    device, vocabulary = next(causal.parameters()).device, causal.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(1, max(_LENGTHS) + 1, device=device) * 7919 % vocabulary).repeat(2, 1)
    ids[1, -1] = (ids[1, -1] + vocabulary // 2) % vocabulary
    with attention(causal, OWN):
        one, other = (_even_out(causal(input_ids=row[None], use_cache=False).logits[0, :-1]) for row in ids)
    return float(((one - other).norm(dim=-1) / one.norm(dim=-1).clamp_min(1e-12)).median()) > tolerance(causal)


def _even_out(logits: Tensor) -> Tensor:
    logits = logits.float()
    return logits - logits.mean(dim=-1, keepdim=True)

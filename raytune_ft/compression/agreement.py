"""A sanity figure: how far a smaller model's next-token distributions lie from its source's, on one fixed text.

It catches a broken conversion. Quality on the user's own rows is what evaluation measures.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch

from raytune_ft.core.errors import RunError

TEXT = """The harbour opens before sunrise. Two boats leave at five, and a third one follows when the fog has lifted.
Question: a crate holds 12 lamps, and 7 crates arrive. How many lamps are there? Answer: 12 * 7 = 84 lamps.
{"name": "Ana Ruiz", "city": "Porto", "items": [{"sku": "B-204", "count": 3}], "express": true}
def area(width, height): return width * height
Dear team, please send the invoice to the new address by Friday. Thank you very much, and kind regards."""
"""Prose, arithmetic, JSON, code and a letter: what small models are asked for."""

MAX_TOKENS = 256


@dataclass(frozen=True)
class Agreement:
    """How alike two models' next-token distributions are over `tokens` positions.

    `top1` is the share of positions where both rank the same token first; `kl` the mean of KL(source || smaller) in
    nats.
    """

    tokens: int
    top1: float
    kl: float


def text_ids(tokenizer: Any, context_tokens: int | None) -> list[int]:
    """The fixed text as token ids, at most `MAX_TOKENS` and the model's context."""
    ids: list[int] = tokenizer(TEXT)["input_ids"]
    return ids[: min(MAX_TOKENS, context_tokens or MAX_TOKENS)]


@torch.no_grad()
def next_token_logits(model: Any, ids: list[int]) -> torch.Tensor:
    """The model's logits after each token, float32 on the CPU, [tokens, vocabulary].

    Raises:
        RunError: if they are not finite, which means that the weights are broken.
    """
    # bitsandbytes' int8 layers warn at each call that they cast their input to fp16
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    batch = torch.tensor([ids], device=model.device)
    logits: torch.Tensor = model.eval()(input_ids=batch, use_cache=False).logits[0].float().cpu()
    if not torch.isfinite(logits).all():
        raise RunError("the model's outputs are not finite (NaN or infinity): its weights are broken")
    return logits


def compare(source: torch.Tensor, smaller: torch.Tensor) -> Agreement:
    """The agreement of two logit tensors of the same shape, [tokens, vocabulary]."""
    expected, got = source.log_softmax(-1), smaller.log_softmax(-1)
    kl = (expected.exp() * (expected - got)).sum(-1).mean()
    top1 = (source.argmax(-1) == smaller.argmax(-1)).float().mean()
    return Agreement(tokens=len(source), top1=float(top1), kl=max(0.0, float(kl)))

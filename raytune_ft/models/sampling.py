"""Next tokens from logits: each row by its own temperature, nucleus and random stream."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raytune_ft.models.config import DecodingConfig


@dataclass(frozen=True)
class TokenLogprob:
    """A token with its log-probability under the model (before temperature), and the likeliest ones, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses the tokens of one answer; what it draws depends on its seed alone, not on other answers."""

    def __init__(self, decoding: DecodingConfig, device: str) -> None:
        # Below a millionth only equals are drawn from, and float32 would soon divide by zero; and a nucleus is the
        # likeliest token alone, where float32 would soon leave none.
        self._temperature, self._top_p = max(decoding.temperature, 1e-6), max(decoding.top_p, 1e-6)
        self._generator = None
        if decoding.temperature > 0:
            self._generator = torch.Generator(device).manual_seed(decoding.seed)

    @property
    def greedy(self) -> bool:
        """Whether it takes the likeliest token."""
        return self._generator is None

    def draw(self, logits: Tensor) -> int:
        """A token from [vocabulary] logits."""
        if self._generator is None:
            return int(logits.argmax())
        probabilities = torch.softmax((logits.float() - logits.max()) / self._temperature, dim=-1)
        if self._top_p < 1:
            ranked, places = probabilities.sort(descending=True)
            ranked[ranked.cumsum(-1) - ranked >= self._top_p] = 0.0  # the likeliest always stays
            return int(places[torch.multinomial(ranked, 1, generator=self._generator)])
        return int(torch.multinomial(probabilities, 1, generator=self._generator))


def logprobs_of(logits: Tensor, tokens: Tensor, top: int) -> list[TokenLogprob]:
    """Log-probabilities of [n] tokens by [n, vocabulary] logits, with the `top` likeliest of each place."""
    scores = torch.log_softmax(logits.float(), dim=-1)
    own = scores.gather(1, tokens[:, None])[:, 0].tolist()
    best = scores.topk(min(top, scores.shape[1]), dim=-1)
    values, places = best.values.tolist(), best.indices.tolist()
    return [
        TokenLogprob(token, logprob, tuple(zip(place, value, strict=True)))
        for token, logprob, place, value in zip(tokens.tolist(), own, places, values, strict=True)
    ]

"""Answers as the engine decodes them: each ends by its own model's tokens, and fails without its neighbours."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from raytune_ft.models.decoding import Row
from raytune_ft.models.sampling import Sampler


class CheckedSampler(Sampler):
    """Notes where the model gives no numbers, instead of an error that would end the step of all rows."""

    failed = False

    def draw(self, logits: Tensor) -> int:
        """As `Sampler.draw`; any token where `failed` is set."""
        if not torch.isfinite(logits.max()):
            self.failed = True
            return 0
        return super().draw(logits)


@dataclass
class ServedRow(Row):
    """A row with the tokens that end its answer: those of its adapter's template, where that has one of its own."""

    stop_ids: frozenset[int] = frozenset()

    def push(self, token: int, stop_ids: frozenset[int]) -> None:
        """Takes the next token; the row's own `stop_ids` end it."""
        return super().push(token, self.stop_ids)

    @property
    def failed(self) -> bool:
        """Whether the model gave no numbers for it."""
        drawn = isinstance(self.sampler, CheckedSampler) and self.sampler.failed
        return drawn or any(math.isnan(entry.logprob) for entry in (*self.logprobs[-1:], *self.prompt_logprobs[-1:]))

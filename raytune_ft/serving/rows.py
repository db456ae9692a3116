"""Answers as the engine decodes them: one whose model gives no numbers fails without its neighbours."""

from __future__ import annotations

import math

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


def has_failed(row: Row) -> bool:
    """Whether the model gave no numbers for a row."""
    drawn = isinstance(row.sampler, CheckedSampler) and row.sampler.failed
    return drawn or any(math.isnan(entry.logprob) for entry in (*row.logprobs[-1:], *row.prompt_logprobs[-1:]))

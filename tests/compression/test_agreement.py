"""The sanity figure, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from raytune_ft.compression.agreement import compare, next_token_logits
from raytune_ft.core.errors import RunError


def test_agreement_is_the_mean_divergence_and_the_share_of_equal_first_tokens():
    # position 1: p = (1/2, 1/2), q = (1/4, 3/4): KL = 1/2 ln 2 + 1/2 ln(2/3); p's first is 0, q's 1
    # position 2: equal distributions: KL 0, same first token
    source = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    smaller = torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    found = compare(source, smaller)
    assert found.tokens == 2
    assert found.top1 == 0.5
    assert found.kl == pytest.approx((0.5 * math.log(2) + 0.5 * math.log(2 / 3)) / 2, abs=1e-6)


def test_a_shift_of_all_logits_changes_nothing():
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    assert compare(logits, logits + 3.0).kl == pytest.approx(0.0, abs=1e-6)


def test_a_model_that_gives_nan_is_broken(tiny_model):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(RunError, match="not finite"):
        next_token_logits(model, [3, 4, 5])

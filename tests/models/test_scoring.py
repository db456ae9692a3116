"""Scores of supervised tokens: alone or packed, in chunks or whole, they are the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from raytune_ft.core.errors import ModelError
from raytune_ft.models import scoring
from raytune_ft.models.attention import SEGMENTS, attention
from raytune_ft.models.chat import Encoded
from raytune_ft.models.collate import pack
from raytune_ft.models.loading import load_model

ROWS = [Encoded(list(range(10, 10 + n)), [False] * (n // 2) + [True] * (n - n // 2)) for n in (4, 9, 30, 17)]


def test_scores_come_in_row_order_and_equal_each_row_alone(tiny_model: Path) -> None:
    loaded = load_model(str(tiny_model))
    together = scoring.sequence_scores(loaded, ROWS, token_budget=40)
    assert [score.tokens for score in together] == [2, 5, 15, 9]
    for row, score in zip(ROWS, together, strict=True):
        ids = torch.tensor([row.input_ids])
        labels = torch.tensor([[i if s else -100 for i, s in zip(row.input_ids, row.supervised, strict=True)]])
        with torch.no_grad():
            mean = loaded.model(input_ids=ids, labels=labels).loss.item()
        assert score.nll == pytest.approx(mean * score.tokens, rel=1e-5)


def test_chunks_change_neither_losses_nor_gradients(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model(str(tiny_model))
    parts = scoring.CausalParts.of(loaded.model)
    found = []
    for chunk in (1000, 7):
        monkeypatch.setattr(scoring, "CHUNK", chunk)
        loaded.model.zero_grad()
        with attention(loaded.model, SEGMENTS):
            losses = scoring.target_losses(parts, pack(ROWS))
            losses.sum().backward()
        found.append((losses.detach(), parts.head.weight.grad.clone()))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-6)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-5)


def test_a_model_that_changes_its_logits_behind_the_head_is_refused(tiny_model: Path) -> None:
    loaded = load_model(str(tiny_model))
    loaded.model.config.logit_scale = 0.5
    with pytest.raises(ModelError, match="logit_scale"):
        scoring.CausalParts.of(loaded.model)


def test_a_row_without_supervised_tokens_scores_nothing(tiny_model: Path) -> None:
    loaded = load_model(str(tiny_model))
    assert scoring.sequence_scores(loaded, [Encoded([5, 6], [False, False])]) == [scoring.Score(0.0, 0)]

"""Scores of supervised tokens: alone or packed, in chunks or whole, they are the same."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from raytune_ft.core.errors import ModelError
from raytune_ft.models import scoring
from raytune_ft.models.attention import SEGMENTS, attention
from raytune_ft.models.chat import Encoded
from raytune_ft.models.collate import pack
from raytune_ft.models.loading import load_model

ROWS = [Encoded(list(range(10, 10 + n)), [False] * (n // 2) + [True] * (n - n // 2)) for n in (4, 9, 30, 17)]
SCALES = {"logit_scale": 0.5, "lm_head_multiplier": 0.5, "logits_scaling": 2.0, "logits_mup_width_multiplier": 2.0}
"""What logits are multiplied by where a model has a half in a setting."""


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


@pytest.mark.parametrize("key", [*SCALES, "final_logit_softcapping", "logits_soft_cap"])
def test_a_multiplied_head_with_a_bias_is_refused_and_others_are_taken(key: str, tiny_model: Path) -> None:
    loaded = load_model(str(tiny_model))
    setattr(loaded.model.config, key, 0.5)
    parts = scoring.CausalParts.of(loaded.model)
    assert parts.scale == SCALES.get(key, 1.0)
    head = loaded.model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(head.out_features))
    if parts.scale == 1.0:
        assert scoring.CausalParts.of(loaded.model).head(torch.ones(1, 64)).abs().max() <= 0.5
        return
    with pytest.raises(ModelError, match="a head with a bias"):
        scoring.CausalParts.of(loaded.model)


def test_a_row_without_supervised_tokens_scores_nothing(tiny_model: Path) -> None:
    loaded = load_model(str(tiny_model))
    rows = [Encoded([5] * tokens, [False] * tokens) for tokens in (2, 600)]  # the latter is beyond the context
    assert scoring.sequence_scores(loaded, rows) == [scoring.Score(0.0, 0, windows=1)] * 2


def test_windows_score_every_token_once_with_half_a_context_before_it() -> None:
    row = Encoded(list(range(23)), [True] * 23)
    pieces = scoring.windows_of(row, 8)
    assert [piece.input_ids for piece in pieces[:3]] == [list(range(8)), list(range(4, 12)), list(range(8, 16))]
    scored = [i for piece in pieces for i, kept in zip(piece.input_ids, piece.supervised, strict=True) if kept]
    assert scored == list(range(23))
    assert all(piece.supervised[:4] == [False] * 4 for piece in pieces[1:-1])
    assert pieces[-1].input_ids == list(range(15, 23))


def test_windows_that_score_nothing_are_not_computed() -> None:
    row = Encoded(list(range(30)), [False] * 27 + [True] * 3)
    assert [piece.input_ids for piece in scoring.windows_of(row, 8)] == [list(range(20, 28)), list(range(22, 30))]


def test_a_row_longer_than_the_context_scores_as_its_windows_alone(tiny_model: Path) -> None:
    loaded = load_model(str(tiny_model))
    row = Encoded([10 + n * 7 % 300 for n in range(700)], [False] * 100 + [True] * 600)
    [score] = scoring.sequence_scores(loaded, [row])
    expected = 0.0
    for first, end in ((100, 512), (512, 700)):
        ids = torch.tensor([row.input_ids[max(0, end - 512) : end]])
        offset = max(0, end - 512)
        with torch.no_grad():
            logits = loaded.model(ids).logits[0]
        targets = ids[0, first - offset :]
        predictions = logits[first - offset - 1 : -1]
        expected += float(torch.nn.functional.cross_entropy(predictions, targets, reduction="sum"))
    assert (score.tokens, score.windows) == (600, 2)
    assert score.nll == pytest.approx(expected, rel=1e-5)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tiny_model: Path) -> None:
    loaded = load_model(str(tiny_model))
    scoring.check_vocabulary(loaded)
    loaded.tokenizer.add_tokens(["<one-more>"])
    with pytest.raises(ModelError, match=r"knows \d+ tokens, but the model has embeddings for \d+"):
        scoring.check_vocabulary(loaded)


def test_the_context_of_a_model_with_pictures_is_that_of_its_text() -> None:
    from transformers import Gemma3Config

    config = Gemma3Config(text_config={"max_position_embeddings": 64})
    assert scoring.context_tokens(SimpleNamespace(config=config)) == 64


def test_virtual_tokens_take_a_part_of_the_context(tiny_model: Path) -> None:
    from peft import PromptTuningConfig, get_peft_model

    loaded = load_model(str(tiny_model))
    assert scoring.context_tokens(loaded.model) == 512
    tuned = get_peft_model(loaded.model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=12))
    assert scoring.context_tokens(tuned) == 500


def test_a_special_token_beyond_the_model_counts_where_it_is_written(tiny_model: Path) -> None:
    loaded = load_model(str(tiny_model))
    loaded.tokenizer.add_special_tokens({"additional_special_tokens": ["<picture>"]})
    scoring.check_vocabulary(loaded)
    plain = loaded.tokenizer.chat_template
    loaded.tokenizer.chat_template = plain + "<picture>"
    with pytest.raises(ModelError, match="do not belong together"):
        scoring.check_vocabulary(loaded)
    loaded.tokenizer.chat_template = plain
    loaded.tokenizer.eos_token = "<picture>"
    with pytest.raises(ModelError, match="do not belong together"):
        scoring.check_vocabulary(loaded)

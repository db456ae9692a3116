"""Segments see themselves only, and compute what a padded batch computes."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from raytune_ft.core.errors import ModelError
from raytune_ft.models.attention import OWN, SEGMENTS, attention, segment_attention, takes_segments, use_attention
from raytune_ft.models.chat import Encoded
from raytune_ft.models.collate import pack
from raytune_ft.models.loading import load_model
from raytune_ft.models.scoring import CausalParts, target_losses


def losses(loaded, rows):
    with torch.no_grad(), attention(loaded.model, SEGMENTS):
        return target_losses(CausalParts.of(loaded.model), pack(rows))


def row(*ids):
    return Encoded(list(ids), [True] * len(ids))


def test_changing_one_row_changes_no_other_rows_loss(tiny_model: Path) -> None:
    loaded = load_model(str(tiny_model))
    before = losses(loaded, [row(5, 6, 7, 8), row(9, 10, 11), row(12, 13, 14, 15, 16)])
    after = losses(loaded, [row(5, 6, 7, 8), row(90, 91, 92), row(12, 13, 14, 15, 16)])
    assert torch.equal(before[:3], after[:3])  # three targets of the first row
    assert torch.equal(before[5:], after[5:])  # behind the two of the second
    assert not torch.allclose(before[3:5], after[3:5])


def test_packed_losses_equal_transformers_loss_of_each_row_alone(tiny_model: Path) -> None:
    loaded = load_model(str(tiny_model))
    rows = [row(5, 6, 7, 8), Encoded([9, 10, 11, 12, 13], [False, False, True, True, False])]
    packed = losses(loaded, rows)
    with torch.no_grad():
        first = loaded.model(input_ids=torch.tensor([[5, 6, 7, 8]]), labels=torch.tensor([[5, 6, 7, 8]])).loss
        second = loaded.model(
            input_ids=torch.tensor([[9, 10, 11, 12, 13]]), labels=torch.tensor([[-100, -100, 11, 12, -100]])
        ).loss
    assert packed[:3].mean().item() == pytest.approx(first.item(), abs=1e-6)
    assert packed[3:].mean().item() == pytest.approx(second.item(), abs=1e-6)


def test_a_sliding_window_hides_what_lies_further_back() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 6, 4, generator=generator) for _ in range(3))
    starts = torch.tensor([0, 6], dtype=torch.int32)
    out, _ = segment_attention(torch.nn.Identity(), q, k, v, None, cu_seq_lens_q=starts, sliding_window=2)
    # By hand: the last token sees itself and the one before it.
    weights = torch.softmax(q[0, 0, 5] @ k[0, 0, 4:6].T / 2.0, dim=-1)  # sqrt(4) = 2
    assert torch.allclose(out[0, 5, 0], weights @ v[0, 0, 4:6], atol=1e-6)


@pytest.mark.parametrize("window", [None, 3])
def test_scores_that_are_capped_and_sinks_that_take_a_share_are_as_by_hand(window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    q = 3 * torch.randn(1, 4, 9, 8, generator=generator)
    k, v = (torch.randn(1, 2, 9, 8, generator=generator) for _ in range(2))
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    starts = torch.tensor([0, 4, 9], dtype=torch.int32)
    out, _ = segment_attention(
        torch.nn.Identity(), q, k, v, None, cu_seq_lens_q=starts, softcap=2.0, s_aux=sinks, sliding_window=window
    )
    for head in range(4):
        for token in range(9):
            first = 0 if token < 4 else 4
            seen = range(max(first, token + 1 - (window or 9)), token + 1)
            scores = [float(q[0, head, token] @ k[0, head // 2, other]) / 8**0.5 for other in seen]
            weights = [math.exp(2 * math.tanh(score / 2)) for score in scores]
            total = sum(weights) + math.exp(float(sinks[head]))
            wanted = sum(weight / total * v[0, head // 2, other] for weight, other in zip(weights, seen, strict=True))
            assert torch.allclose(out[0, token, head], wanted, atol=1e-5)


def test_what_segments_do_not_know_is_refused() -> None:
    q = torch.zeros(1, 1, 2, 4)
    starts = torch.tensor([0, 2], dtype=torch.int32)
    with pytest.raises(ModelError, match="a mask of its own"):
        segment_attention(torch.nn.Identity(), q, q, q, torch.ones(2, 2), cu_seq_lens_q=starts)
    with pytest.raises(ModelError, match=r"attention dropout 0\.5"):
        segment_attention(torch.nn.Identity(), q, q, q, None, cu_seq_lens_q=starts, dropout=0.5)
    with pytest.raises(ModelError, match="without segments"):
        segment_attention(torch.nn.Identity(), q, q, q, None)


def test_the_former_attention_comes_back_after_the_block(tiny_model: Path) -> None:
    loaded = load_model(str(tiny_model))
    use_attention(loaded.model, "sdpa")
    with attention(loaded.model, SEGMENTS):
        assert loaded.model.config._attn_implementation == SEGMENTS
    assert loaded.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("kinds", "window"), [(None, 2), (["sliding_attention"], 2), (["full_attention"], None)])
def test_a_window_that_a_layer_leaves_to_the_mask_is_that_of_its_settings(
    kinds: list[str] | None, window: int | None
) -> None:
    layer = torch.nn.Identity()
    layer.config, layer.layer_idx = SimpleNamespace(model_type="phimoe", sliding_window=2, layer_types=kinds), 0
    q = torch.randn(1, 1, 6, 4, generator=torch.Generator().manual_seed(0))
    starts = torch.tensor([0, 6], dtype=torch.int32)
    left_out, _ = segment_attention(layer, q, q, q, None, cu_seq_lens_q=starts)
    said, _ = segment_attention(layer, q, q, q, None, cu_seq_lens_q=starts, sliding_window=window)
    assert torch.equal(left_out, said)


def test_a_window_that_is_left_in_the_settings_of_a_model_without_one_counts_for_nothing() -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    config = LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=2, sliding_window=4)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.arange(1, 20)[None]
    plain = model(ids).logits
    with attention(model, SEGMENTS):
        starts = torch.tensor([0, 19], dtype=torch.int32)
        segments = model(ids, cu_seq_lens_q=starts, cu_seq_lens_k=starts, max_length_q=19, max_length_k=19).logits
    assert torch.allclose(plain, segments, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_a_model_that_is_asked_how_it_computes_is_left_as_it_was(training: bool) -> None:
    """Attention dropout, of which segments know nothing, is no reason against them: nothing is dropped meanwhile."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**shape, num_attention_heads=2, attention_dropout=0.5))
    model.train(training)
    before = model.config._attn_implementation
    assert takes_segments(model)
    assert all(module.training is training for module in model.modules())
    assert model.config._attn_implementation == before


def test_a_model_that_memory_does_not_hold_when_it_is_asked_is_asked_again(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(str(tiny_model)).model
    layer = model.model.layers[0].mlp
    with monkeypatch.context() as short:
        short.setattr(layer, "forward", lambda x: torch.empty(1 << 60))
        with pytest.raises(RuntimeError, match="allocate"):
            takes_segments(model)
    assert takes_segments(model)


def test_a_model_that_knows_no_fused_attention_computes_in_plain_steps(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(str(tiny_model)).model
    use_attention(model, OWN)
    assert model.config._attn_implementation == "sdpa"
    monkeypatch.setattr(type(model), "_supports_sdpa", False)
    use_attention(model, OWN)
    assert model.config._attn_implementation == "eager"

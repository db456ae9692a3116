"""Which weights become zero, checked by hand, and on a small real model."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from raytune_ft.compression.config import PruningConfig, PruningMethod, PruningScope, QuantizationConfig
from raytune_ft.compression.prune import Layer, prunable, prune, write_pruned, zero_in_groups, zero_smallest
from raytune_ft.compression.quantize import write_quantized
from raytune_ft.core.errors import ModelError
from raytune_ft.models.loading import load_model
from raytune_ft.models.sparsity import zeros_of


def test_the_smallest_magnitudes_become_zero():
    weight = torch.tensor([[0.1, -3.0, 2.0], [-0.2, 0.3, -1.0]])
    zero_smallest([weight], 3)
    assert weight.tolist() == [[0.0, -3.0, 2.0], [0.0, 0.0, -1.0]]


def test_of_equal_magnitudes_only_as_many_as_asked_for_become_zero_the_first_ones_first():
    first, second = torch.tensor([[1.0, -1.0]]), torch.tensor([[1.0, 1.0, 5.0]])
    zero_smallest([first, second], 3)
    assert first.tolist() == [[0.0, 0.0]]
    assert second.tolist() == [[0.0, 1.0, 5.0]]


def test_over_all_layers_the_small_layer_loses_more():
    small, large = torch.full((2, 4), 0.01), torch.full((2, 4), 1.0)
    layers = [Layer("small", small, 1), Layer("large", large, 1)]
    prune(layers, PruningConfig(target_sparsity=0.5, scope=PruningScope.GLOBAL))
    assert (int((small == 0).sum()), int((large == 0).sum())) == (8, 0)


def test_per_layer_each_loses_the_same_share():
    small, large = torch.rand(4, 5) * 0.01, torch.rand(4, 5) + 1
    layers = [Layer("small", small, 1), Layer("large", large, 1)]
    prune(layers, PruningConfig(target_sparsity=0.3))
    assert (int((small == 0).sum()), int((large == 0).sum())) == (6, 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_threshold_agrees_with_sorting(dtype: torch.dtype):
    weight = torch.randn(64, 33, generator=torch.Generator().manual_seed(1)).to(dtype)
    kept_before = weight.float().abs().flatten().sort().values[700:]
    zero_smallest([weight], 700)
    left = weight[weight != 0].float().abs().sort().values
    assert int((weight == 0).sum()) == 700
    assert torch.equal(left, kept_before)


def test_two_of_four_neighbours_along_the_input_stay():
    weight = torch.tensor([[4.0, 1.0, -3.0, 2.0, 0.1, 0.2, -0.4, 0.3], [1.0, 1.0, 1.0, 1.0, -9.0, 0.0, 0.0, 8.0]])
    zero_in_groups(weight, kept=2, group=4, input_dim=1)
    assert weight.tolist() == [
        [4.0, 0.0, -3.0, 0.0, 0.0, 0.0, pytest.approx(-0.4), pytest.approx(0.3)],
        [0.0, 0.0, 1.0, 1.0, -9.0, 0.0, 0.0, 8.0],
    ]


def test_groups_follow_the_input_where_it_comes_first():
    weight = torch.tensor([[1.0, 5.0], [2.0, 6.0], [3.0, 7.0], [4.0, 8.0]])  # [input, output], as in GPT-2
    zero_in_groups(weight, kept=2, group=4, input_dim=0)
    assert weight.tolist() == [[0.0, 0.0], [0.0, 0.0], [3.0, 7.0], [4.0, 8.0]]


def test_a_pattern_that_does_not_fit_changes_nothing():
    fits, other = torch.ones(2, 4), torch.ones(2, 6)
    layers = [Layer("fits", fits, 1), Layer("mlp.other", other, 1)]
    with pytest.raises(ModelError, match=r"mlp\.other: its input of 6 is not a multiple of 4"):
        prune(layers, PruningConfig(method=PruningMethod.STRUCTURED))
    assert torch.equal(fits, torch.ones(2, 4))


def test_embeddings_norms_and_head_are_left_alone(tiny_model: Path):
    from transformers import AutoModelForCausalLM

    names = [layer.name for layer in prunable(AutoModelForCausalLM.from_pretrained(tiny_model))]
    assert len(names) == 14  # two layers of q, k, v, o, gate, up, down
    assert "lm_head" not in names


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (PruningConfig(target_sparsity=0.3), 0.3),
        (PruningConfig(target_sparsity=0.3, scope=PruningScope.GLOBAL), 0.3),
        (PruningConfig(method=PruningMethod.STRUCTURED), 0.5),
    ],
)
def test_a_pruned_folder_loads_with_plain_transformers_and_is_as_sparse_as_reported(
    tiny_model: Path, tmp_path: Path, config: PruningConfig, expected: float
):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = write_pruned(str(tiny_model), tmp_path, config)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    source = AutoModelForCausalLM.from_pretrained(tiny_model)
    weights = [layer.weight for layer in prunable(model)]
    zeros, total = sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)
    assert made.sparsity == zeros / total == pytest.approx(expected, abs=1e-4)
    # the embedding's row of the pad token is zero, too: 64 weights
    assert made.sparsity_of_model == pytest.approx((zeros + 64) / made.weights_total)
    assert torch.equal(model.lm_head.weight, source.lm_head.weight)
    assert torch.equal(model.model.embed_tokens.weight, source.model.embed_tokens.weight)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template
    assert made.bytes_after >= made.bytes_before, "dense storage does not get smaller"
    assert 0 < made.agreement.kl < 0.01


@pytest.fixture
def mixture(tiny_model: Path, tmp_path: Path) -> Path:
    """A model whose 4 experts hold most of its weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    config = Qwen3MoeConfig(vocab_size=len(tokenizer), head_dim=16, pad_token_id=0, **shape, **experts)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "mixture")
    tokenizer.save_pretrained(tmp_path / "mixture")
    return tmp_path / "mixture"


@pytest.mark.parametrize("storage", ["dense", "compact"])
def test_magnitude_prunes_a_mixtures_experts_which_stay_zero(
    mixture: Path, tmp_path: Path, storage: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = write_pruned(str(mixture), tmp_path / "out", PruningConfig(target_sparsity=0.5, storage=storage))
    assert made.weights_considered == 4 * 32 * 32 + 4 * (128 * 32 + 32 * 64)  # q, k, v, o; and 4 experts
    assert made.sparsity == pytest.approx(0.5)
    assert made.sparsity_by_layer["model.layers.0.mlp.experts.gate_up_proj"] == 0.5
    zeros = zeros_of(load_model(str(tmp_path / "out"), device="cpu").model)
    assert int(zeros["model.layers.0.mlp.experts.down_proj"].sum()) == 4 * 32 * 64 / 2


@pytest.mark.parametrize("what", ["prune", "quantize"])
def test_experts_that_stay_as_they_are_are_told(
    mixture: Path, tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.WARNING, logger="raytune_ft"):
        if what == "prune":
            write_pruned(str(mixture), tmp_path / "out", PruningConfig(method=PruningMethod.STRUCTURED))
        else:
            write_quantized(str(mixture), tmp_path / "out", QuantizationConfig(bits=8))
    assert f"{what}: " in caplog.text
    assert "its experts (" in caplog.text

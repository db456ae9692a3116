"""Adapters mixed in one batch compute what PEFT computes with each alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from raytune_ft.core.errors import ModelError
from raytune_ft.models.adapter_slots import AdapterSlots
from raytune_ft.models.loading import load_model

IDS = torch.tensor([[5, 9, 30, 41], [60, 3, 88, 17], [100, 7, 9, 11]])


def saved(base: Path, folder: Path, seed: int, **settings: Any) -> Path:
    from peft import LoraConfig, get_peft_model

    common = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"], "r": 3, "lora_alpha": 5}
    model = get_peft_model(load_model(str(base), device="cpu").model, LoraConfig(**{**common, **settings}))
    model.peft_config["default"].base_model_name_or_path = str(base)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 6}, "alpha_pattern": {"layers.1.mlp.down_proj": 40}},
    ],
)
def test_each_row_is_computed_with_its_own_adapter(tiny_model: Path, tmp_path: Path, settings: dict[str, Any]):
    one, other = saved(tiny_model, tmp_path / "one", 1, **settings), saved(tiny_model, tmp_path / "other", 2, r=2)
    model = load_model(str(tiny_model), device="cpu").model
    slots = AdapterSlots(model, slots=2, max_rank=8)
    with torch.no_grad():
        bare = model(IDS).logits
        slots.load(1, one)
        slots.load(2, other)
        with slots.rows([2, 0, 1]):
            mixed = model(IDS).logits
        alone = [load_model(str(folder), device="cpu").model(IDS).logits for folder in (other, one)]
        torch.testing.assert_close(mixed[0], alone[0][0], atol=1e-4, rtol=1e-4)
        assert torch.equal(mixed[1], bare[1])
        torch.testing.assert_close(mixed[2], alone[1][2], atol=1e-4, rtol=1e-4)
        assert float((mixed[2] - bare[2]).abs().max()) > 0.1
        slots.clear(1)
        with slots.rows([2, 0, 1]):
            assert torch.equal(model(IDS).logits[2], bare[2])
        assert torch.equal(model(IDS).logits, bare)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "DoRA cannot be mixed with other adapters; serve it alone"),
        ({"modules_to_save": ["lm_head"]}, r"lm_head.*is no factor of a linear layer"),
        ({"r": 9}, "rank 9 is above the limit of 8; raise max_lora_rank"),
        ({"rank_pattern": {"q_proj": 9}}, "rank 9 is above the limit of 8; raise max_lora_rank"),
    ],
)
def test_what_cannot_be_mixed_is_refused(tiny_model: Path, tmp_path: Path, settings: dict[str, Any], message: str):
    folder = saved(tiny_model, tmp_path / "other", 1, **settings)
    slots = AdapterSlots(load_model(str(tiny_model), device="cpu").model, slots=1, max_rank=8)
    with pytest.raises(ModelError, match=message):
        slots.load(1, folder)


def test_an_adapter_of_another_architecture_is_refused(tiny_model: Path, tmp_path: Path):
    folder = saved(tiny_model, tmp_path / "one", 1)
    model = load_model(str(tiny_model), device="cpu").model
    model.model.layers = model.model.layers[:1]
    with pytest.raises(ModelError, match=r"has no layer model\.layers\.1.*belongs to another base"):
        AdapterSlots(model, slots=1, max_rank=8).load(1, folder)


def test_an_adapter_for_layers_of_another_size_is_refused(tiny_model: Path, tmp_path: Path):
    folder = saved(tiny_model, tmp_path / "one", 1)
    model = load_model(str(tiny_model), device="cpu").model
    model.model.layers[1].self_attn.q_proj = torch.nn.Linear(32, 64)
    with pytest.raises(ModelError, match=r"layers\.1\.self_attn\.q_proj is 32 x 64 in the served .* 64 x 64 in the ad"):
        AdapterSlots(model, slots=1).load(1, folder)


def test_a_slot_that_is_filled_again_has_nothing_of_what_was_there(tiny_model: Path, tmp_path: Path):
    large = saved(tiny_model, tmp_path / "large", 1, r=8)
    small = saved(tiny_model, tmp_path / "small", 2, r=2, target_modules=["q_proj"])
    model = load_model(str(tiny_model), device="cpu").model
    slots = AdapterSlots(model, slots=1, max_rank=8)
    with torch.no_grad(), slots.rows([1, 1, 1]):
        for folder in (large, small):
            slots.load(1, folder)
            found, alone = model(IDS).logits, load_model(str(folder), device="cpu").model(IDS).logits
            torch.testing.assert_close(found, alone, atol=1e-4, rtol=1e-4)

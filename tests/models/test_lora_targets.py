"""What of a model gets an adapter: the text decoder, and no router of experts; and what is saved can be loaded."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    HunYuanMoEV1Config,
    HunYuanMoEV1ForCausalLM,
    LagunaConfig,
    LagunaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from raytune_ft.core.errors import ModelError
from raytune_ft.models import lora_targets
from raytune_ft.models.adapters import add_lora, go_on_from, merge_adapter
from raytune_ft.models.loading import put_adapter

SHAPE = {"rank": 2, "alpha": 4, "dropout": 0.0, "seed": 0, "base": "x"}
SMALL = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "moe_intermediate_size": 16, "num_experts_per_tok": 2},
}


def adapted_layers(model: Any) -> set[str]:
    return {name.partition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}


def adapt(model: Any, targets: list[str] | str = "all-linear") -> set[str]:
    return adapted_layers(add_lora(model, target_modules=targets, **SHAPE))


def with_pictures() -> Gemma3ForConditionalGeneration:
    text = {**SMALL, "sliding_window": 8}
    sight = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(text_config=text, vision_config={**sight, "image_size": 28, "patch_size": 14})
    return Gemma3ForConditionalGeneration(config)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_only_the_text_decoder_of_a_model_with_pictures_is_adapted(
    targets: list[str] | str, caplog: pytest.LogCaptureFixture
) -> None:
    lora_targets._say.cache_clear()
    with caplog.at_level(logging.INFO, logger="raytune_ft"):
        found = adapt(with_pictures(), targets)
    assert len(found) == (14 if targets == "all-linear" else 4)
    assert all(".language_model." in name for name in found)
    assert "outside the text decoder get no adapter" in caplog.text


@pytest.mark.parametrize(
    ("make", "router"),
    [
        (lambda: PhimoeForCausalLM(PhimoeConfig(**SMALL, num_local_experts=4)), "router"),
        (lambda: HunYuanMoEV1ForCausalLM(HunYuanMoEV1Config(**SMALL, num_experts=4, moe_topk=2)), "wg"),
        (lambda: Qwen2MoeForCausalLM(Qwen2MoeConfig(**SMALL, num_experts=4)), "shared_expert_gate"),
        (
            lambda: Qwen3NextForCausalLM(
                Qwen3NextConfig(**SMALL, num_experts=4, layer_types=["linear_attention", "full_attention"])
            ),
            "gate",
        ),
    ],
)
def test_all_linear_leaves_out_what_chooses_between_experts(make: Any, router: str) -> None:
    ends = {name.rpartition(".")[2] for name in adapt(make())}
    assert router not in ends
    assert not ends & {"router", "gate", "wg", "shared_expert_gate"}
    assert {"q_proj", "k_proj", "v_proj", "o_proj"} <= ends
    assert router != "gate" or "in_proj_ba" in ends, "gates of attention are no routers"


def test_a_router_that_is_named_is_adapted() -> None:
    model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**SMALL, num_experts=4))
    assert len(adapt(model, ["shared_expert_gate"])) == 2


def test_a_router_that_returns_more_than_a_product_is_refused() -> None:
    """PEFT puts an adapter upon it, and the first step would fail."""
    model = PhimoeForCausalLM(PhimoeConfig(**SMALL, num_local_experts=4))
    wanted = r"lora_target_modules: model.layers.0.mlp.router \(PhimoeTopKRouter\) returns more than a product"
    with pytest.raises(ModelError, match=wanted):
        adapt(model, ["q_proj", "router"])
    assert not adapted_layers(model)


@pytest.mark.parametrize("option", ["lora_dropout", "use_dora"])
def test_options_that_experts_have_none_of_are_named(option: str) -> None:
    model = MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4))
    changes = {"dropout": 0.1} if option == "lora_dropout" else {"use_dora": True}
    with pytest.raises(ModelError, match=rf"^{option}: is not there for experts .*set {option}: "):
        add_lora(model, target_modules="all-linear", **{**SHAPE, **changes})


def test_a_layer_that_peft_cannot_adapt_is_told_as_that() -> None:
    model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**SMALL, num_experts=4))
    with pytest.raises(
        ModelError, match=r"\['gate'\] cannot be adapted \(.*Qwen2MoeTopKRouter.*; its linear layers are d"
    ):
        adapt(model, ["gate"])


def laguna() -> LagunaForCausalLM:
    torch.manual_seed(0)
    layers = ["full_attention"] * 2
    return LagunaForCausalLM(
        LagunaConfig(**SMALL, num_experts=4, layer_types=layers, mlp_layer_types=["dense", "sparse"])
    )


def test_an_adapter_that_could_not_be_loaded_again_is_refused_before_it_is_trained() -> None:
    """PEFT's names for this model's shared experts come back changed."""
    with pytest.raises(ModelError, match=r"could be saved, but not loaded again.*mlp.shared_experts"):
        adapt(laguna())
    assert len(adapt(laguna(), ["q_proj", "v_proj"])) == 4


@pytest.fixture
def saved(tiny_model: Path, tmp_path: Path) -> Path:
    """An adapter of the tiny model."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    add_lora(model, target_modules=["q_proj"], **{**SHAPE, "base": str(tiny_model)}).save_pretrained(tmp_path)
    return tmp_path


def test_an_adapter_of_a_model_with_pictures_is_merged(tiny_model: Path, tmp_path: Path) -> None:
    base, adapter, merged = (Path(shutil.copytree(tiny_model, tmp_path / name)) for name in ("base", "ad", "merged"))
    (adapter / "config.json").unlink()
    (adapter / "model.safetensors").unlink()
    with_pictures().save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    add_lora(model, target_modules="all-linear", **{**SHAPE, "base": str(base)}).save_pretrained(adapter)
    merge_adapter(str(adapter), merged)
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        ours, theirs = (AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (merged, base))
    assert torch.allclose(ours, theirs, atol=1e-5), "a new adapter changes nothing"


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_an_adapter_whose_tensors_are_not_the_models_is_refused(saved: Path, tiny_model: Path, change: str) -> None:
    put_adapter(AutoModelForCausalLM.from_pretrained(tiny_model), saved, "cpu")
    state = load_file(saved / "adapter_model.safetensors")
    name = next(name for name in state if "layers.1" in name)
    state[name.replace("layers.1", "layers.7")] = state[name].clone()
    if change == "missing":
        del state[name]
    save_file(state, saved / "adapter_model.safetensors")
    number = 1 if change == "missing" else 7
    with pytest.raises(ModelError, match=rf"not loaded upon LlamaForCausalLM \(1: model.layers.{number}.self_attn.q_"):
        put_adapter(AutoModelForCausalLM.from_pretrained(tiny_model), saved, "cpu")


def test_going_on_from_an_adapter_takes_all_of_it(saved: Path, tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    adapted = add_lora(model, target_modules=["q_proj"], **{**SHAPE, "seed": 1, "base": str(tiny_model)})
    go_on_from(adapted, str(saved))
    state = load_file(saved / "adapter_model.safetensors")
    there = {name.replace(".default", ""): p for name, p in adapted.named_parameters() if p.requires_grad}
    assert state.keys() == there.keys()
    assert all(torch.equal(state[name], there[name]) for name in state)

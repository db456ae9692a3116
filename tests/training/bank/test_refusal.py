"""Bases whose rows touch each other are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from raytune_ft.core.errors import ModelError
from raytune_ft.models.attention import SEGMENTS, use_attention
from raytune_ft.training.bank.base import frozen_base
from raytune_ft.training.bank.refusal import rows_interact, why_not_packed

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1}
HEADS = {"intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}


def llama(**changes: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SMALL, **HEADS, **changes))


def test_a_plain_llama_is_taken() -> None:
    assert why_not_packed(llama()) is None


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MixtralForCausalLM(MixtralConfig(**SMALL, **HEADS, num_local_experts=4)), "MixtralFor.* 4 experts"),
        (lambda: MambaForCausalLM(MambaConfig(**SMALL)), "MambaForCausalLM"),
        (lambda: llama(attention_dropout=0.1), r"attention_dropout = 0.1\)"),
        (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2)), "dropout of its own"),
    ],
)
def test_what_joins_rows_is_named(make: Any, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        frozen_base(make(), None, "base")


def test_a_model_past_the_attention_registry_is_refused() -> None:
    class OwnAttention(LlamaForCausalLM):
        _supports_attention_backend = False

    model = OwnAttention(LlamaConfig(**SMALL, **HEADS))
    assert "attention registry" in (why_not_packed(model) or "")


@pytest.mark.parametrize(("threshold", "taken"), [(6.0, False), (0.0, True)])
def test_int8_is_taken_without_a_search_for_outliers(tiny_model: Path, threshold: float, taken: bool) -> None:
    quantized = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=quantized)
    reason = why_not_packed(model)
    assert (reason is None) == taken
    assert taken or "llm_int8_threshold" in str(reason)


def test_the_settings_of_a_model_with_pictures_are_those_of_its_text() -> None:
    sight = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**SMALL, **HEADS, "head_dim": 16}

    def model(**changes: Any) -> Any:
        config = Gemma3Config(
            text_config={**text, **changes}, vision_config={**sight, "image_size": 28, "patch_size": 14}
        )
        return Gemma3ForConditionalGeneration(config)

    frozen_base(model(), None, "base")
    assert "attention_dropout = 0.1" in (why_not_packed(model(attention_dropout=0.1)) or "")
    assert "4 experts" in (why_not_packed(model(num_experts=4)) or "")


def test_a_layer_that_mixes_rows_is_found_by_trying() -> None:
    class Mixing(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + x.mean(dim=1, keepdim=True)

    model = llama().eval()
    use_attention(model, SEGMENTS)
    assert not rows_interact(model)
    layer = Mixing(32, 32, bias=False)
    model.model.layers[0].self_attn.o_proj = layer
    assert why_not_packed(model) is None
    assert rows_interact(model)


def test_dropout_of_a_head_that_no_text_passes_is_no_reason_and_that_of_a_layer_is() -> None:
    none = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, **none))
    assert model.config.summary_first_dropout > 0
    assert why_not_packed(model) is None
    model.transformer.drop.p = 0.1  # its settings know nothing of it
    assert "has dropout of its own (transformer.drop: 0.1)" in (why_not_packed(model) or "")

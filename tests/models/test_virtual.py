"""Prompt methods that padding-free batches know, and models that do not pass a prefix on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import PrefixTuningConfig, PromptEncoderConfig, get_peft_model

from raytune_ft.core.errors import ModelError
from raytune_ft.models.attention import SEGMENTS, attention
from raytune_ft.models.chat import Encoded
from raytune_ft.models.collate import pack
from raytune_ft.models.loading import load_model
from raytune_ft.models.scoring import CausalParts, target_losses


def test_a_prompt_method_that_is_not_known_is_refused_by_name(tiny_model: Path) -> None:
    settings = PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8)
    model = get_peft_model(load_model(str(tiny_model)).model, settings)
    with pytest.raises(ModelError, match="P_TUNING: this prompt method is not supported; those that are: PROMPT_T"):
        CausalParts.of(model)


def test_a_layer_that_does_not_pass_the_prefix_on_is_named(tiny_model: Path) -> None:
    base: Any = load_model(str(tiny_model)).model
    model = get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    batch = pack([Encoded([5, 6, 7], [True] * 3)])
    with attention(model, SEGMENTS):
        assert target_losses(CausalParts.of(model), batch).isfinite().all()
        layer = base.model.layers[1].self_attn
        usual = layer.forward

        def without(*given: Any, prefixes: Any, **others: Any) -> Any:
            return usual(*given, **others)

        layer.forward = without
        with pytest.raises(ModelError, match=r"prefix tuning: layers \[1\] of this model took no prefix"):
            target_losses(CausalParts.of(model), batch)

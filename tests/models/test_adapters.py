"""New adapters go where they are asked for, or nowhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from raytune_ft.core.errors import ModelError
from raytune_ft.models.adapters import add_lora
from raytune_ft.models.loading import load_model

SHAPE = {"rank": 2, "alpha": 4, "dropout": 0.0, "seed": 0, "base": "x"}


def test_each_name_of_target_modules_has_to_fit_a_layer(tiny_model: Path) -> None:
    model = load_model(str(tiny_model)).model
    with pytest.raises(ModelError, match=r"lora_target_modules: \['v_porj'\] fit no layer.*are down_proj, gate_proj"):
        add_lora(model, target_modules=["q_proj", "v_porj"], **SHAPE)
    assert not hasattr(model, "peft_config")
    adapted = add_lora(model, target_modules=["layers.0.self_attn.q_proj", "v_proj"], **SHAPE)
    found = {name.partition(".lora_A")[0][-16:] for name, _ in adapted.named_parameters() if "lora_A" in name}
    assert found == {"self_attn.q_proj", "self_attn.v_proj"}

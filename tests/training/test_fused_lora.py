"""LoRA layers computed in one function against PEFT's own, layer by layer and through a whole model."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from raytune_ft.training.fused_lora import fuse_lora

IDS = torch.arange(40).reshape(1, 40) * 7 % 300


def adapted(path: Path, *, dtype: torch.dtype = torch.float32, bits: int | None = None, **options: Any) -> Any:
    """A PEFT model whose second factors are no longer zero."""
    quantized = None
    if bits == 4:
        quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype)
    elif bits == 8:
        quantized = BitsAndBytesConfig(load_in_8bit=True)
    base = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, quantization_config=quantized)
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", **options}
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.1)
    return model


def fused(model: Any) -> tuple[Any, int]:
    twin = deepcopy(model)
    return twin, fuse_lora(twin)


def logits_and_gradients(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    logits = model(input_ids=IDS).logits.float()
    (logits**2).mean().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({}, 1e-5),
        ({"use_rslora": True, "target_modules": ["q_proj", "down_proj"]}, 1e-5),
        ({"dtype": torch.bfloat16}, 0.03),
        ({"bits": 4}, 1e-5),
        ({"bits": 8}, 1e-5),
    ],
    ids=["fp32", "rslora on some layers", "fp32 factors on a bf16 base", "nf4", "int8"],
)
def test_results_and_gradients_are_pefts(tiny_model: Path, options: dict[str, Any], tolerance: float) -> None:
    plain = adapted(tiny_model, **options)
    twin, layers = fused(plain)
    assert layers == (4 if "target_modules" in options else 14)
    logits, gradients = logits_and_gradients(plain)
    ours, our_gradients = logits_and_gradients(twin)
    torch.testing.assert_close(ours, logits, rtol=tolerance, atol=tolerance * logits.abs().max().item())
    assert gradients.keys() == our_gradients.keys()
    for name, gradient in gradients.items():
        scale = tolerance * gradient.abs().max().item()
        torch.testing.assert_close(our_gradients[name], gradient, rtol=tolerance, atol=scale, msg=name)


def test_gradients_with_dropout_are_those_of_finite_differences() -> None:
    layer = lora_layer(dropout=0.4)

    def dropped(x: Tensor, a: Tensor, b: Tensor) -> Any:
        torch.manual_seed(5)  # the same features are dropped each time
        return torch.func.functional_call(layer, {"lora_A.default.weight": a, "lora_B.default.weight": b}, (x,))

    a, b = (factor.default.weight.detach().clone().requires_grad_() for factor in (layer.lora_A, layer.lora_B))
    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(dropped, (x, a, b))


def test_dropout_drops_its_share_scales_the_rest_and_rests_in_evaluation() -> None:
    layer = lora_layer(dropout=0.25)
    with torch.no_grad():
        layer.lora_A.default.weight.copy_(torch.eye(6)[:4])  # the first four features, as they come
        layer.lora_B.default.weight.copy_(torch.eye(5)[:, :4])
    x = torch.ones(4000, 6, dtype=torch.float64)
    added = (layer(x) - layer.base_layer(x)).detach()[:, :4] / layer.scaling["default"]
    assert set(added.round(decimals=6).unique().tolist()) == {0.0, round(1 / 0.75, 6)}
    assert (added == 0).double().mean().item() == pytest.approx(0.25, abs=0.02)
    layer.eval()
    torch.testing.assert_close((layer(x) - layer.base_layer(x))[:, :4], 3 * x[:, :4])


def lora_layer(dropout: float) -> Any:
    """A fused layer of 6 inputs and 5 outputs in double precision."""
    from torch import nn

    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 12, "lora_dropout": dropout, "target_modules": ["0"]}
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), LoraConfig(**options)).double()
    layer = model.base_model.model[0]
    nn.init.normal_(layer.lora_B.default.weight)
    assert fuse_lora(model) == 1
    return layer


def test_layers_switched_off_or_merged_compute_as_peft_does(tiny_model: Path) -> None:
    plain = adapted(tiny_model)
    twin, _ = fused(plain)
    with torch.no_grad():
        expected = plain(input_ids=IDS).logits
        with plain.disable_adapter(), twin.disable_adapter():
            assert torch.equal(twin(input_ids=IDS).logits, plain(input_ids=IDS).logits)
            assert not torch.allclose(twin(input_ids=IDS).logits, expected)
        twin.merge_adapter()
        torch.testing.assert_close(twin(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_dora_is_left_to_peft(tiny_model: Path) -> None:
    plain = adapted(tiny_model, use_dora=True)
    twin, layers = fused(plain)
    assert layers == 0
    assert torch.equal(twin(input_ids=IDS).logits, plain(input_ids=IDS).logits)


def test_a_pass_keeps_less_in_memory_than_pefts(tiny_model: Path) -> None:
    plain = adapted(tiny_model, lora_dropout=0.1).train()
    twin, _ = fused(plain)
    assert bytes_kept(twin) < 0.8 * bytes_kept(plain)


def bytes_kept(model: Any) -> int:
    """Bytes that a forward pass keeps for the way back, the weights aside."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=IDS).logits.sum()
    del loss
    return sum(kept.values())

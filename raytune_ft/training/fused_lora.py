"""PEFT's LoRA layers, computed as one function: the same numbers with fewer passes over memory.

PEFT adds `lora_B(lora_A(dropout(x))) * scaling` to what the frozen layer gives, in steps that each make a tensor of
the layer's size, there and back. Here the products go straight into the layer's output and into its input's gradient.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from raytune_ft.training.dropout import RowDropout
from raytune_ft.training.low_rank import Product, narrow_product


def fuse_lora(model: Any) -> int:
    """Makes the plain LoRA layers of a PEFT model compute in one function each; it stays the PEFT model that it is.

    Layers with a variant (DoRA), and those that are merged or switched off when they are called, compute as PEFT does.
    Not for weights that ZeRO stage 3 shards: those exist within their own module's call only.

    Returns:
        The number of such layers.
    """
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer) and _is_plain(module)]
    for layer in layers:
        layer.forward = partial(_forward, layer, layer.forward)
    return len(layers)


def _is_plain(layer: Any) -> bool:
    base = layer.get_base_layer()
    linear = isinstance(base, nn.Linear) and len(layer.lora_A) == 1  # bitsandbytes' layers are linear ones, too
    return bool(
        linear
        and not layer.lora_variant
        and not any(layer.lora_bias.values())
        and not getattr(layer, "fan_in_fan_out", False)
        and not any(parameter.requires_grad for parameter in base.parameters())
    )


def _forward(layer: Any, usual: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    (name,) = layer.lora_A.keys()
    if layer.disable_adapters or layer.merged or layer.active_adapters != [name] or args or kwargs:
        return usual(x, *args, **kwargs)  # type: ignore[no-any-return]
    base, a, b = layer.get_base_layer(), layer.lora_A[name].weight, layer.lora_B[name].weight
    scale, dropout = layer.scaling[name], layer.lora_dropout[name]
    flat = x.reshape(-1, x.shape[-1])
    kept = None
    if layer.training and isinstance(dropout, nn.Dropout) and dropout.p:
        if isinstance(dropout, RowDropout):
            kept = dropout.mask(flat)
        else:
            kept = torch.empty_like(flat, dtype=torch.bool).bernoulli_(1 - dropout.p)
        scale /= 1 - dropout.p
    if type(base) is nn.Linear:
        out = _Linear.apply(flat, a, b, base.weight, base.bias, scale, kept)  # type: ignore[no-untyped-call]
    else:
        out = _Added.apply(base(flat), flat, a, b, scale, kept)  # type: ignore[no-untyped-call]
    return out.view(*x.shape[:-1], -1)  # type: ignore[no-any-return]


class _Linear(torch.autograd.Function):
    """A frozen linear layer with a product: no gradient of its weight."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd hands arguments over by their places
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: float,
        kept: Tensor | None,
    ) -> Tensor:
        out = F.linear(x, weight, bias)
        low = Product(a, b, scale, kept).add(out, x)
        ctx.save_for_backward(x, a, b, weight, low, kept)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, a, b, weight, low, kept = ctx.saved_tensors
        gradient_x = gradient @ weight if ctx.needs_input_grad[0] else None
        product = Product(a, b, ctx.scale, kept)
        mine, gradient_low = product.back(gradient, gradient_x)
        return gradient_x, gradient_low.t() @ product.inputs(x), narrow_product(mine.t(), low), None, None, None, None


class _Added(torch.autograd.Function):
    """A product added, in place, to the output of a layer that differentiates itself (a quantized one)."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd hands arguments over by their places
        ctx: Any, out: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, kept: Tensor | None
    ) -> Tensor:
        low = Product(a, b, scale, kept).add(out, x)
        ctx.save_for_backward(x, a, b, low, kept)
        ctx.scale = scale
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, a, b, low, kept = ctx.saved_tensors
        product = Product(a, b, ctx.scale, kept)
        gradient_x = torch.zeros_like(x) if ctx.needs_input_grad[1] else None
        mine, gradient_low = product.back(gradient, gradient_x)
        return gradient, gradient_x, gradient_low.t() @ product.inputs(x), narrow_product(mine.t(), low), None, None

"""Adapters of exact ranks and a loop over trials: what CPUs do fastest.

A trial's factors, gradients and moments are one flat vector each, so that its optimizer step is one fused call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from raytune_ft.training.bank.layout import Layout
from raytune_ft.training.bank.slot import SlotSettings, SlotState, State, Target, factor_views
from raytune_ft.training.dropout import kept
from raytune_ft.training.low_rank import Product


class _Slot:
    def __init__(self, settings: SlotSettings, device: torch.device) -> None:
        self.settings = settings
        self.flat = nn.Parameter(torch.zeros(settings.size, device=device))
        self.flat.grad = torch.zeros_like(self.flat)
        self.optimizer = torch.optim.AdamW(
            [self.flat],
            betas=settings.betas,
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.weights = self.views(self.flat.detach())
        self.gradients = self.views(self.flat.grad)

    def views(self, flat: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        return factor_views(flat, self.settings.targets, self.settings.rank)

    def named(self, flat: Tensor) -> State:
        views = self.views(flat)
        return {
            name: view.to("cpu", copy=True).contiguous()
            for target in self.settings.targets
            for name, view in zip(target.factors, views[target.name], strict=True)
        }

    def fill(self, flat: Tensor, state: State) -> None:
        views = self.views(flat)
        for target in self.settings.targets:
            for name, view in zip(target.factors, views[target.name], strict=True):
                view.copy_(state[name])


@dataclass(frozen=True)
class Part:
    """One trial's share of a layer: its tokens, its product, and where the gradients of its factors add up."""

    tokens: slice
    product: Product
    gradient_a: Tensor
    gradient_b: Tensor


class RaggedSlots:
    """The adapters of all trials, each of its own rank, and their AdamW."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._slots: dict[str, _Slot] = {}

    def admit(self, name: str, settings: SlotSettings, state: SlotState) -> None:
        """Gives a trial a slot that starts from `state`."""
        slot = self._slots[name] = _Slot(settings, self.device)
        with torch.no_grad():
            slot.fill(slot.flat, state.weights)
        if state.step:
            first, second = torch.zeros_like(slot.flat), torch.zeros_like(slot.flat)
            slot.fill(first, state.exp_avg)
            slot.fill(second, state.exp_avg_sq)
            steps = torch.tensor(float(state.step), device=self.device)
            slot.optimizer.state[slot.flat] = {"step": steps, "exp_avg": first, "exp_avg_sq": second}

    def evict(self, name: str) -> None:
        """Frees a trial's slot."""
        del self._slots[name]

    def settings(self, name: str) -> SlotSettings:
        """What the trial was admitted with."""
        return self._slots[name].settings

    def weights(self, name: str) -> State:
        """A copy of a slot's factors on the CPU."""
        slot = self._slots[name]
        return slot.named(slot.flat.detach())

    def read(self, name: str, *, on_device: bool = False) -> SlotState:
        """A copy of a slot on the CPU."""
        slot = self._slots[name]
        state = slot.optimizer.state.get(slot.flat)
        if not state:
            return SlotState.initial(slot.named(slot.flat.detach()))
        return SlotState(
            weights=slot.named(slot.flat.detach()),
            exp_avg=slot.named(state["exp_avg"]),
            exp_avg_sq=slot.named(state["exp_avg_sq"]),
            step=int(state["step"]),
        )

    def order(self, names: Sequence[str]) -> list[str]:
        """In which order the trials' tokens have to lie; here any will do."""
        return list(names)

    def zero_gradients(self, names: Sequence[str]) -> None:
        """Forgets the gradients of these trials."""
        for name in names:
            gradient = self._slots[name].flat.grad
            assert gradient is not None
            gradient.zero_()

    def step(self, rates: dict[str, float]) -> Tensor:
        """Clips and makes an AdamW step for the trials named in `rates`, at these learning rates.

        Returns:
            [trials], the gradients' norms before clipping.
        """
        norms = []
        for name, rate in rates.items():
            slot = self._slots[name]
            slot.optimizer.param_groups[0]["lr"] = rate
            norms.append(nn.utils.clip_grad_norm_(slot.flat, slot.settings.max_grad_norm))
            slot.optimizer.step()
        return torch.stack(norms)

    def run(self, layout: Layout) -> RaggedPass:
        """What the adapted layers compute while the tokens of `layout` go through the base."""
        return RaggedPass(self._slots, layout, self.device)


class RaggedPass:
    """One way of a batch through the base and back."""

    def __init__(self, slots: dict[str, _Slot], layout: Layout, device: torch.device) -> None:
        self._slots, self._layout = slots, layout
        # Layers whose input needs no gradient still have to be reached by the backward pass.
        self._anchor = torch.zeros((), device=device, requires_grad=True)

    def linear(self, base: Any, target: Target, x: Tensor) -> Tensor:
        """`base` of x, plus each trial's low-rank product for its own tokens."""
        parts = self._parts(target)
        flat = x.reshape(-1, x.shape[-1])
        if type(base) is nn.Linear:
            out = _FrozenLinear.apply(flat, self._anchor, base.weight, base.bias, parts)  # type: ignore[no-untyped-call]
        else:
            out = _Added.apply(base(x).reshape(-1, target.outputs), flat, self._anchor, parts)  # type: ignore[no-untyped-call]
        return out.view(*x.shape[:-1], target.outputs)  # type: ignore[no-any-return]

    def _parts(self, target: Target) -> list[Part]:
        parts = []
        for name, start, stop in self._layout.segments():
            slot = self._slots[name]
            if target.name not in slot.weights:
                continue
            rate = slot.settings.dropout if self._layout.keys is not None else 0.0
            scale, mask = slot.settings.scale, None
            if rate:
                assert self._layout.keys is not None
                mask = kept(self._layout.keys[start:stop], target.index, target.inputs, rate)
                scale /= 1 - rate
            product = Product(*slot.weights[target.name], scale, mask)
            parts.append(Part(slice(start, stop), product, *slot.gradients[target.name]))
        return parts


def _add_products(out: Tensor, x: Tensor, parts: list[Part]) -> list[Tensor]:
    """Adds each part's product to its rows of `out`; returns the scaled first halves."""
    return [part.product.add(out[part.tokens], x[part.tokens]) for part in parts]


def _add_gradients(
    gradient: Tensor, x: Tensor, lows: Sequence[Tensor], parts: list[Part], gradient_x: Tensor | None
) -> None:
    """Adds to the factors' gradients, and to that of x where one is wanted."""
    for part, low in zip(parts, lows, strict=True):
        rows = None if gradient_x is None else gradient_x[part.tokens]
        mine, gradient_low = part.product.back(gradient[part.tokens], rows)
        part.gradient_b.addmm_(mine.t(), low)
        part.gradient_a.addmm_(gradient_low.t(), part.product.inputs(x[part.tokens]))


class _FrozenLinear(torch.autograd.Function):
    """A frozen linear layer with products: no gradient of its weight, and no tensor of full size but its output."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd hands arguments over by their places
        ctx: Any, x: Tensor, anchor: Tensor, weight: Tensor, bias: Tensor | None, parts: list[Part]
    ) -> Tensor:
        out = F.linear(x, weight, bias)
        lows = _add_products(out, x, parts)
        ctx.save_for_backward(x, weight, *lows)
        ctx.parts = parts
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        (gradient,) = gradients
        x, weight, *lows = ctx.saved_tensors
        gradient_x = gradient @ weight if ctx.needs_input_grad[0] else None
        _add_gradients(gradient, x, lows, ctx.parts, gradient_x)
        return gradient_x, None, None, None, None


class _Added(torch.autograd.Function):
    """Products added to the output of a layer that differentiates itself (a quantized one)."""

    @staticmethod
    def forward(ctx: Any, base_out: Tensor, x: Tensor, anchor: Tensor, parts: list[Part]) -> Tensor:
        out = base_out.clone()
        lows = _add_products(out, x, parts)
        ctx.save_for_backward(x, *lows)
        ctx.parts = parts
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (gradient,) = gradients
        x, *lows = ctx.saved_tensors
        gradient_x = torch.zeros_like(x) if ctx.needs_input_grad[1] else None
        _add_gradients(gradient, x, lows, ctx.parts, gradient_x)
        return gradient, gradient_x, None, None

"""Adapters stacked to the highest rank: what GPUs do fastest, since launches don't grow with the number of trials.

A trial keeps its factors and moments for itself, at its own rank. The products want matrices of one shape: a copy of
all factors in the activations' number format, and the gradients, are padded to the highest rank. The rank comes first
in both, so that a trial's own numbers are the beginning of its row. What lies beyond, and the factors of layers that a
trial does not adapt, are zero; their gradients are zero, too (each holds the other factor), so they stay zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from raytune_ft.training.bank.layout import Layout
from raytune_ft.training.bank.optimizer import adamw_, clip_rows_
from raytune_ft.training.bank.products import SegmentProducts, products_for
from raytune_ft.training.bank.slot import SlotSettings, SlotState, State, Target
from raytune_ft.training.bank.stacked_slot import Blocks, FactorPlan, Factors, StackedSlot, aligned
from raytune_ft.training.dropout import kept, thresholds


class StackedSlots:
    """The adapters of all trials, each with its AdamW, and what products over all of them need."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._slots: dict[str, StackedSlot] = {}
        self._plan = FactorPlan(())
        self._gradients: Blocks = []
        self._gradient_views: Factors = {}
        self._written: set[str] = set()  # the layers whose gradients hold something since `zero_gradients`
        self._copies: dict[torch.dtype, Blocks] = {}

    def admit(self, name: str, settings: SlotSettings, state: SlotState) -> None:
        """Gives a trial a slot that starts from `state`."""
        known = {target.name for target in self._plan.targets}
        fresh = tuple(target for target in settings.targets if target.name not in known)
        if fresh:
            self._plan = FactorPlan(self._plan.targets + fresh)
            self._slots = {
                other: StackedSlot(slot.settings, self._plan, slot.read("cpu"), self.device)
                for other, slot in self._slots.items()
            }
        self._slots[name] = StackedSlot(settings, self._plan, state, self.device)
        self._forget()

    def evict(self, name: str) -> None:
        """Frees all that a trial holds."""
        del self._slots[name]
        self._forget()

    def settings(self, name: str) -> SlotSettings:
        """What the trial was admitted with."""
        return self._slots[name].settings

    def read(self, name: str, *, on_device: bool = False) -> SlotState:
        """A copy of a slot: on the CPU, or where it is, which takes no time but memory there."""
        return self._slots[name].read(self.device if on_device else "cpu")

    def weights(self, name: str) -> State:
        """A copy of a slot's factors on the CPU."""
        slot = self._slots[name]
        return slot.named(slot.weights, "cpu")

    def order(self, names: Sequence[str]) -> list[str]:
        """In which order the trials' tokens have to lie: that of the slots."""
        wanted = set(names)
        return [name for name in self._slots if name in wanted]

    def zero_gradients(self, names: Sequence[str]) -> None:
        """Forgets all gradients: those of trials that don't step are of no use."""
        self._written.clear()

    def add_gradients(self, name: str, a: Tensor, b: Tensor) -> None:
        """Adds to the gradients of a layer's factors: [slots, highest rank, inputs], [slots, highest rank, outputs]."""
        for held, part in zip(self._views_of_gradients()[name], (a, b), strict=True):
            if name in self._written:
                held.add_(part)
            else:
                held.copy_(part)
        self._written.add(name)

    def step(self, rates: dict[str, float]) -> Tensor:
        """Clips and makes an AdamW step for the trials named in `rates`, at these learning rates.

        Trials that make no step keep every bit.

        Returns:
            [trials], the gradients' norms before clipping.
        """
        for name, (a, b) in self._views_of_gradients().items():
            if name not in self._written:
                a.zero_()
                b.zero_()
        limits = torch.tensor([slot.settings.max_grad_norm for slot in self._slots.values()])
        norms = clip_rows_(self._gradients, limits.to(self.device, non_blocking=True))
        rows = self._rows()
        torch._foreach_add_([self._slots[name].steps for name in rates], 1)
        for name, rate in rates.items():
            slot = self._slots[name]
            mine = [block[rows[name], : slot.settings.rank] for block in self._gradients]
            adamw_(slot.weights, mine, slot.exp_avg, slot.exp_avg_sq, slot.steps, slot.settings, rate)
        for copies in self._copies.values():
            self._refresh(copies, rates)
        chosen = torch.tensor([rows[name] for name in rates])
        return norms.index_select(0, chosen.to(self.device, non_blocking=True))

    def run(self, layout: Layout) -> StackedPass:
        """What the adapted layers compute while the tokens of `layout` go through the base."""
        return StackedPass(self, layout)

    def _views_of_gradients(self) -> Factors:
        if not self._gradients:
            self._gradients = self._plan.zeros(*self._shape(), device=self.device)
            self._gradient_views = self._plan.views(self._gradients)
        return self._gradient_views

    def factors(self, dtype: torch.dtype) -> Factors:
        """The factors of all slots, converted once a step for all layers."""
        if dtype not in self._copies:
            self._copies[dtype] = self._plan.zeros(*self._shape(), device=self.device, dtype=dtype)
            self._refresh(self._copies[dtype], self._slots)
        return self._plan.views(self._copies[dtype])

    def per_slot(self, names: Sequence[str], values: Sequence[int]) -> list[int]:
        """`values` of the trials `names`, spread over all slots; 0 for the others."""
        given = dict(zip(names, values, strict=True))
        return [given.get(name, 0) for name in self._slots]

    def _refresh(self, copies: Blocks, names: Iterable[str]) -> None:
        rows = self._rows()
        slots = [(rows[name], self._slots[name]) for name in names]
        padded = [block[row, : slot.settings.rank] for row, slot in slots for block in copies]
        torch._foreach_copy_(padded, [block for _, slot in slots for block in slot.weights])

    def _rows(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self._slots)}

    def _shape(self) -> tuple[int, int]:
        return len(self._slots), max(aligned(slot.settings.rank) for slot in self._slots.values())

    def _forget(self) -> None:
        """What has the shape of all slots is made anew, when it is needed next."""
        self._gradients, self._gradient_views = [], {}
        self._copies.clear()


class StackedPass:
    """One way of a batch through the base and back."""

    def __init__(self, slots: StackedSlots, layout: Layout) -> None:
        self._slots, self._layout = slots, layout
        device = slots.device
        self._lengths = slots.per_slot(layout.names, layout.tokens)
        self._products: dict[torch.dtype, tuple[Factors, SegmentProducts, Tensor]] = {}
        self._anchor = torch.zeros((), device=device, requires_grad=True)
        settings = [slots.settings(name) for name in layout.names]
        rates = [one.dropout if layout.keys is not None else 0.0 for one in settings]
        scales = torch.tensor([one.scale / (1 - rate) for one, rate in zip(settings, rates, strict=True)])
        counts = torch.tensor(layout.tokens)
        self._scales = torch.repeat_interleave(scales, counts).unsqueeze(1).to(device, non_blocking=True)
        self._limits = thresholds(rates, layout.tokens, device) if layout.keys is not None else None

    def linear(self, base: Any, target: Target, x: Tensor) -> Tensor:
        """`base` of x, plus each trial's low-rank product for its own tokens."""
        flat = x.reshape(-1, x.shape[-1])
        factors, products, scales = self._in_format(flat.dtype)
        mask = None
        if self._layout.keys is not None and self._limits is not None:
            mask = kept(self._layout.keys, target.index, target.inputs, self._limits)
        add = partial(self._slots.add_gradients, target.name)
        product = _Product(factors[target.name], products, scales=scales, mask=mask, add=add)
        if type(base) is nn.Linear:
            out = _FrozenLinear.apply(flat, self._anchor, base.weight, base.bias, product)  # type: ignore[no-untyped-call]
        else:
            out = base(x).reshape(-1, target.outputs) + _LowRank.apply(flat, self._anchor, product)  # type: ignore[no-untyped-call]
        return out.view(*x.shape[:-1], target.outputs)  # type: ignore[no-any-return]

    def _in_format(self, dtype: torch.dtype) -> tuple[Factors, SegmentProducts, Tensor]:
        """All factors and scales in the number format of the activations, and what multiplies them."""
        if dtype not in self._products:
            products = products_for(self._lengths, self._slots.device, dtype)
            self._products[dtype] = self._slots.factors(dtype), products, self._scales.to(dtype)
        return self._products[dtype]


class _Product:
    """The low-rank products of one layer, there and back."""

    def __init__(
        self,
        factors: tuple[Tensor, Tensor],
        products: SegmentProducts,
        *,
        scales: Tensor,
        mask: Tensor | None,
        add: Callable[[Tensor, Tensor], None],
    ) -> None:
        self.a, self.b = factors  # [slots, rank, inputs] and [slots, rank, outputs]
        self.scales, self.products, self._add = scales, products, add
        self._kept: Callable[[Tensor], Tensor] = lambda x: x if mask is None else torch.where(mask, x, 0.0)

    def low(self, x: Tensor) -> Tensor:
        """[tokens, rank]: scaled products with A."""
        return self.products.apply(self._kept(x), self.a.transpose(1, 2)).mul_(self.scales)

    def high(self, low: Tensor) -> Tensor:
        """[tokens, outputs]."""
        return self.products.apply(low, self.b)

    def back(self, gradient: Tensor, x: Tensor, low: Tensor, *, wanted: bool) -> Tensor | None:
        """Adds to the factors' gradients; the gradient of x, where it is wanted."""
        gradient_low = self.products.apply(gradient, self.b.transpose(1, 2)).mul_(self.scales)
        outer = self.products.outer
        self._add(outer(gradient_low, self._kept(x)), outer(low, gradient))
        return self._kept(self.products.apply(gradient_low, self.a)) if wanted else None


class _FrozenLinear(torch.autograd.Function):
    """A frozen linear layer with products: no gradient of its weight."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd hands arguments over by their places
        ctx: Any, x: Tensor, anchor: Tensor, weight: Tensor, bias: Tensor | None, product: _Product
    ) -> Tensor:
        out = F.linear(x, weight, bias)
        low = product.low(x)
        out += product.high(low)
        ctx.save_for_backward(x, weight, low)
        ctx.product = product
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        gradient = gradients[0].contiguous()
        x, weight, low = ctx.saved_tensors
        wanted = ctx.needs_input_grad[0]
        added = ctx.product.back(gradient, x, low, wanted=wanted)
        return (added.addmm_(gradient, weight) if wanted else None), None, None, None, None


class _LowRank(torch.autograd.Function):
    """The products alone, for a layer that differentiates itself (a quantized one)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, product: _Product) -> Tensor:
        low = product.low(x)
        ctx.save_for_backward(x, low)
        ctx.product = product
        return product.high(low)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        gradient = gradients[0].contiguous()
        x, low = ctx.saved_tensors
        return ctx.product.back(gradient, x, low, wanted=ctx.needs_input_grad[0]), None, None

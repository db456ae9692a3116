"""Adapters stacked to the highest rank: what GPUs do fastest, since launches don't grow with the number of trials.

Rows of A and columns of B beyond a trial's rank, and the factors of layers that it does not adapt, are zero. Their
gradients are zero, too (each holds the other factor), so they stay zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from raytune_ft.training.bank.dropout import kept, thresholds
from raytune_ft.training.bank.layout import Layout
from raytune_ft.training.bank.optimizer import RowRates, adamw_rows_, clip_rows_
from raytune_ft.training.bank.products import SegmentProducts, products_for
from raytune_ft.training.bank.slot import SlotSettings, SlotState, State, Target, factor_views, flat_size

_ALIGNED = 8  # grouped products want rows of whole 16 bytes, also in bf16
_MATRICES = ("weights", "gradients", "exp_avg", "exp_avg_sq")


class StackedSlots:
    """The adapters of all trials as rows of one matrix, and the AdamW of all rows."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._rows: dict[str, int] = {}
        self._settings: dict[str, SlotSettings] = {}
        self._targets: tuple[Target, ...] = ()
        self._rank = 0
        self._matrices = {key: torch.zeros(0, 0, device=device) for key in _MATRICES}
        self._rates = RowRates.empty(0, device)
        self._steps = torch.zeros(0, device=device)

    def admit(self, name: str, settings: SlotSettings, state: SlotState) -> None:
        """Gives a trial a row that starts from `state`; the matrix grows where it has to."""
        self._reshape(settings)
        row = min(set(range(len(self._steps))) - set(self._rows.values()))
        self._rows[name], self._settings[name] = row, settings
        self._fill(row, settings, state)

    def evict(self, name: str) -> None:
        """Frees a trial's row; what is in it stays zero until the next one comes."""
        row = self._rows.pop(name)
        del self._settings[name]
        for matrix in self._matrices.values():
            matrix[row].zero_()

    def settings(self, name: str) -> SlotSettings:
        """What the trial was admitted with."""
        return self._settings[name]

    def read(self, name: str) -> SlotState:
        """A copy of a slot on the CPU."""
        step = int(self._steps[self._rows[name]])
        weights = self._named(name, self._matrices["weights"])
        if not step:
            return SlotState.initial(weights)
        first, second = (self._named(name, self._matrices[key]) for key in ("exp_avg", "exp_avg_sq"))
        return SlotState(weights, first, second, step)

    def order(self, names: Sequence[str]) -> list[str]:
        """In which order the trials' tokens have to lie: that of their rows."""
        return sorted(names, key=self._rows.__getitem__)

    def zero_gradients(self, names: Sequence[str]) -> None:
        """Forgets all gradients: those of trials that don't step are zero anyway."""
        self._matrices["gradients"].zero_()

    def step(self, rates: dict[str, float]) -> Tensor:
        """Clips and makes an AdamW step for the trials named in `rates`, at these learning rates.

        Returns:
            [trials], the gradients' norms before clipping.
        """
        everyone = len(rates) == len(self._steps)
        rows = torch.tensor([self._rows[name] for name in rates]).to(self.device, non_blocking=True)
        learning_rates = torch.tensor(list(rates.values())).to(self.device, non_blocking=True)
        # Rows that make no step are left out, not multiplied by zero: they keep every bit.
        some = {key: matrix.index_select(0, rows) for key, matrix in self._matrices.items() if not everyone}
        if everyone:
            some = self._matrices
            order = torch.empty_like(rows).scatter_(0, rows, torch.arange(len(rows), device=self.device))
            learning_rates = learning_rates.index_select(0, order)
            chosen = self._rates
            steps = self._steps.add_(1)
        else:
            chosen = self._rates.take(rows)
            self._steps.index_add_(0, rows, torch.ones_like(learning_rates))
            steps = self._steps.index_select(0, rows)
        norms = clip_rows_(some["gradients"], chosen.max_grad_norm)
        adamw_rows_(**some, steps=steps, learning_rates=learning_rates, rates=chosen)
        if everyone:
            return norms.index_select(0, rows)
        for key in ("weights", "exp_avg", "exp_avg_sq"):
            self._matrices[key].index_copy_(0, rows, some[key])
        return norms

    def run(self, layout: Layout) -> StackedPass:
        """What the adapted layers compute while the tokens of `layout` go through the base."""
        return StackedPass(self, layout)

    def factors(self, matrix: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """The stacked factors of each layer as views: A [slots, rank, inputs], B [slots, outputs, rank]."""
        return factor_views(matrix, self._targets, self._rank)

    def matrix(self, key: str) -> Tensor:
        """[slots, size] ``weights`` or ``gradients`` of all slots."""
        return self._matrices[key]

    def per_row(self, names: Sequence[str], values: Sequence[int]) -> list[int]:
        """`values` of the trials `names`, spread over all rows; 0 for the others."""
        spread = [0] * len(self._steps)
        for name, value in zip(names, values, strict=True):
            spread[self._rows[name]] = value
        return spread

    def _reshape(self, settings: SlotSettings) -> None:
        """Makes room for one more trial: a row, its rank, its layers."""
        rank = max(self._rank, -(-settings.rank // _ALIGNED) * _ALIGNED)
        known = {target.name for target in self._targets}
        targets = self._targets + tuple(target for target in settings.targets if target.name not in known)
        rows = max(len(self._steps), len(self._rows) + 1)
        if (rank, len(targets), rows) == (self._rank, len(self._targets), len(self._steps)):
            return
        before = {name: (self._settings[name], self.read(name)) for name in self._rows}
        places = dict(self._rows)
        self._targets, self._rank = targets, rank
        size = flat_size(targets, rank)
        self._matrices = {key: torch.zeros(rows, size, device=self.device) for key in _MATRICES}
        self._rates, self._steps = RowRates.empty(rows, self.device), torch.zeros(rows, device=self.device)
        for name, (old, state) in before.items():
            self._fill(places[name], old, state)

    def _fill(self, row: int, settings: SlotSettings, state: SlotState) -> None:
        for key in _MATRICES:
            self._matrices[key][row].zero_()
        for key in ("weights", "exp_avg", "exp_avg_sq"):
            tensors: State = getattr(state, key)
            views = self.factors(self._matrices[key][row])
            for target in settings.targets if tensors else ():
                a, b = (tensors[name] for name in target.factors)
                stacked_a, stacked_b = views[target.name]
                stacked_a[: settings.rank].copy_(a)
                stacked_b[:, : settings.rank].copy_(b)
        self._steps[row] = state.step
        self._rates.beta1[row], self._rates.beta2[row] = settings.betas
        self._rates.epsilon[row] = settings.epsilon
        self._rates.weight_decay[row] = settings.weight_decay
        self._rates.max_grad_norm[row] = settings.max_grad_norm

    def _named(self, name: str, matrix: Tensor) -> State:
        settings = self._settings[name]
        views = self.factors(matrix[self._rows[name]])
        state: State = {}
        for target in settings.targets:
            a, b = views[target.name]
            pair = a[: settings.rank], b[:, : settings.rank]
            state |= {
                key: view.to("cpu", copy=True).contiguous() for key, view in zip(target.factors, pair, strict=True)
            }
        return state


class StackedPass:
    """One way of a batch through the base and back."""

    def __init__(self, slots: StackedSlots, layout: Layout) -> None:
        self._slots, self._layout = slots, layout
        device = slots.device
        self._lengths = slots.per_row(layout.names, layout.tokens)
        self._gradients = slots.factors(slots.matrix("gradients"))
        self._by_format: dict[torch.dtype, tuple[dict[str, tuple[Tensor, Tensor]], SegmentProducts]] = {}
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
        views, products = self._factors(flat.dtype)
        mask = None
        if self._layout.keys is not None and self._limits is not None:
            mask = kept(self._layout.keys, target.index, target.inputs, self._limits)
        factors, gradients = views[target.name], self._gradients[target.name]
        product = _Product(factors, gradients, products, scales=self._scales, mask=mask)
        if type(base) is nn.Linear:
            out = _FrozenLinear.apply(flat, self._anchor, base.weight, base.bias, product)  # type: ignore[no-untyped-call]
        else:
            out = base(x).reshape(-1, target.outputs) + _LowRank.apply(flat, self._anchor, product)  # type: ignore[no-untyped-call]
        return out.view(*x.shape[:-1], target.outputs)  # type: ignore[no-any-return]

    def _factors(self, dtype: torch.dtype) -> tuple[dict[str, tuple[Tensor, Tensor]], SegmentProducts]:
        """All factors in the number format of the activations, converted once for all layers."""
        if dtype not in self._by_format:
            views = self._slots.factors(self._slots.matrix("weights").to(dtype))
            self._by_format[dtype] = views, products_for(self._lengths, self._slots.device, dtype)
        return self._by_format[dtype]


class _Product:
    """The low-rank products of one layer, there and back."""

    def __init__(
        self,
        factors: tuple[Tensor, Tensor],
        gradients: tuple[Tensor, Tensor],
        products: SegmentProducts,
        *,
        scales: Tensor,
        mask: Tensor | None,
    ) -> None:
        self.a, self.b = factors
        self.gradient_a, self.gradient_b = gradients
        self.scales, self.products = scales.to(self.a.dtype), products
        self._kept: Callable[[Tensor], Tensor] = lambda x: x if mask is None else torch.where(mask, x, 0.0)

    def low(self, x: Tensor) -> Tensor:
        """[tokens, rank]: scaled products with A."""
        return self.products.apply(self._kept(x), self.a.transpose(1, 2)) * self.scales

    def high(self, low: Tensor) -> Tensor:
        """[tokens, outputs]."""
        return self.products.apply(low, self.b.transpose(1, 2))

    def back(self, gradient: Tensor, x: Tensor, low: Tensor, *, wanted: bool) -> Tensor | None:
        """Adds to the factors' gradients; the gradient of x, where it is wanted."""
        gradient_low = self.products.apply(gradient, self.b) * self.scales
        self.gradient_b += self.products.outer(gradient, low)
        self.gradient_a += self.products.outer(gradient_low, self._kept(x))
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

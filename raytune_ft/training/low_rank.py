"""The low-rank product beside a frozen layer, with no tensor of the layer's size but its output and input gradient.

The arithmetic of adapters that are trained together (`bank.ragged`) and alone (`fused_lora`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_NARROW = 16


def narrow_product(left: Tensor, right: Tensor) -> Tensor:
    """[rows, inner] times [inner, rank]; on CPUs, of low rank, computed the other way round.

    MKL takes up to five times as long where the result's inner side is narrower than its vectors.
    """
    if left.is_cuda or right.shape[1] >= _NARROW:
        return left @ right
    return (right.t() @ left.t()).t()


@dataclass(frozen=True)
class Product:
    """What an adapter adds to a layer: scale * kept(x) A^T B^T."""

    a: Tensor
    """[rank, inputs]."""
    b: Tensor
    """[outputs, rank]."""
    scale: float
    kept: Tensor | None
    """[tokens, inputs] bool, the features that dropout keeps; None keeps all."""

    def inputs(self, x: Tensor) -> Tensor:
        """[tokens, inputs] without the dropped features, in the factors' number format."""
        mine = x.to(self.a.dtype)
        return mine if self.kept is None else torch.where(self.kept, mine, 0.0)

    def add(self, out: Tensor, x: Tensor) -> Tensor:
        """Adds the product to `out` [tokens, outputs], and returns its scaled first half [tokens, rank]."""
        low = narrow_product(self.inputs(x), self.a.t()).mul_(self.scale)
        if out.dtype == low.dtype:
            out.addmm_(low, self.b.t())
        else:
            out += (low @ self.b.t()).to(out.dtype)
        return low

    def back(self, gradient: Tensor, gradient_x: Tensor | None) -> tuple[Tensor, Tensor]:
        """Adds to the gradient of x [tokens, inputs], where one is wanted.

        Returns:
            The output's gradient in the factors' format, and that of the first half: the gradient of B is the former
            against that half, the gradient of A the latter against the inputs.
        """
        mine = gradient.to(self.b.dtype)
        gradient_low = narrow_product(mine, self.b).mul_(self.scale)
        if gradient_x is not None:
            if self.kept is None and gradient_x.dtype == self.a.dtype:
                gradient_x.addmm_(gradient_low, self.a)
            else:
                back = gradient_low @ self.a
                gradient_x += (back if self.kept is None else torch.where(self.kept, back, 0.0)).to(gradient_x.dtype)
        return mine, gradient_low

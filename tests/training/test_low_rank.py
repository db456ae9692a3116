"""Products of low rank, whichever way round they are computed."""

from __future__ import annotations

import pytest
import torch

from raytune_ft.training.low_rank import Product, narrow_product


@pytest.mark.parametrize("rank", [1, 4, 15, 16, 40])
def test_a_narrow_product_is_the_plain_one(rank: int) -> None:
    torch.manual_seed(0)
    left, right = torch.randn(50, 24, dtype=torch.float64), torch.randn(24, rank, dtype=torch.float64)
    for one, other in ((left, right), (left.t().contiguous().t(), right.t().contiguous().t())):
        torch.testing.assert_close(narrow_product(one, other), left @ right)


@pytest.mark.parametrize("rank", [4, 32])
@pytest.mark.parametrize("dropped", [False, True])
def test_a_products_output_and_gradients_are_autograds(rank: int, dropped: bool) -> None:
    torch.manual_seed(0)
    x, a, b = (torch.randn(*size, requires_grad=True) for size in ((50, 24), (rank, 24), (40, rank)))
    kept = torch.rand(50, 24) > 0.3 if dropped else None
    given = x if kept is None else torch.where(kept, x, 0.0)
    wanted = 0.5 * given @ a.t() @ b.t()
    gradient = torch.randn(50, 40)
    gradient_x, gradient_a, gradient_b = torch.autograd.grad(wanted, (x, a, b), gradient)
    with torch.no_grad():
        product = Product(a, b, 0.5, kept)
        out, found_x = torch.zeros(50, 40), torch.zeros(50, 24)
        low = product.add(out, x)
        mine, gradient_low = product.back(gradient, found_x)
        for found, expected in (
            (out, wanted),
            (found_x, gradient_x),
            (gradient_low.t() @ product.inputs(x), gradient_a),
            (mine.t() @ low, gradient_b),
        ):
            torch.testing.assert_close(found, expected.detach(), atol=1e-4, rtol=1e-4)

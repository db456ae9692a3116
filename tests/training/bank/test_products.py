"""Both ways of batching ragged segments against a loop."""

from __future__ import annotations

import math

import pytest
import torch

from raytune_ft.training.bank.products import GroupedProducts, PaddedProducts

LENGTHS = (3, 0, 7, 1)


@pytest.mark.parametrize("kind", [GroupedProducts, PaddedProducts])
def test_products_are_those_of_a_loop(kind: type) -> None:
    torch.manual_seed(0)
    products = kind(LENGTHS, torch.device("cpu"))
    x, y, matrices = torch.randn(11, 8), torch.randn(11, 16), torch.randn(4, 8, 16)
    torch.testing.assert_close(
        products.apply(x, matrices),
        torch.cat([part @ matrix for part, matrix in zip(x.split(LENGTHS), matrices, strict=True)]),
    )
    torch.testing.assert_close(
        products.outer(x, y),
        torch.stack([a.t() @ b for a, b in zip(x.split(LENGTHS), y.split(LENGTHS), strict=True)]),
    )


@pytest.mark.parametrize("kind", [GroupedProducts, PaddedProducts])
def test_nan_in_one_segment_stays_there(kind: type) -> None:
    products = kind(LENGTHS, torch.device("cpu"))
    x, y = torch.ones(11, 8), torch.ones(11, 16)
    x[0] = math.nan  # the first token, which padding reads
    assert products.apply(x, torch.ones(4, 8, 16))[3:].isfinite().all()
    assert products.outer(x, y)[1:].isfinite().all()
    assert products.outer(x, y)[0].isnan().all()

"""Products of ragged segments with stacked matrices, in a number of calls that does not grow with the segments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own convention


class SegmentProducts(Protocol):
    """Products over segments that lie end to end, segment k with matrix k."""

    def apply(self, x: Tensor, matrices: Tensor) -> Tensor:
        """[tokens, in] and [segments, in, out] to [tokens, out]."""

    def outer(self, left: Tensor, right: Tensor) -> Tensor:
        """[tokens, left] and [tokens, right] to [segments, left, right]: the sum over each segment's tokens."""


class GroupedProducts:
    """By `torch.nn.functional.grouped_mm`; on GPUs that is one kernel for bf16."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self._ends = torch.tensor(lengths).cumsum(0).to(device=device, dtype=torch.int32, non_blocking=True)

    def apply(self, x: Tensor, matrices: Tensor) -> Tensor:
        """See `SegmentProducts.apply`."""
        return F.grouped_mm(x, matrices, offs=self._ends)

    def outer(self, left: Tensor, right: Tensor) -> Tensor:
        """See `SegmentProducts.outer`."""
        return F.grouped_mm(left.t(), right, offs=self._ends)


class PaddedProducts:
    """By batched products of segments padded to the longest: for the formats that grouped kernels don't take."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        longest = max(lengths)
        sizes = torch.tensor(lengths)
        places = torch.arange(longest)
        real = places < sizes.unsqueeze(1)  # [segments, longest]
        starts = sizes.cumsum(0) - sizes
        self._shape = real.shape
        # Padding reads token 0 and is then replaced by zeros, so that it adds nothing, whatever token 0 holds.
        self._source = torch.where(real, starts.unsqueeze(1) + places, 0).flatten().to(device, non_blocking=True)
        self._padding = (~real).flatten().unsqueeze(1).to(device, non_blocking=True)
        self._back = real.flatten().nonzero().squeeze(1).to(device, non_blocking=True)

    def apply(self, x: Tensor, matrices: Tensor) -> Tensor:
        """See `SegmentProducts.apply`."""
        return torch.bmm(self._padded(x), matrices).flatten(0, 1).index_select(0, self._back)

    def outer(self, left: Tensor, right: Tensor) -> Tensor:
        """See `SegmentProducts.outer`."""
        return torch.bmm(self._padded(left).transpose(1, 2), self._padded(right))

    def _padded(self, x: Tensor) -> Tensor:
        return x.index_select(0, self._source).masked_fill_(self._padding, 0.0).view(*self._shape, -1)


def products_for(lengths: Sequence[int], device: torch.device, dtype: torch.dtype) -> SegmentProducts:
    """The way that is fastest for this device and number format."""
    if device.type == "cuda" and dtype != torch.bfloat16:
        return PaddedProducts(lengths, device)
    return GroupedProducts(lengths, device)

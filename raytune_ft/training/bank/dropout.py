"""Dropout masks as a function of (trial seed, step, layer, row, position, feature): no random stream is shared.

A counter is hashed by the finalizer of splitmix64 (Steele, Lea and Flood, 2014); each 64-bit result decides four
features by 16 bits each, so a dropout rate is exact to 1/65536.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_WORD = (1 << 64) - 1
_LANES = 4


def row_key(seed: int, step: int, row: int) -> int:
    """The key of a row: `row` is its place in the batch of optimizer step `step`."""
    key = 0
    for part in (seed, step, row):
        key = _mixed((key + part + 1) * _GAMMA & _WORD)
    return _signed(key)


def token_keys(row_keys: Tensor, lengths: Tensor, positions: Tensor) -> Tensor:
    """[tokens] int64 keys, from the [rows] keys and lengths and each token's [tokens] position in its row."""
    keys = torch.repeat_interleave(row_keys, lengths, output_size=len(positions))
    return _mix_(keys.add_(positions, alpha=_signed(_FIRST)))


def kept(keys: Tensor, layer: int, width: int, rates: Tensor | float) -> Tensor:
    """Which features stay.

    Args:
        keys: [tokens], of `token_keys`.
        layer: number of the layer.
        width: number of features.
        rates: share of features that are dropped; a number, or thresholds [tokens, 1] of `thresholds`.

    Returns:
        [tokens, width] bool.
    """
    blocks = -(-width // _LANES)
    salt = _mixed((layer + 1) * _GAMMA & _WORD)
    lanes = torch.arange(1, blocks + 1, device=keys.device, dtype=torch.int64).mul_(_signed(_GAMMA)).add_(_signed(salt))
    words = _mix_(keys.unsqueeze(1) + lanes)
    limit = rates if isinstance(rates, Tensor) else _threshold(rates)
    return words.view(torch.int16)[:, :width] >= limit


def thresholds(rates: Sequence[float], tokens: Sequence[int], device: torch.device | str) -> Tensor:
    """[all tokens, 1] int16 for `kept`: each trial's rate, repeated for its tokens."""
    limits = torch.tensor([_threshold(rate) for rate in rates], dtype=torch.int16)
    return torch.repeat_interleave(limits, torch.tensor(tokens)).unsqueeze(1).to(device)


def _threshold(rate: float) -> int:
    return min(round(rate * 65536), 65535) - 32768


def _mix_(words: Tensor) -> Tensor:
    # Torch shifts int64 arithmetically; masking off the copied sign bits makes it the logical shift of the paper.
    for shift, factor in ((30, _FIRST), (27, _SECOND), (31, None)):
        words ^= (words >> shift).bitwise_and_((1 << (64 - shift)) - 1)
        if factor is not None:
            words *= _signed(factor)
    return words


def _mixed(word: int) -> int:
    word = (word ^ word >> 30) * _FIRST & _WORD
    word = (word ^ word >> 27) * _SECOND & _WORD
    return word ^ word >> 31


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word

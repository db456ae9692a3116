"""Dropout masks as a function of (seed, step, layer, row, position, feature): no random stream is shared.

So a row is dropped out alike whoever computes it: one worker or several, in any micro-batches, alone or in a bank.

A counter is hashed by the finalizer of splitmix64 (Steele, Lea and Flood, 2014); each 64-bit result decides four
features by 16 bits each, so a dropout rate is exact to 1/65536.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from raytune_ft.models.collate import PackedBatch

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


def batch_keys(row_keys: Sequence[int], batch: PackedBatch) -> Tensor:
    """[tokens] int64 keys of a batch on the CPU, from those of its rows."""
    return token_keys(torch.tensor(row_keys), batch.cu_seq_lens.diff().long(), batch.position_ids[0])


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


class RowDropout(nn.Dropout):
    """Dropout of a numbered layer by the rows that are computed (`dropped_by_row`).

    A layer that sees only some of their tokens, as an expert does, draws from torch's random stream.
    """

    def __init__(self, rate: float, layer: int) -> None:
        super().__init__(rate)
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., width] with features at 0 and the others larger; in eval mode as it is."""
        if not self.training or not self.p:
            return x
        mask = self.mask(x.reshape(-1, x.shape[-1])).view_as(x)
        return torch.where(mask, x / (1 - self.p), 0.0)

    def mask(self, flat: Tensor) -> Tensor:
        """[tokens, width] bool, which features of `flat` stay."""
        if _keys_now is None or len(_keys_now) != len(flat):
            return torch.empty_like(flat, dtype=torch.bool).bernoulli_(1 - self.p)
        return kept(_keys_now, self.layer, flat.shape[1], self.p)


_keys_now: Tensor | None = None  # not by thread: on GPUs a backward pass computes checkpointed layers in one of its own


@contextmanager
def dropped_by_row(batch: PackedBatch, seed: int, step: int, device: torch.device | str) -> Iterator[None]:
    """Within the block, forward and backward passes over `batch` are dropped out by its rows.

    Args:
        batch: on the CPU. If it does not know its rows' places in their step, masks come from torch's stream.
        seed: of the run.
        step: number of the optimizer step, from 1.
        device: where the model is.
    """
    global _keys_now  # noqa: PLW0603 - see above
    if batch.places is None:
        yield
        return
    rows = [row_key(seed, step, place) for place in batch.places.tolist()]
    _keys_now = batch_keys(rows, batch).to(device, non_blocking=True)
    try:
        yield
    finally:
        _keys_now = None


def drop_by_row(model: Any, numbers: dict[str, int]) -> None:
    """Has the LoRA layers of a PEFT model drop features by rows.

    Args:
        model: with a fresh adapter.
        numbers: of the base's linear layers, by their names.
    """
    from peft.tuners.lora import LoraLayer

    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        for adapter, dropout in layer.lora_dropout.items():
            if isinstance(dropout, nn.Dropout):
                layer.lora_dropout[adapter] = RowDropout(dropout.p, numbers.get(name, len(numbers)))


def linear_numbers(model: Any) -> dict[str, int]:
    """The number of each linear layer of a model without adapters, by its name."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return {name: number for number, name in enumerate(linear)}


def thresholds(rates: Sequence[float], tokens: Sequence[int], device: torch.device | str) -> Tensor:
    """[all tokens, 1] int16 for `kept`: each trial's rate, repeated for its tokens."""
    limits = torch.tensor([_threshold(rate) for rate in rates], dtype=torch.int16)
    return torch.repeat_interleave(limits, torch.tensor(tokens)).unsqueeze(1).to(device, non_blocking=True)


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

"""Masks that depend on who, when and where, and on nothing else."""

from __future__ import annotations

import pytest
import torch

from raytune_ft.training.bank.dropout import kept, row_key, thresholds, token_keys


def keys(seed: int = 0, step: int = 1, lengths: tuple[int, ...] = (40, 60)) -> torch.Tensor:
    rows = torch.tensor([row_key(seed, step, row) for row in range(len(lengths))])
    positions = torch.cat([torch.arange(length) for length in lengths])
    return token_keys(rows, torch.tensor(lengths), positions)


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.5, 0.9])
def test_the_share_of_dropped_features_is_the_rate(rate: float) -> None:
    mask = kept(keys(lengths=(500, 500)), 3, 1001, rate)
    # 1,001,000 draws: three standard deviations are below 0.0015.
    assert 1 - mask.float().mean().item() == pytest.approx(rate, abs=1.5e-3)
    assert (1 - mask.float().mean(dim=0)).sub(rate).abs().max() < 0.08  # no column is special (1000 draws each)
    assert (1 - mask.float().mean(dim=1)).sub(rate).abs().max() < 0.08  # and no token


def test_every_part_of_the_key_changes_half_of_a_mask_of_one_half() -> None:
    base = kept(keys(), 0, 256, 0.5)
    others = {
        "seed": kept(keys(seed=1), 0, 256, 0.5),
        "step": kept(keys(step=2), 0, 256, 0.5),
        "layer": kept(keys(), 1, 256, 0.5),
        "row": kept(keys(lengths=(50, 50)).roll(50), 0, 256, 0.5)[:40],
        "position": kept(keys().roll(1), 0, 256, 0.5)[1:40],
    }
    for name, other in others.items():
        mine = {"row": base[:40], "position": base[1:40]}.get(name, base)
        assert (mine != other).float().mean().item() == pytest.approx(0.5, abs=0.02), name
    assert (base[:, :-1] != base[:, 1:]).float().mean().item() == pytest.approx(0.5, abs=0.02)


def test_a_rows_mask_does_not_depend_on_the_rows_beside_it() -> None:
    together, alone = kept(keys(lengths=(40, 60)), 2, 30, 0.4), kept(keys(lengths=(40,)), 2, 30, 0.4)
    assert torch.equal(together[:40], alone)


def test_a_rate_per_token_gives_the_masks_of_each_rate() -> None:
    both = kept(keys(), 5, 64, thresholds([0.2, 0.0], [40, 60], "cpu"))
    assert torch.equal(both[:40], kept(keys(), 5, 64, 0.2)[:40])
    assert both[40:].all()


def test_the_hash_is_splitmix64() -> None:
    # First output of splitmix64 seeded with 0, from its reference implementation: key 0 plus one gamma, mixed.
    from raytune_ft.training.bank import dropout

    assert dropout._mixed(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF
    words = torch.tensor([dropout._signed(0x9E3779B97F4A7C15)])
    assert int(dropout._mix_(words)) == dropout._signed(0xE220A8397B1DCDAF)

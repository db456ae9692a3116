"""What a pass tells of each trial."""

from __future__ import annotations

import torch

from raytune_ft.training.bank.passes import sums_by_trial


def test_a_trials_sum_takes_in_its_own_targets_only() -> None:
    sums = sums_by_trial(torch.tensor([1.0, 2.0, torch.nan, 4.0]), torch.tensor([2, 0, 1, 1]))
    assert sums[[0, 1, 3]].tolist() == [3.0, 0.0, 4.0]
    assert sums[2].isnan()

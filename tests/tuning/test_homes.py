"""How many trials train at a time, and what of the cluster their banks get."""

from __future__ import annotations

from typing import Any

import pytest

from raytune_ft.core.errors import ConfigError
from raytune_ft.core.placement import Node
from raytune_ft.tuning.config import SweepConfig
from raytune_ft.tuning.homes import (
    apart,
    bank_count,
    bank_cpus,
    left_for_banks,
    own_together,
    refuse_pausing,
    together,
)
from raytune_ft.tuning.packs import Packs


def sweep(**changes: Any) -> SweepConfig:
    training = {"model_path": "model", "dataset_path": "dataset", **changes.pop("training", {})}
    return SweepConfig(**{"output_dir": "out", "space": {"lora_r": [2, 8]}, "training": training, **changes})


@pytest.mark.parametrize(
    ("nodes", "trials", "gpus", "cpus", "threads"),
    [
        ([Node(2)], 16, 0, 1, 2),  # 2 - 0.16, in whole CPUs
        ([Node(1)], 4, 0, 0.96, 1),
        ([Node(16, 8)], 32, 8, 1, 2),  # (16 - 0.32) / 8
        ([Node(4), Node(16, 1, 3)], 8, 3, 15, 16),
    ],
)
def test_a_bank_leaves_room_for_the_proxies(nodes, trials, gpus, cpus, threads) -> None:
    assert bank_cpus(nodes, trials, gpus) == (cpus, threads)


@pytest.mark.parametrize(
    ("nodes", "trials", "use_gpu", "count"),
    [
        ([Node(2)], 16, False, 1),
        ([Node(2, 0, 2), Node(1)], 16, False, 2),  # the small node would hold up the trials that fall to it
        ([Node(2, 0, 3)], 2, False, 2),
        ([Node(16, 8, 2)], 32, True, 16),
        ([Node(16, 8, 2)], 4, True, 4),
        ([Node(8)], 4, True, 1),  # none now: the resource plan says so
    ],
)
def test_there_is_a_bank_for_each_gpu_or_each_large_node(nodes, trials, use_gpu, count) -> None:
    assert bank_count(nodes, trials, use_gpu=use_gpu) == count


def test_banks_share_the_node_that_they_are_on() -> None:
    assert bank_cpus([Node(2)], 8, 0, 2) == (0.96, 1)  # (2 - 0.08) / 2
    assert bank_cpus([Node(16, 2)], 32, 2, 3) == (2, 2)  # three on each of two GPUs: (16 - 0.32) / 6


@pytest.mark.parametrize(
    ("nodes", "changes", "trials", "at_a_time"),
    [
        ([Node(2)], {}, 16, 8),  # four a core keep it busy
        ([Node(2)], {}, 3, 3),
        ([Node(4, 0, 2), Node(1)], {}, 100, 32),  # banks are on the large nodes
        # those of a population wait for each other
        ([Node(2)], {"scheduler": "pbt", "space": {"learning_rate": [1e-4, 1e-3]}}, 80, 80),
        ([Node(2)], {"scheduler": "hyperband", "training": {"max_steps": 8}}, 80, 64),
        ([Node(16, 1)], {}, 100, 64),
        ([Node(16, 1)], {"training": {"use_gpu": False}}, 100, 64),
        ([Node(2)], {"max_concurrent_trials": 12}, 16, 12),
    ],
)
def test_as_many_trials_run_at_a_time_as_keep_the_banks_busy(nodes, changes, trials, at_a_time) -> None:
    assert together(sweep(**changes), nodes, trials) == at_a_time


@pytest.mark.parametrize(
    ("changes", "which", "reason"),
    [
        ({"packed": "never"}, ["all trials"], "packed: never"),
        ({"space": {"precision": ["fp32", "bf16"]}}, [], ""),
        ({"space": {"use_dora": [False, True]}}, ["use_dora True"], "a packed sweep adds low-rank products"),
        ({"training": {"method": "full"}, "space": {"seed": [0, 1]}}, ["all trials"], "method full trains the base"),
        ({"training": {"num_workers": 2}}, ["all trials"], "num_workers is 2"),
        ({}, [], ""),
    ],
)
def test_what_keeps_trials_apart_is_named(changes, which, reason) -> None:
    config = sweep(**changes)
    told = apart(config, Packs.of(config.space, config.training))
    assert list(told) == which and all(reason in why for why in told.values())


@pytest.mark.parametrize("scheduler", ["pbt", "hyperband"])
def test_a_scheduler_that_pauses_trials_is_refused_where_some_share_no_base(scheduler: str) -> None:
    config = sweep(space={"use_dora": [False, True]}, scheduler=scheduler, training={"max_steps": 8})
    with pytest.raises(ConfigError, match=f"scheduler: {scheduler} pauses .* use_dora True .*set scheduler: asha"):
        refuse_pausing(config, apart(config, Packs.of(config.space, config.training)))
    refuse_pausing(config, {})
    refuse_pausing(sweep(), {"all trials": "packed: never"})


@pytest.mark.parametrize(
    ("nodes", "use_gpu", "left"),
    [
        ([Node(2)], False, [Node(1)]),
        ([Node(1)], False, []),  # a trial of its own takes all of it
        ([Node(4), Node(16, 0, 3)], False, [Node(4), Node(15, 0, 3)]),
        ([Node(16, 1)], True, []),  # one GPU holds a bank or a run
        ([Node(16, 2)], True, [Node(15, 1)]),
        ([Node(16, 1, 3), Node(4)], True, [Node(4), Node(16, 1, 2)]),
        ([Node(16, 8, 2)], True, [Node(16, 8), Node(15, 7)]),
    ],
)
def test_banks_leave_room_for_a_trial_that_shares_no_base(nodes, use_gpu, left) -> None:
    assert left_for_banks(sweep(), nodes, use_gpu=use_gpu) == left


@pytest.mark.parametrize(
    ("nodes", "changes", "use_gpu", "at_a_time"),
    [
        ([Node(2)], {}, False, 2),
        ([Node(2)], {"cpus_per_trial": 0.5}, False, 4),
        ([Node(2)], {"cpus_per_trial": 4}, False, 1),  # the resource plan says that there is no room
        ([Node(16, 2, 2)], {}, True, 4),
        ([Node(4, 8)], {"cpus_per_trial": 2}, True, 2),
        ([Node(16, 2, 2)], {"max_concurrent_trials": 3}, True, 3),
    ],
)
def test_as_many_runs_of_their_own_as_there_are_cpus_or_gpus(nodes, changes, use_gpu, at_a_time) -> None:
    assert own_together(sweep(**changes), nodes, 100, use_gpu=use_gpu) == at_a_time

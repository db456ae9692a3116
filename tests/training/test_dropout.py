"""Masks that depend on who, when and where, and on nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from raytune_ft.models.chat import Encoded
from raytune_ft.models.collate import pack
from raytune_ft.training.config_alignment import PreferenceConfig
from raytune_ft.training.dropout import RowDropout, dropped_by_row, kept, row_key, thresholds, token_keys
from raytune_ft.training.session import Seat, train_in_process
from raytune_ft.tuning.host import BankHost

from ..rows import pair_files, rated_files  # noqa: TID252 - tests are no installed package
from .test_ranks import history, on_ranks, run


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
    from raytune_ft.training import dropout

    assert dropout._mixed(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF
    words = torch.tensor([dropout._signed(0x9E3779B97F4A7C15)])
    assert int(dropout._mix_(words)) == dropout._signed(0xE220A8397B1DCDAF)


DROPPED = {
    **{"lora_dropout": 0.3, "learning_rate": 2e-3, "max_steps": 6, "num_train_epochs": 9},
    **{"report_to": [], "warmup_steps": 0},
}


def losses(config, splits: dict[str, list[str]]) -> list[float]:
    found: list[float] = []
    train_in_process(config, splits, Seat(), output=None, report=lambda step, metrics: found.append(metrics["loss"]))
    return found


@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"gradient_checkpointing": True}])
def test_a_run_drops_the_same_whatever_its_micro_batches(changes: dict, settings, splits) -> None:
    whole = losses(settings(**DROPPED, **changes), splits)
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    parts = losses(settings(**DROPPED, **changes, **sizes), splits)
    assert parts == pytest.approx(whole, abs=1e-5)
    undropped = losses(settings(**{**DROPPED, "lora_dropout": 0.0}, **changes), splits)
    assert undropped[0] == pytest.approx(whole[0], abs=1e-5)  # a fresh adapter adds nothing
    assert abs(undropped[-1] - whole[-1]) > 1e-3


@pytest.mark.ray  # no Ray, but as long as a test with it
def test_two_workers_drop_what_one_does(settings, splits, tmp_path: Path) -> None:
    config = settings(**DROPPED, eval_strategy="no", save_strategy="no")
    two = config.with_overrides(per_device_train_batch_size=4, num_workers=2, zero_stage=2)
    on_ranks([run(two, tmp_path / "two")], splits, tmp_path, world_size=2)
    assert history(tmp_path / "two", "loss") == pytest.approx(losses(config, splits), abs=1e-5)


@pytest.mark.parametrize("objective", ["examples", "dpo", "kto"])
def test_a_trial_of_a_bank_drops_what_a_run_of_its_own_does(
    objective: str, settings, splits, tiny_model: Path, tmp_path: Path
) -> None:
    config = settings(**DROPPED, eval_strategy="no", per_device_train_batch_size=3)
    if objective != "examples":
        files = rated_files if objective == "kto" else pair_files
        splits = files(tiny_model, tmp_path, train=8, validation=3)
        config = PreferenceConfig(**{**config.model_dump(exclude_unset=True), "loss_type": objective})
    host = BankHost(
        config.model_dump(mode="json"),
        splits,
        str(tmp_path / "snapshots"),
        objective="train" if objective == "examples" else "align",
        device="cpu",
        threads=1,
    )
    assert host.fault() is None
    host.admit("t", config.model_dump(mode="json"))
    reports: list[dict] = []
    while not reports or reports[-1]["status"] == "running":
        reports.append(host.report("t", len(reports)))
    alone = losses(config, splits)
    assert [report["metrics"]["loss"] for report in reports] == pytest.approx(alone, abs=1e-5)
    assert len(alone) == config.max_steps


def test_a_layer_that_sees_some_tokens_only_draws_from_the_stream() -> None:
    layer = RowDropout(0.5, 3)
    batch = pack([Encoded([1, 2, 3], [True] * 3), Encoded([4, 5], [True] * 2)]).placed([4, 0])
    with dropped_by_row(batch, 0, 1, "cpu"):
        assert torch.equal(layer(torch.ones(1, 5, 64)), layer(torch.ones(1, 5, 64)))
        assert not torch.equal(layer(torch.ones(1, 2, 64)), layer(torch.ones(1, 2, 64)))
    assert not torch.equal(layer(torch.ones(1, 5, 64)), layer(torch.ones(1, 5, 64)))
    assert torch.equal(layer.eval()(torch.ones(1, 5, 64)), torch.ones(1, 5, 64))

"""A pruned model stays pruned through full fine-tuning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from raytune_ft.compression.config import PruningConfig
from raytune_ft.compression.prune import write_pruned
from raytune_ft.core.errors import ModelError
from raytune_ft.core.storage import Location
from raytune_ft.models.loading import load_model
from raytune_ft.models.sparsity import is_pruned, zeros_of
from raytune_ft.training.config import FineTuningConfig
from raytune_ft.training.engine import make_trainee
from raytune_ft.training.session import Seat, train_in_process

Settings = Callable[..., FineTuningConfig]


@pytest.fixture
def sparse(tiny_model: Path, tmp_path: Path) -> Path:
    write_pruned(str(tiny_model), tmp_path / "sparse", PruningConfig(target_sparsity=0.5))
    return tmp_path / "sparse"


def test_zeros_stay_zero_while_all_other_weights_learn(
    sparse: Path, settings: Settings, splits: dict[str, list[str]], tmp_path: Path
) -> None:
    config = settings(model_path=str(sparse), method="full", max_steps=3, weight_decay=0.1, learning_rate=1e-3)
    losses: list[float] = []
    train_in_process(
        config,
        splits,
        Seat(),
        output=Location.at(tmp_path / "out"),
        report=lambda step, metrics: losses.append(metrics["loss"]),
    )
    before, after = (load_model(str(where), device="cpu").model for where in (sparse, tmp_path / "out"))
    held, kept = zeros_of(before), zeros_of(after)
    assert len(held) == 14
    old, new = dict(before.named_parameters()), dict(after.named_parameters())
    for name, where in held.items():
        assert bool(kept[name][where].all()), name
        assert float((old[name] != new[name])[~where].float().mean()) > 0.9, name
    assert is_pruned(tmp_path / "out")
    assert losses[-1] < losses[0]


def test_stage_3_cannot_hold_them_and_says_so(sparse: Path, settings: Settings) -> None:
    with pytest.raises(ModelError, match="is pruned, and its zeros cannot be held"):
        make_trainee(settings(model_path=str(sparse), method="full", zero_stage=3), "cpu")


def test_a_model_that_was_not_pruned_has_no_hooks(tiny_model: Path, settings: Settings) -> None:
    trainee = make_trainee(settings(model_path=str(tiny_model), method="full"), "cpu")
    assert not any(parameter._backward_hooks for parameter in trainee.model.parameters())
    assert isinstance(next(trainee.model.parameters()), torch.nn.Parameter)

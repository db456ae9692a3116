"""A run that was cut short ends where the unbroken one ends; damaged checkpoints are named and passed over."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import pytest

from raytune_ft.core.storage import Location
from raytune_ft.training import checkpoint, writer
from raytune_ft.training.folder import CHECKPOINTS, HISTORY
from raytune_ft.training.loop import Decision
from raytune_ft.training.session import Seat, train_in_process


def run(config, splits, output: Path, *, cut_after: int | None = None) -> list[float]:
    class CutError(Exception):
        pass

    def report(step, metrics):
        if step == cut_after:
            raise CutError
        return Decision.CONTINUE

    try:
        train_in_process(config, splits, Seat(), output=Location.at(output), report=report)
    except CutError:
        return []
    return [json.loads(line)["loss"] for line in (output / HISTORY).read_text().splitlines()]


@pytest.fixture
def config(settings):
    return settings(save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=1, lora_dropout=0.3)


def test_a_resumed_run_has_the_losses_of_the_unbroken_one(config, splits, tmp_path: Path) -> None:
    unbroken = run(config, splits, tmp_path / "a")
    run(config, splits, tmp_path / "b", cut_after=3)
    resumed = run(config, splits, tmp_path / "b")
    assert len(unbroken) == 6
    assert resumed == pytest.approx(unbroken, abs=1e-6)
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]


def test_a_resumed_run_keeps_the_best_and_the_patience_of_before(settings, splits, tmp_path: Path) -> None:
    rhythm = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    rates = {"learning_rate": 0.05, "lr_scheduler_type": "constant", "warmup_steps": 0}  # the second step is too long
    config = settings(**rhythm, **rates, early_stopping_patience=1, save_total_limit=1)
    unbroken = run(config, splits, tmp_path / "a")
    run(config, splits, tmp_path / "b", cut_after=1)
    assert run(config, splits, tmp_path / "b") == pytest.approx(unbroken, abs=1e-6)
    assert len(unbroken) == 2, "its patience ended"
    for name in "ab":  # beside the newest one, the limit leaves the best one
        assert Location.at(tmp_path / name / CHECKPOINTS).folders() == ["step-00000001", "step-00000002"]
    run(config.with_overrides(max_steps=1), splits, tmp_path / "first")
    weights = {(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("a", "b", "first")}
    assert len(weights) == 1


def test_a_truncated_checkpoint_is_named_and_the_one_before_is_taken(
    config, splits, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unbroken = run(config, splits, tmp_path / "a")
    run(config, splits, tmp_path / "b", cut_after=5)
    damaged = tmp_path / "b" / CHECKPOINTS / "step-00000004" / "rank-00000-of-00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-10])
    with caplog.at_level(logging.INFO, logger="raytune_ft"):
        resumed = run(config, splits, tmp_path / "b")
    assert "step-00000004: damaged (rank-00000-of-00001.safetensors has " in caplog.text
    assert "resumes after step 2" in caplog.text
    assert resumed == pytest.approx(unbroken, abs=1e-6)


def test_a_checkpoint_without_manifest_does_not_count(config, splits, tmp_path: Path) -> None:
    run(config, splits, tmp_path, cut_after=5)
    (tmp_path / CHECKPOINTS / "step-00000004" / "manifest.json").unlink()
    found = checkpoint.newest(Location.at(tmp_path / CHECKPOINTS))
    assert found is not None
    assert found.step == 2


def test_only_the_newest_checkpoints_are_kept(settings, splits, tmp_path: Path) -> None:
    run(settings(save_strategy="steps", save_steps=1, save_total_limit=2), splits, tmp_path)
    assert Location.at(tmp_path / CHECKPOINTS).folders() == ["step-00000005", "step-00000006"]


def test_a_checkpoint_of_another_format_is_passed_over_by_its_name(tmp_path: Path, caplog) -> None:
    folder = Location.at(tmp_path)
    for step in (1, 2):
        checkpoint.write(folder, checkpoint.Checkpoint(step, {}, {}, {}), keep=2)
    manifest = tmp_path / "step-00000002/manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 1}))
    found = checkpoint.newest(folder)
    assert found is not None and found.step == 1
    assert "step-00000002: damaged (its format is 1, and 2 is read), passed over" in caplog.text


def test_a_checkpoint_that_is_written_late_has_no_step_after_its_own(
    settings, splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = writer.write_progress

    def late(*given):
        time.sleep(0.3)  # the next step is made meanwhile
        return write(*given)

    monkeypatch.setattr(writer, "write_progress", late)
    train_in_process(settings(save_strategy="steps", save_steps=2), splits, Seat(), output=Location.at(tmp_path))
    kept = [checkpoint.opened(checkpoint.folder_of(Location.at(tmp_path) / CHECKPOINTS, step)) for step in (4, 6)]
    assert [[row["step"] for row in one.progress["history"]] for one in kept] == [[1, 2, 3, 4], [1, 2, 3, 4, 5, 6]]

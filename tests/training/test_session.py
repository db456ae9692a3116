"""A run in one process: what it leaves, how it is stopped, from where it goes on, and how it ends when it diverges."""

from __future__ import annotations

import json
import logging
import os
import signal
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from raytune_ft.core.errors import ArtifactError, ConfigError, DataError, RunError, StoppedError
from raytune_ft.core.storage import Location
from raytune_ft.training import checkpoint
from raytune_ft.training.interruption import note_sigterm
from raytune_ft.training.session import Seat, train_in_process
from raytune_ft.training.trackers import Trackers
from raytune_ft.training.utilization import Work, device_peak

from ..rows import rated_files  # noqa: TID252 - tests are no installed package


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


@pytest.fixture
def sigterm_noted():
    before = signal.getsignal(signal.SIGTERM)
    note_sigterm()
    yield
    note_sigterm()
    signal.signal(signal.SIGTERM, before)


def test_the_artifact_has_curves_diagnosis_events_and_shares(settings, splits, tmp_path: Path) -> None:
    train_in_process(settings(), splits, Seat(), output=Location.at(tmp_path / "a"))
    history = rows(tmp_path / "a")
    assert len(history) == 6
    for row in history:
        assert row["supervised_share"] == pytest.approx(row["supervised"] / row["tokens"])
        assert 0 < row["flop_utilization"] < 1
        assert row["memory_gib"] > 0
    report = json.loads((tmp_path / "a/diagnosis.json").read_text())
    assert report["peak_flops_source"].startswith("measured")
    assert report["tracker_failures"] == {"tensorboard": 0}
    assert (tmp_path / "a/curves.svg").read_text().rstrip().endswith("</svg>")
    assert len(list((tmp_path / "a/tensorboard").glob("events.*"))) == 1


def test_sigterm_saves_after_the_step_and_the_same_call_goes_on(
    settings, splits, tmp_path: Path, sigterm_noted
) -> None:
    config = settings(save_strategy="no", lora_dropout=0.2)
    train_in_process(config, splits, Seat(), output=Location.at(tmp_path / "unbroken"))

    def report(step, metrics):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StoppedError, match="stopped after step 3 of 6"):
        train_in_process(config, splits, Seat(), output=Location.at(tmp_path / "b"), report=report)
    assert not (tmp_path / "b/history.jsonl").exists()
    note_sigterm()
    train_in_process(config, splits, Seat(), output=Location.at(tmp_path / "b"))
    expected = [row["loss"] for row in rows(tmp_path / "unbroken")]
    assert [row["loss"] for row in rows(tmp_path / "b")] == pytest.approx(expected, abs=1e-6)


def test_a_run_starts_from_a_named_checkpoint_until_it_has_its_own(settings, splits, tmp_path: Path) -> None:
    first = settings(save_strategy="steps", save_steps=2, save_total_limit=9)
    train_in_process(first, splits, Seat(), output=Location.at(tmp_path / "a"))
    where = tmp_path / "a/checkpoints/step-00000004"
    second = settings(save_strategy="steps", save_steps=5, resume_from_checkpoint=str(where))
    steps = []
    output = Location.at(tmp_path / "b")
    train_in_process(second, splits, Seat(), output=output, report=lambda step, metrics: steps.append(step))
    assert steps == [4, 5, 6]
    assert rows(tmp_path / "b")[-1]["loss"] == pytest.approx(rows(tmp_path / "a")[-1]["loss"], abs=1e-6)
    train_in_process(second, splits, Seat(), output=output, report=lambda step, metrics: steps.append(step))
    assert steps == [4, 5, 6, 5, 6]


def test_the_best_of_another_run_is_not_taken_over(settings, splits, tmp_path: Path) -> None:
    first = settings(save_strategy="steps", save_steps=3, eval_strategy="steps", eval_steps=1, save_total_limit=9)
    train_in_process(first, splits, Seat(), output=Location.at(tmp_path / "a"))
    where = tmp_path / "a/checkpoints/step-00000003"
    assert checkpoint.read(Location.at(where)).progress["patience"]["best_step"] == 3
    # By perplexity, losses of the other run would never be reached again.
    changes = {"metric_for_best_model": "eval_perplexity", "early_stopping_patience": 2, "learning_rate": 1e-6}
    second = settings(resume_from_checkpoint=str(where), eval_strategy="steps", eval_steps=1, **changes)
    summary = train_in_process(second, splits, Seat(), output=Location.at(tmp_path / "b"))
    assert (summary.steps, summary.metric) == (6, "eval_perplexity")
    assert summary.best_step in {4, 5, 6}
    assert summary.best == rows(tmp_path / "b")[summary.best_step - 1]["eval_perplexity"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"early_stopping_patience": 1}, "early_stopping_patience"),
        ({"metric_for_best_model": "eval_perplexity"}, "metric_for_best_model"),
        ({"eval_generation_rows": 2}, "eval_generation_rows"),
    ],
)
def test_what_needs_a_validation_split_is_refused_without_one(
    changes: dict[str, object], named: str, settings, splits
) -> None:
    with pytest.raises(ConfigError, match=f"^{named}: given as splits has no validation split"):
        train_in_process(settings(**changes), {"train": splits["train"]}, Seat(), output=None)


def test_a_validation_split_of_disliked_answers_is_left_out_and_said(
    settings, tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rated = rated_files(tiny_model, tmp_path, train=6, validation=1)  # of the first in three, the answer is disliked
    with caplog.at_level(logging.WARNING, logger="raytune_ft"):
        summary = train_in_process(settings(max_steps=1), rated, Seat(), output=None)
    assert "the validation split is left out" in caplog.text
    assert summary.best_step is None
    with pytest.raises(DataError, match="its only row is an answer that people disliked"):
        train_in_process(settings(), {"train": rated["validation"]}, Seat(), output=None)


def test_a_run_that_is_all_warmup_is_warned_of(settings, splits, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="raytune_ft"):
        train_in_process(settings(max_steps=1), splits, Seat(), output=None)
    assert "the warmup takes 1 step and the run has 1" in caplog.text


def test_trackers_hear_how_a_run_ended(settings, splits, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ended: list[str] = []
    monkeypatch.setattr(Trackers, "close", lambda self, status: ended.append(status))

    def train(*, stop: bool = False, **changes: object) -> None:
        config = settings(eval_strategy="no", max_steps=2, warmup_steps=0, **changes)
        output = Location.at(tmp_path / str(len(ended)))
        train_in_process(config, splits, Seat(), output=output, stop_wanted=lambda: stop)

    train()
    with pytest.raises(StoppedError):
        train(stop=True)
    with pytest.raises(RunError):
        train(learning_rate=1e30)
    assert ended == ["finished", "stopped", "failed"]


def test_a_users_deepspeed_json_is_held_against_the_runs_steps(settings, splits) -> None:
    given = {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 12345}}}
    with pytest.raises(ConfigError, match=r"total_num_steps is 12345 there, and the number of steps .* makes it 6"):
        train_in_process(settings(deepspeed_config=given), splits, Seat(), output=None)


def test_a_run_killed_between_its_last_save_and_its_model_makes_no_step_more(
    settings, splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(save_strategy="steps", save_steps=3, lora_dropout=0.2)
    output = Location.at(tmp_path / "a")
    with monkeypatch.context() as broken, pytest.raises(OSError, match="storage is gone"):
        broken.setattr(Location, "upload", storage_is_gone)
        train_in_process(config, splits, Seat(), output=output)
    assert not (tmp_path / "a/history.jsonl").exists()
    told = []
    train_in_process(config, splits, Seat(), output=output, report=lambda step, metrics: told.append((step, metrics)))
    assert [step for step, _ in told] == [6]
    assert {"eval_loss", "tokens_so_far", "last_step"} <= told[0][1].keys()
    train_in_process(config, splits, Seat(), output=Location.at(tmp_path / "unbroken"))
    expected = [row["loss"] for row in rows(tmp_path / "unbroken")]
    assert [row["loss"] for row in rows(tmp_path / "a")] == pytest.approx(expected, abs=1e-6)
    assert told[0][1]["tokens_so_far"] == sum(row["tokens"] for row in rows(tmp_path / "unbroken"))
    model = "adapter_model.safetensors"
    ours, theirs = (load_file(tmp_path / folder / model) for folder in ("a", "unbroken"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def storage_is_gone(*_: object) -> None:
    raise OSError("storage is gone")


def test_a_path_that_is_no_whole_checkpoint_says_what_is_wrong(settings, splits, tmp_path: Path) -> None:
    def refusal(path: Path, **changes: object) -> str:
        config = settings(resume_from_checkpoint=str(path), **changes)
        with pytest.raises(ArtifactError) as caught:
            train_in_process(config, splits, Seat(), output=Location.at(tmp_path / "other"))
        return str(caught.value)

    config = settings(save_strategy="steps", save_steps=3)
    train_in_process(config, splits, Seat(), output=Location.at(tmp_path / "a"))
    checkpoints = tmp_path / "a/checkpoints"
    assert "no such folder" in refusal(tmp_path / "missing")
    assert "name one of them: step-00000003, step-00000006" in refusal(checkpoints)
    assert "another model or method" in refusal(checkpoints / "step-00000003", lora_r=4)
    assert "another order of the data: seed is 0 there and 5 here" in refusal(checkpoints / "step-00000003", seed=5)
    few = {"per_device_train_batch_size": 4}
    assert "a global batch of 8 rows, and these settings make 4" in refusal(checkpoints / "step-00000003", **few)
    assert "is of step 6, and this run ends at step 6; raise max_steps" in refusal(checkpoints / "step-00000006")
    damaged = next((checkpoints / "step-00000003").glob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert damaged.name in refusal(checkpoints / "step-00000003")
    (checkpoints / "step-00000006/manifest.json").unlink()
    assert "no manifest.json" in refusal(checkpoints / "step-00000006")


def test_a_run_that_diverges_names_the_last_good_checkpoint(
    settings, splits, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = settings(save_strategy="steps", save_steps=1, learning_rate=1e30, warmup_steps=2)
    with caplog.at_level(logging.INFO, logger="raytune_ft"), pytest.raises(RunError) as caught:
        train_in_process(config, splits, Seat(), output=Location.at(tmp_path / "a"))
    *_, good, newest = Location.at(tmp_path / "a/checkpoints").folders()
    assert f"last good checkpoint is {tmp_path}/a/checkpoints/{good} (the weights in {newest} are" in str(caught.value)
    assert "instability at step" in caplog.text
    slow = config.with_overrides(learning_rate=1e-3)
    for name, lost in ((good, False), (newest, True)):
        again = slow.with_overrides(resume_from_checkpoint=f"{tmp_path}/a/checkpoints/{name}")
        with pytest.raises(RunError, match="is nan") if lost else nullcontext():
            train_in_process(again, splits, Seat(), output=Location.at(tmp_path / name))


def test_a_run_that_saves_seldom_names_the_checkpoint_before_it_diverged(settings, splits, tmp_path: Path) -> None:
    def words(save_steps: int) -> str:
        config = settings(save_strategy="steps", save_steps=save_steps, learning_rate=1e30, warmup_steps=2)
        with pytest.raises(RunError) as caught:
            train_in_process(config, splits, Seat(), output=Location.at(tmp_path / str(save_steps)))
        return str(caught.value)

    assert words(2).endswith("There is no good checkpoint (the weights in step-00000002 are those that gave this)")
    assert words(5).endswith("There is no checkpoint")


def test_a_tokens_operations_are_six_a_trained_weight_and_four_a_frozen_one(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    # Width 64: q and o 64 x 64, k and v 64 x 32, three of 64 x 128; two layers; a head of 64 x vocabulary.
    body = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    head = 64 * model.config.vocab_size
    assert Work.count(model).of(10, 3) == 6 * (10 * body + 3 * head)
    model.requires_grad_(False)
    assert Work.count(model).of(10, 3) == 4 * (10 * body + 3 * head)


def test_the_peak_of_a_cpu_is_measured_and_says_how() -> None:
    peak = device_peak("cpu", torch.float32)
    assert peak.flops > 1e8
    assert "matrix product in torch.float32" in peak.source

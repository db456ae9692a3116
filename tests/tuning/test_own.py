"""A training run in a trial's own process: told as by a bank, waiting to be asked, going on from what it saved."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from raytune_ft.core.errors import RaytuneError
from raytune_ft.core.storage import Location
from raytune_ft.training import checkpoint
from raytune_ft.training.folder import CHECKPOINTS
from raytune_ft.tuning.alone import _forget_after
from raytune_ft.tuning.own import Own, OwnRun


@pytest.fixture
def own(splits: dict, tmp_path: Path) -> Own:
    return Own({1024: splits}, str(tmp_path / "trials"), "cpu", 1.0, 1)


def told(run: OwnRun) -> list[dict]:
    reports = [run.next_report()]
    while reports[-1]["status"] == "running":
        reports.append(run.next_report())
    run.leave()
    return reports


def test_every_evaluation_is_told_once_and_the_last_when_the_model_is_written(own: Own, settings: dict) -> None:
    run = own.start("t", {**settings, "max_steps": 6})
    for step in (2, 4):
        assert run.next_report()["step"] == step
        assert checkpoint.newest(Location.at(f"{own.output}/t/checkpoints")).step == step  # saved before it was told
    last = run.next_report()
    assert (last["step"], last["status"]) == (6, "finished")
    assert {"eval_loss", "loss", "last_step"} <= last["metrics"].keys()
    assert (Path(own.output) / "t/adapter_model.safetensors").exists()
    run.leave()


def test_a_run_that_was_left_goes_on_in_another_process_as_if_it_had_not_been(own: Own, settings: dict) -> None:
    settings = {**settings, "max_steps": 8, "lora_dropout": 0.2}
    first = own.start("t", settings)
    before = [first.next_report() for _ in range(2)]
    first.leave()
    after = told(own.start("t", settings))
    whole = told(own.start("unbroken", settings))
    assert [report["step"] for report in after] == [4, 6, 8]  # what was told last is told again
    for key in ("eval_loss", "tokens"):
        found = [report["metrics"][key] for report in (*before[:1], *after)]
        assert found == pytest.approx([report["metrics"][key] for report in whole], abs=1e-6), key


def test_states_that_a_full_disk_does_not_take_are_said_once_until_one_is_taken_again(
    small_disk, splits: dict, settings: dict, caplog: pytest.LogCaptureFixture
) -> None:
    disk, enlarge = small_disk
    own = Own({1024: splits}, str(disk / "trials"), "cpu", 1.0, 1)
    run = own.start("t", {**settings, "max_steps": 7, "eval_steps": 1, "lora_r": 1024})
    for _ in range(4):
        run.next_report()
    said = [message for message in caplog.messages if "could not be written" in message]
    assert [message.partition(" (")[0] for message in said] == [
        f"{disk}/trials/t: the checkpoint of step 1 could not be written"
    ]
    enlarge()
    assert told(run)[-1]["status"] == "finished"
    assert checkpoint.newest(own.folder("t") / CHECKPOINTS).step == 7
    assert [message for message in caplog.messages if "could not be written" in message] == said


def test_a_run_that_is_ahead_of_what_was_heard_tells_of_all_evaluations_since(own: Own, settings: dict) -> None:
    settings = {**settings, "max_steps": 8, "eval_steps": 1}
    first = own.start("t", settings)
    before = [first.next_report() for _ in range(6)]
    first.leave()
    after = told(own.start("t", settings, 2))  # Ray Tune's state is older
    assert [report["step"] for report in after] == [3, 4, 5, 6, 7, 8]
    for again, earlier in zip(after, before[2:], strict=False):
        assert again["status"] == "running"
        for key in ("eval_loss", "tokens", "last_step", "global_step"):
            assert again["metrics"][key] == earlier["metrics"][key], key


def test_nothing_is_trained_before_anybody_asks_and_a_run_ends_where_it_waits(own: Own, settings: dict) -> None:
    unasked = own.start("unasked", settings)
    unasked.leave()
    assert not (Path(own.output) / "unasked").exists()
    asked = own.start("asked", settings)
    asked.next_report()
    asked.leave()
    assert not (Path(own.output) / "asked/summary.json").exists()
    assert not any(thread.name == "training" for thread in threading.enumerate())


def test_an_evaluation_that_was_saved_and_not_heard_of_is_taken_back(own: Own, settings: dict) -> None:
    run = own.start("t", settings)
    heard, unheard = (run.next_report() for _ in range(2))
    run.leave()
    folder = own.folder("t") / "checkpoints"
    assert checkpoint.newest(folder).step == unheard["step"] == 4
    _forget_after(3, folder)  # no state of that step: nothing is taken back
    assert checkpoint.steps_below(folder) == [2, 4]
    _forget_after(heard["step"], folder)
    assert checkpoint.newest(folder).step == heard["step"] == 2


def test_a_run_whose_patience_ends_is_finished_before_its_last_step(own: Own, settings: dict) -> None:
    hopeless = {"early_stopping_patience": 1, "learning_rate": 1e-30, "lr_scheduler_type": "constant"}
    reports = told(own.start("t", {**settings, **hopeless}))
    assert reports[-1]["status"] == "finished"
    assert reports[-1]["step"] < 20 and reports[-1]["step"] == reports[-2]["step"]
    assert (Path(own.output) / "t/adapter_model.safetensors").exists()


def test_a_run_that_diverges_is_infeasible_with_the_step(own: Own, settings: dict) -> None:
    reports = told(own.start("t", {**settings, "learning_rate": 1e30, "warmup_steps": 4, "eval_steps": 1}))
    assert [report["status"] for report in reports] == ["running", "running", "infeasible"]
    assert f"of step {reports[-1]['step']} is" in reports[-1]["reason"]
    assert own.output not in reports[-1]["reason"], "its checkpoints go with the sweep"


def test_what_ends_a_run_otherwise_is_raised_where_it_is_asked(own: Own, settings: dict, tmp_path: Path) -> None:
    run = own.start("t", {**settings, "model_path": str(tmp_path / "nowhere")})
    with pytest.raises(RaytuneError, match="nowhere"):
        run.next_report()
    run.leave()

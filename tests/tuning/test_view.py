from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console
from rich.logging import RichHandler

from raytune_ft.tuning.view import SweepView


def told(view: SweepView) -> None:
    view.hear("a", "lora_r=4", state="running", step=2, last_step=8, value=1.5)
    view.hear("b", "lora_r=8", state="running", step=2, last_step=6, value=1.25)
    view.hear("a", "lora_r=4", state="running", step=4, last_step=8, value=1.75)
    view.hear("a", "lora_r=4", state="stopped early")
    view.hear("c", "lora_r=16", state="failed")


def test_a_log_has_a_line_for_each_evaluation_and_ending(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="raytune_ft"):
        told(SweepView("eval_loss"))
    assert caplog.messages == [
        "trial lora_r=4: step 2, eval_loss 1.5000",
        "trial lora_r=8: step 2, eval_loss 1.2500",
        "trial lora_r=4: step 4, eval_loss 1.7500",
        "trial lora_r=4: stopped early at step 4, best eval_loss 1.5000",
        "trial lora_r=16: failed",
    ]


def test_a_trial_without_any_value_says_so(caplog: pytest.LogCaptureFixture) -> None:
    view = SweepView("eval_loss")
    with caplog.at_level(logging.INFO, logger="raytune_ft"):
        view.hear("a", "lora_r=4", state="running", step=1, last_step=8, value=float("inf"))
        view.hear("a", "lora_r=4", state="infeasible")
    assert caplog.messages == [
        "trial lora_r=4: step 1, without eval_loss",
        "trial lora_r=4: infeasible at step 1, without eval_loss",
    ]


def test_a_terminal_has_one_table_with_the_best_trial_first() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    handler = RichHandler(console=console)
    logger = logging.getLogger("raytune_ft")
    logger.addHandler(handler)
    try:
        view = SweepView("eval_loss")
        told(view)
        view.close()
    finally:
        logger.removeHandler(handler)
    last = console.file.getvalue().split("trial ")[-1]
    assert [line.split()[:3] for line in last.splitlines()[1:4]] == [
        ["lora_r=8", "running", "2/6"],
        ["lora_r=4", "stopped", "early"],
        ["lora_r=16", "failed", "0"],
    ]


def test_of_a_metric_that_is_better_when_higher_the_highest_is_the_best() -> None:
    view = SweepView("eval_exact_match")
    for name, values in (("a", [0.0, 0.0]), ("b", [0.5, 0.25]), ("c", [float("nan")])):
        for step, value in enumerate(values, start=1):
            view.hear(name, f"trial {name}", state="running", step=step, value=value)
    assert [list(column.cells) for column in view.table().columns][4] == ["0.5000", "0.0000", "-"]


def test_trials_beyond_the_first_24_are_counted() -> None:
    view = SweepView("loss")
    for number in range(30):
        view.hear(str(number), f"seed={number}", state="waiting")
    assert view.table().row_count == 25
    assert list(view.table().columns[0].cells)[-1] == "and 6 more"

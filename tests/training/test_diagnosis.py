"""Findings on curves made by hand: each sign is found where it begins, once, and healthy curves have none."""

from __future__ import annotations

import math
import random

import pytest

from raytune_ft.training.config import FineTuningConfig
from raytune_ft.training.curves import draw_curves
from raytune_ft.training.diagnosis import Trouble, diagnose


def config(**changes: object) -> FineTuningConfig:
    return FineTuningConfig(model_path="m", output_dir="o", dataset_path="d", **changes)


def curve(losses: list[float], evaluations: dict[int, float] | None = None, norms: dict[int, float] | None = None):
    """Rows from step 1 on, with a falling learning rate and gradient norms of 0.5."""
    rows = []
    for step, loss in enumerate(losses, start=1):
        row = {"step": step, "loss": loss, "learning_rate": 1e-4 / step, "grad_norm": (norms or {}).get(step, 0.5)}
        if evaluations and step in evaluations:
            row["eval_loss"] = evaluations[step]
        rows.append(row)
    return rows


def found(rows, **changes):
    return [(f.kind.value, f.step) for f in diagnose(rows, config(**changes))]


def falling(steps: int) -> list[float]:
    return [0.4 + 2.6 * 0.95**step for step in range(steps)]


def test_a_healthy_noisy_curve_has_no_finding() -> None:
    noise = random.Random(0)
    losses = [loss * noise.uniform(0.8, 1.25) for loss in falling(120)]
    assert found(curve(losses, {40: 1.0, 80: 0.8, 120: 0.7})) == []


def test_overfitting_is_found_at_the_second_rise_and_said_once_an_episode() -> None:
    rows = curve(falling(60), {10: 1.5, 20: 1.2, 30: 1.25, 40: 1.32, 50: 1.4, 60: 1.5})
    (finding,) = diagnose(rows, config(lora_r=16))
    assert (finding.kind, finding.step) == (Trouble.OVERFITTING, 40)
    assert finding.numbers["eval_loss_before"] == 1.2
    assert finding.numbers["eval_loss"] == 1.32
    assert finding.numbers["train_loss"] == pytest.approx(sum(falling(60)[30:40]) / 10)
    assert "lora_r (16)" in finding.remedy
    assert "early_stopping_patience=2" in finding.remedy


def test_validation_that_rises_while_training_rises_too_is_not_overfitting() -> None:
    rising = [1.0 + 0.01 * step for step in range(40)]
    assert found(curve(rising, {10: 1.1, 20: 1.2, 30: 1.3, 40: 1.4})) == []


def test_a_second_episode_of_overfitting_is_said_again() -> None:
    evaluations = {10: 1.2, 20: 1.3, 30: 1.4, 40: 1.1, 50: 1.2, 60: 1.3}
    assert found(curve(falling(60), evaluations)) == [("overfitting", 30), ("overfitting", 60)]


def test_underfitting_is_found_on_a_high_plateau_after_thirty_steps() -> None:
    flat = [3.0 - 0.0001 * step for step in range(50)]
    assert found(curve(flat)) == [("underfitting", 30)]
    assert "lora_r" in diagnose(curve(flat), config())[0].remedy
    assert found(curve(flat, {10: 3.1, 20: 3.1, 30: 3.1})) == [("underfitting", 30)]


def test_a_plateau_below_half_a_nat_or_after_learning_is_no_underfitting() -> None:
    assert found(curve([0.3] * 50)) == []
    assert found(curve([3.0 * 0.9**step for step in range(20)] + [0.6] * 40)) == []


def test_a_plateau_with_a_step_of_no_number_is_not_judged() -> None:
    losses = [2.0] * 60
    losses[31] = math.nan
    found_at = [step for kind, step in found(curve(losses)) if kind == "underfitting"]
    assert found_at == [30], "before that step; it is the same episode up to the 61st"
    losses = [math.nan] * 29 + [2.0] * 30
    assert [step for kind, step in found(curve(losses)) if kind == "underfitting"] == [59]


@pytest.mark.parametrize(("second_half", "is_found"), [(1.981, True), (1.979, False), (2.019, True), (2.021, False)])
def test_training_loss_is_flat_where_it_moves_by_a_hundredth_of_its_start_at_most(
    second_half: float, is_found: bool
) -> None:
    rows = curve([2.0] * 15 + [second_half] * 15)
    assert found(rows) == ([("underfitting", 30)] if is_found else [])


@pytest.mark.parametrize(("level", "is_found"), [(1.61, True), (1.59, False)])
def test_a_plateau_is_high_from_four_fifths_of_the_start_on(level: float, is_found: bool) -> None:
    rows = curve([2.0] * 8 + [level] * 30)
    assert found(rows) == ([("underfitting", 38)] if is_found else [])


@pytest.mark.parametrize(
    ("evaluations", "is_found"),
    [
        ({10: 2.1, 20: 2.1, 30: 2.1}, True),
        ({10: 2.1, 20: 2.12, 30: 2.1}, True),
        ({20: 2.1, 30: 2.1}, False),
        ({10: 2.1, 20: 2.1, 30: 2.07}, False),
        ({10: 2.1, 20: 2.07, 30: 2.1}, False),
        ({10: 2.14, 20: 2.1, 30: 2.1}, False),
        ({4: 3.0, 10: 2.1, 20: 2.1, 30: 2.1}, False),
        ({4: 2.5, 10: 2.1, 20: 2.1, 30: 2.1}, True),
    ],
)
def test_validation_loss_has_to_be_flat_and_high_at_three_evaluations_too(
    evaluations: dict[int, float], is_found: bool
) -> None:
    findings = diagnose(curve([2.0] * 30, evaluations), config())
    assert [finding.step for finding in findings] == ([30] if is_found else [])
    assert all("validation loss at 2.1" in finding.sign for finding in findings)


def test_a_plateau_while_the_learning_rate_rises_is_the_warmup() -> None:
    rows = [{**row, "learning_rate": 1e-6 * row["step"]} for row in curve([3.0] * 50)]
    assert found(rows) == []
    constant = [{**row, "learning_rate": 1e-4} for row in rows]
    assert found(constant) == [("underfitting", 30)]


def test_a_spike_is_held_against_the_median_of_the_steps_before() -> None:
    losses = [*falling(30), 4.0, *falling(60)[31:]]
    (finding,) = diagnose(curve(losses), config(learning_rate=3e-4))
    assert (finding.kind, finding.step) == (Trouble.INSTABILITY, 31)
    assert "learning_rate (it is 0.0003)" in finding.remedy


def test_spikes_of_one_episode_are_said_once() -> None:
    losses = [1.0] * 10 + [5.0, 1.0, 5.0, 1.0] + [1.0] * 30 + [5.0]
    assert [f for f in found(curve(losses)) if f[0] == "instability"] == [("instability", 11), ("instability", 45)]


def test_a_gradient_explosion_counts_where_it_is_clipped() -> None:
    assert found(curve(falling(20), norms={15: 40.0})) == [("instability", 15)]
    assert found(curve(falling(20), norms={15: 40.0}), max_grad_norm=50) == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_found_at_the_first_step_too(value: float) -> None:
    (finding,) = diagnose(curve([value]), config())
    assert (finding.kind, finding.step) == (Trouble.INSTABILITY, 1)
    assert finding.as_json()["numbers"]["loss"] == str(value)


def test_each_halving_for_memory_is_said_with_the_settings_that_avoid_it() -> None:
    rows = [
        {**row, "micro_batch_divisor": 1 if row["step"] < 3 else 2 if row["step"] < 6 else 4}
        for row in curve(falling(8))
    ]
    findings = diagnose(rows, config(per_device_train_batch_size=8))
    assert [(f.kind, f.step) for f in findings] == [(Trouble.MEMORY, 3), (Trouble.MEMORY, 6)]
    assert "per_device_train_batch_size=2 gradient_accumulation_steps=4" in findings[1].remedy


def test_the_plot_has_both_losses_and_the_findings_and_is_the_same_each_time() -> None:
    rows = curve(falling(20), {10: 1.2, 20: math.nan})
    drawn = draw_curves(rows, [(15, "instability")])
    assert drawn == draw_curves(rows, [(15, "instability")])
    assert all(word in drawn for word in ("training loss", "validation", "instability", "gradient norm"))


def test_the_settings_that_avoid_running_out_of_memory_have_the_same_global_batch() -> None:
    rows = [{**row, "micro_batch_divisor": row["step"]} for row in curve(falling(2))]
    (finding,) = diagnose(rows, config(per_device_train_batch_size=3))
    assert "at most 2 rows" in finding.sign
    assert "per_device_train_batch_size=1 gradient_accumulation_steps=3" in finding.remedy
    (finding,) = diagnose(rows, config(per_device_train_batch_size=6, gradient_accumulation_steps=2, num_workers=3))
    assert "per_device_train_batch_size=3 gradient_accumulation_steps=4" in finding.remedy


def instability(losses: list[float], norms: dict[int, float] | None = None) -> list[int]:
    return [step for kind, step in found(curve(losses, norms=norms)) if kind == "instability"]


@pytest.mark.parametrize(("loss", "is_found"), [(1.99, False), (2.01, True)])
def test_a_spike_is_twice_the_median(loss: float, is_found: bool) -> None:
    assert instability([1.0] * 16 + [loss]) == ([17] if is_found else [])


@pytest.mark.parametrize(("loss", "is_found"), [(2.7, False), (2.85, True)])
def test_a_spike_is_six_deviations_above_the_median(loss: float, is_found: bool) -> None:
    """Median 1, median deviation 0.2: six deviations are 6 x 1.4826 x 0.2 = 1.78."""
    assert instability([0.8, 1.2] * 8 + [loss]) == ([17] if is_found else [])


@pytest.mark.parametrize(("norm", "is_found"), [(4.9, False), (5.1, True)])
def test_an_explosion_is_ten_times_the_median_norm(norm: float, is_found: bool) -> None:
    assert instability([1.0] * 17, norms={17: norm}) == ([17] if is_found else [])


def test_a_step_is_held_against_eight_steps_at_least_and_sixteen_at_most() -> None:
    assert instability([1.0] * 7 + [9.0]) == []
    assert instability([1.0] * 8 + [9.0]) == [9]
    assert instability([10.0] * 20 + [1.0] * 7 + [2.5]) == []  # most of the last 16 were higher
    assert instability([10.0] * 20 + [1.0] * 9 + [2.5]) == [30]


def test_an_episode_is_over_after_sixteen_steps() -> None:
    assert instability([1.0] * 10 + [5.0] + [1.0] * 15 + [5.0]) == [11]
    assert instability([1.0] * 10 + [5.0] + [1.0] * 16 + [5.0]) == [11, 28]


@pytest.mark.parametrize(
    ("values", "is_found"),
    [((1.0, 1.005, 1.009), False), ((1.0, 1.005, 1.011), True), ((1.0, 0.99, 1.02), False), ((1.0, 1.03, 1.02), False)],
)
def test_overfitting_is_a_rise_of_a_hundredth_in_two_evaluations(
    values: tuple[float, float, float], is_found: bool
) -> None:
    rows = curve(falling(24), dict(zip((8, 16, 24), values, strict=True)))
    assert found(rows) == ([("overfitting", 24)] if is_found else [])


@pytest.mark.parametrize(("share", "steps", "is_found"), [(0.89, 8, False), (0.91, 7, False), (0.91, 8, True)])
def test_rewards_tell_nothing_where_nine_of_ten_prompts_have_equal_ones_in_eight_steps(
    share: float, steps: int, is_found: bool
) -> None:
    rows = [{**row, "equal_rewards_share": share, "reward": 0.25} for row in curve(falling(steps))]
    assert found(rows) == ([("underfitting", 8)] if is_found else [])

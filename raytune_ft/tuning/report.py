"""The page of a sweep: every trial, its curve, which settings mattered, and what the search cost."""

from __future__ import annotations

import math
from collections import defaultdict

from raytune_ft.core.grammar import number_of
from raytune_ft.core.pages import image
from raytune_ft.evaluation.report import page_template
from raytune_ft.tuning import plots
from raytune_ft.tuning.result import SweepResult


def render(result: SweepResult, seconds: float) -> str:
    """The self-contained page.

    Args:
        result: all trials.
        seconds: how long the search took.
    """
    ranked = result.ranked
    best = result.best
    others = [*ranked, *(trial for trial in result.trials if trial not in ranked)]
    worst_last = [best, *(trial for trial in others if trial is not best)]
    pictures = [(plots.survival(result), "Every trial's curve; a cross where the scheduler stopped it.")]
    pictures.append(
        (plots.parallel(result), "Settings of each trial, and its place among all; the best one stands out.")
    )
    shares = importance(result)
    mapped = most_telling(result, shares)
    if mapped is not None and (heat := plots.heat_map(result, *mapped)) is not None:
        pictures.append((heat, f"Best {result.metric} at each {mapped[0]} and {mapped[1]}."))
    if shares:
        caption = "What the trials' differences come from: the variance of each setting's group means (main effects)."
        pictures.append((plots.shares(shares), caption))
    return str(
        page_template("tuning/report.html.j2").render(
            title="Search for the settings that train best",
            words=cost_in_words(result, seconds),
            result=result,
            trials=worst_last,
            images=[(image(svg), caption) for svg, caption in pictures],
        )
    )


def importance(result: SweepResult) -> dict[str, float]:
    """Share of the variance of the trials' metric (of a loss: its logarithm) that each setting's main effect explains.

    Between-group sum of squares over the total one, as in a one-way analysis of variance, over the feasible trials that
    have a use for the setting; one whose every trial has a value of its own is left out: it would explain everything.
    """
    scale = math.log if result.goal.is_loss else float
    scored = [
        (trial, scale(value))
        for trial in result.ranked
        if (value := trial.best(result.metric)) is not None and (value > 0 or not result.goal.is_loss)
    ]
    shares = {}
    for name in dict.fromkeys(name for trial, _ in scored for name in trial.settings):
        groups = defaultdict(list)
        for trial, value in scored:
            if name in trial.settings:
                groups[str(trial.settings[name])].append(value)
        values = [value for group in groups.values() for value in group]
        mean = sum(values) / len(values)
        total = sum((value - mean) ** 2 for value in values)
        if 1 < len(groups) < len(values) and total > 0:
            between = sum(len(g) * (sum(g) / len(g) - mean) ** 2 for g in groups.values())
            shares[name] = between / total
    return shares


def most_telling(result: SweepResult, shares: dict[str, float]) -> tuple[str, str] | None:
    """The two settings that a map shows: rank and learning rate, or those numbers that explain most; None of fewer."""
    first, trials = result.trials[0], result.trials
    numbers = [name for name in first.settings if all(_is_number(trial.settings.get(name)) for trial in trials)]
    if {"lora_r", "learning_rate"} <= set(numbers):
        return "lora_r", "learning_rate"
    chosen = sorted((name for name in numbers if name in shares), key=lambda name: shares[name])[-2:]
    return (chosen[0], chosen[1]) if len(chosen) == 2 else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def cost_in_words(result: SweepResult, seconds: float) -> str:
    """What the search spent, and against what every trial to its last step would have; and what repeats did besides."""
    spent = sum(trial.tokens for trial in result.trials)
    words = (
        f"{number_of(len(result.trials), 'trial')}, {sum(t.steps for t in result.trials):,} steps, {spent:,.0f} tokens"
    )
    words += f" in {seconds:,.0f} s"
    if result.not_begun:
        words += f"; {result.not_begun} more were not evaluated, as the budget was spent before"
    ends = {trial.last_step for trial in result.trials if trial.last_step is not None}
    whole = sum(trial.tokens * (trial.last_step or 0) / trial.steps for trial in result.trials if trial.steps)
    if whole:
        where = f"step {ends.pop()}" if len(ends) == 1 else "their last steps"
        words += f"; all of them to {where}: about {whole:,.0f} tokens ({spent / whole:.0%} of that was spent)"
    if result.repeats:
        again = sum(trial.tokens for trial in result.repeats)
        words += f"; besides, {number_of(len(result.repeats), 'repeat')} with fresh seeds, {again:,.0f} tokens"
    return words

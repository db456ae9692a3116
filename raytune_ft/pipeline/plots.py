"""Plots of a run's curves, as SVG text in the style of the evaluation's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raytune_ft.core.figures import COLOURS, log_scale, svg


def losses(history: Sequence[dict[str, float]]) -> str:
    """Training loss of every step (and its running mean), and the validation loss where it was measured."""
    steps = [row["step"] for row in history]
    values = [row["loss"] for row in history]
    evaluated = [row for row in history if "eval_loss" in row]

    def paint(axes: Any) -> None:
        axes.plot(steps, values, color=COLOURS[0], alpha=0.45, linewidth=1, label="training, each step")
        axes.plot(steps, running_mean(values, 10), color=COLOURS[1], linewidth=2, label="training, mean of 10 steps")
        if evaluated:
            where, what = [row["step"] for row in evaluated], [row["eval_loss"] for row in evaluated]
            axes.plot(where, what, "o-", color=COLOURS[2], linewidth=2, label="validation")
        log_scale(axes)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("loss (nats a supervised token)")
        axes.legend(frameon=False)

    return svg(paint, grid="y")


def sizes(megabytes: dict[str, float]) -> str:
    """Size on disk of each model."""

    def paint(axes: Any) -> None:
        places = range(len(megabytes))
        axes.barh(places, list(megabytes.values()), color=[COLOURS[n % len(COLOURS)] for n in places], height=0.6)
        for place, value in zip(places, megabytes.values(), strict=True):
            axes.annotate(f"{value:.0f} MB", (value, place), (5, 0), textcoords="offset points", va="center")
        axes.set_yticks(places, list(megabytes))
        axes.margins(x=0.15)
        axes.set_xlabel("megabytes on disk")
        axes.invert_yaxis()

    return svg(paint, height=1.1 + 0.4 * len(megabytes))


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and up to `window` - 1 before it."""
    return [sum(values[max(0, n - window + 1) : n + 1]) / min(n + 1, window) for n in range(len(values))]

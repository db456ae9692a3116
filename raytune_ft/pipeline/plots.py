"""Plots of a run's curves, as SVG text in the style of the evaluation's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raytune_ft.evaluation.plots import COLOURS, svg
from raytune_ft.tuning.result import SweepResult


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
        _log_scale(axes)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("loss (nats a supervised token)")
        axes.legend(frameon=False)

    return svg(paint, grid="y")


def survival(result: SweepResult) -> str:
    """The curve of every trial; the best one stands out, and a cross ends the ones that were stopped."""
    best = result.best

    def paint(axes: Any) -> None:
        for number, trial in enumerate(result.trials):
            points = [(row["global_step"], row[result.metric]) for row in trial.curve if result.metric in row]
            if not points:
                continue
            colour, chosen = COLOURS[(number + 1) % len(COLOURS)], trial is best
            axes.plot(
                [x for x, _ in points],
                [y for _, y in points],
                "o-",
                color=colour,
                linewidth=3 if chosen else 1.5,
                markersize=5,
                label=trial.label() + (" (best)" if chosen else ""),
            )
            if trial.ending != "finished":
                axes.plot(*points[-1], "x", color=colour, markersize=11, markeredgewidth=2.5)
        _log_scale(axes)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("validation loss" if result.metric == "eval_loss" else "training loss")
        axes.legend(frameon=False, fontsize=9)

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


def _log_scale(axes: Any) -> None:
    """A logarithmic y axis with plain numbers; our style leaves the formulas raw that matplotlib would write."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and up to `window` - 1 before it."""
    return [sum(values[max(0, n - window + 1) : n + 1]) / min(n + 1, window) for n in range(len(values))]

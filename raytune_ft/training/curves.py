"""The plot of a run's curves, as SVG text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from raytune_ft.core.figures import COLOURS, svg_of

_GREY, _TRAIN, _VALIDATION, _TROUBLE = (COLOURS[place] for place in (0, 1, 2, 4))
_POINTS = 2000
"""Most points of a line: more than a page can show."""


def draw_curves(rows: Sequence[Mapping[str, float]], findings: Sequence[tuple[int, str]]) -> str:
    """Losses over learning rate and gradient norm (and rewards, if there are any), by step; findings are dotted lines.

    Same rows, same bytes.

    Args:
        rows: the history; of a long one every n-th step is drawn, evaluations all.
        findings: step and kind of each.
    """
    thinned = rows[:: max(1, math.ceil(len(rows) / _POINTS))]
    evaluated = [row for row in rows if "eval_loss" in row]

    def draw(figure: Any) -> None:
        shown = next((name for name in ("reward", "reward_margin") if any(name in row for row in thinned)), None)
        panels = 3 + (shown is not None)
        losses, *rewards, rates, norms = figure.subplots(panels, 1, sharex=True, height_ratios=(3, *[1] * (panels - 1)))
        losses.plot(*_line(thinned, "loss"), color=_TRAIN, linewidth=1.2, label="training loss")
        if evaluated:
            losses.plot(*_line(evaluated, "eval_loss"), color=_VALIDATION, marker="o", markersize=3, label="validation")
        for step, kind in findings:
            losses.axvline(step, color=_TROUBLE, linestyle=":", linewidth=1)
            losses.annotate(kind, (step, 1), (3, -9), xycoords=("data", "axes fraction"), textcoords="offset points")
        losses.legend(frameon=False, loc="upper right")
        losses.set_ylabel("loss" if shown else "nats per token")
        for axes in rewards:
            axes.plot(*_line(thinned, str(shown)), color=_TRAIN, linewidth=1)
            axes.plot(*_line(rows, f"eval_{shown}"), color=_VALIDATION, marker="o", markersize=3)
            axes.set_ylabel(str(shown).replace("_", " "))
        rates.plot(*_line(thinned, "learning_rate"), color=_GREY, linewidth=1)
        rates.set_ylabel("learning rate")
        norms.plot(*_line(thinned, "grad_norm"), color=_GREY, linewidth=1)
        norms.set_ylabel("gradient norm")
        norms.set_xlabel("step")
        for axes in (losses, *rewards, rates, norms):
            axes.grid(axis="y")
            axes.tick_params(length=0)
        figure.align_ylabels()

    return svg_of(draw, 7, 5.4)


def _line(rows: Sequence[Mapping[str, float]], key: str) -> tuple[list[float], list[float]]:
    shown = [row for row in rows if math.isfinite(row.get(key, math.nan))]
    return [row["step"] for row in shown], [row[key] for row in shown]

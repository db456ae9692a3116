"""Plots of a sweep, as SVG text in the style of all our pages."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

from raytune_ft.core.figures import COLOURS, log_scale, svg
from raytune_ft.tuning.result import SweepResult

_SHADES = "viridis_r"
_PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 1}
_NAMED = 12
"""Trials that a legend may name."""
_WIDE = 3
"""Settings whose names fit side by side."""
_LONGEST_VALUE, _LONGEST_LINE = 14, 70
"""Characters of a value beside its line, and of a line of a legend."""
_DASHES = ("-", "--", ":")


def survival(result: SweepResult) -> str:
    """The curve of every trial; the best one stands out, and a cross ends the ones that were stopped."""
    best, others = result.best, [colour for colour in COLOURS if colour != COLOURS[2]]
    drawn = [*result.trials, *([best] if best in result.repeats else [])]
    names = [_in_lines(t.label([*result.varied, "seed"]) + (" (best)" if t is best else "")) for t in drawn]
    lines = sum(name.count("\n") + 1 for name in names) if len(drawn) <= _NAMED else 0

    def paint(axes: Any) -> None:
        for number, trial in enumerate(drawn):
            points = [(row["global_step"], row[result.metric]) for row in trial.curve if result.metric in row]
            if not points:
                continue
            chosen = trial is best
            again, place = divmod(number, len(others))
            colour = COLOURS[2] if chosen else others[place]
            axes.plot(
                [x for x, _ in points],
                [y for _, y in points],
                marker="o",
                linestyle="-" if chosen else _DASHES[again % len(_DASHES)],  # a colour that comes again is dashed
                color=colour,
                linewidth=3 if chosen else 1.5,
                markersize=5,
                label=names[number],
            )
            if trial.ending != "finished":
                axes.plot(*points[-1], "x", color=colour, markersize=11, markeredgewidth=2.5)
        if result.goal.is_loss:
            log_scale(axes)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(result.goal.title)
        if lines:
            axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(0, -0.5 / 3))

    return svg(paint, height=3.6 + 0.17 * lines, grid="y")


def parallel(result: SweepResult) -> str:
    """Parallel coordinates: a line a trial through its settings to its metric, darker where that is better."""
    names = result.varied
    scored = [(trial, value) for trial in result.trials if (value := trial.best(result.metric)) is not None]
    columns = [[_shown(trial.settings.get(name, "–")) for trial, _ in scored] for name in names]
    places = [_places(values) for values in columns]
    metric = [result.goal.cost(value) for _, value in scored]
    order, winner = _ranks(metric), {**result.best.settings, "seed": None}
    crowded = len(names) > _WIDE

    def paint(axes: Any) -> None:
        import matplotlib as mpl

        shades = mpl.colormaps[_SHADES]
        for number in range(len(scored)):
            heights = [column[number] for column in places] + [1 - order[number]]
            best = {**scored[number][0].settings, "seed": None} == winner
            axes.plot(
                range(len(names) + 1),
                heights,
                color=COLOURS[2] if best else shades(1 - order[number]),
                linewidth=3 if best else 1.3,
                zorder=3 if best else 2,
            )
        for x, values in enumerate(columns):
            for value, height in {value: places[x][n] for n, value in enumerate(values)}.items():
                axes.annotate(
                    _short(value),
                    (x, height),
                    (4, 0),
                    textcoords="offset points",
                    size=6 if crowded else 8,
                    va="center",
                    bbox=_PAPER,
                    zorder=4,
                )
        turned = {"rotation": 25, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
        axes.set_xticks(range(len(names) + 1), [*names, f"rank by {result.metric}"], **turned)
        axes.set_yticks([])
        axes.margins(x=0.12)

    return svg(paint)


def heat_map(result: SweepResult, upwards: str, across: str) -> str | None:
    """The best metric at each value of two settings; None if there are not some values of both, or too many."""
    cells: dict[tuple[float, float], float] = {}
    for trial in result.trials:
        value = trial.best(result.metric)
        if value is not None:
            cell = (trial.settings[upwards], trial.settings[across])
            cells[cell] = min(value, cells.get(cell, value), key=result.goal.cost)
    rows, columns = (sorted({cell[axis] for cell in cells}) for axis in (0, 1))
    if len(rows) < 2 or len(columns) < 2 or len(cells) > _NAMED * 4:
        return None

    def paint(axes: Any) -> None:
        grid = [[cells.get((row, column), math.nan) for column in columns] for row in rows]
        costs = [[result.goal.cost(value) for value in row] for row in grid]
        axes.imshow(costs, cmap=_SHADES.removesuffix("_r"), aspect="auto", origin="lower")  # the better, the darker
        middle = result.goal.cost((min(cells.values()) + max(cells.values())) / 2)
        for y, row in enumerate(grid):
            for x, value in enumerate(row):
                if not math.isnan(value):
                    axes.text(
                        x,
                        y,
                        f"{value:.3f}",
                        ha="center",
                        va="center",
                        size=9,
                        color="white" if costs[y][x] < middle else "black",
                    )
        axes.set_xticks(range(len(columns)), [f"{value:g}" for value in columns])
        axes.set_yticks(range(len(rows)), [f"{value:g}" for value in rows])
        axes.set_xlabel(across)
        axes.set_ylabel(upwards)
        axes.grid(visible=False)

    return svg(paint)


def shares(importance: dict[str, float]) -> str:
    """How much of the trials' differences each setting explains."""
    names = sorted(importance, key=lambda name: importance[name])

    def paint(axes: Any) -> None:
        axes.barh(names, [importance[name] for name in names], color=COLOURS[1], height=0.6)
        axes.set_xlim(0, 1)
        axes.set_xlabel("share of the variance between trials")

    return svg(paint, height=1.1 + 0.4 * len(names))


def _in_lines(text: str) -> str:
    return "\n".join(textwrap.wrap(text, _LONGEST_LINE, subsequent_indent="  ")) or text


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…"


def _places(values: Sequence[str]) -> list[float]:
    """Heights from 0 to 1 for the values of a setting, evenly spaced in their order."""
    known = sorted(set(values), key=_sort_key)
    return [known.index(value) / max(1, len(known) - 1) if len(known) > 1 else 0.5 for value in values]


def _ranks(values: Sequence[float]) -> list[float]:
    """0 for the lowest to 1 for the highest."""
    order = sorted(range(len(values)), key=lambda n: values[n])
    return [order.index(n) / max(1, len(values) - 1) for n in range(len(values))]


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _sort_key(text: str) -> tuple[int, float, str]:
    try:
        return 0, float(text), text
    except ValueError:
        return 1, 0.0, text

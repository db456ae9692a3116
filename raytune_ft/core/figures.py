"""The figures of all our pages: one style, drawn without pyplot's global state; the same paint gives the same bytes."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

COLOURS = ("#8d99a6", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#5f4b8b")
"""One a series, in order: grey for the first, which is the base where there is one, then Okabe and Ito's."""

Paint = Callable[[Any], None]
"""Draws into the axes that it is given."""

_STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"],
    "font.size": 10,
    "svg.fonttype": "none",
    "svg.hashsalt": "raytune_ft",
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": "#c9ced6",
    "axes.labelcolor": "#4a5361",
    "xtick.color": "#6b7482",
    "ytick.color": "#1f2630",
    "grid.color": "#e6e9ee",
}


@dataclass(frozen=True)
class Plot:
    """What is to be drawn, before it is known in which format."""

    paint: Paint
    height: float = 3.6
    """Inches; the width is that of our pages' columns."""
    grid: str = "x"
    width: float = 5.8

    def svg(self) -> str:
        """An SVG document; its text stays text, which the reader's fonts show."""
        return svg_of(self._draw, self.width, self.height)

    def png(self) -> bytes:
        """A PNG image of twice a screen's usual density."""
        buffer = io.BytesIO()
        _save(buffer, self._draw, self.width, self.height, format="png", dpi=192, metadata={"Software": None})
        return buffer.getvalue()

    def _draw(self, figure: Any) -> None:
        axes = figure.add_subplot()
        axes.set_axisbelow(True)
        axes.grid(axis=self.grid)
        axes.tick_params(length=0)
        self.paint(axes)


def svg_of(draw: Callable[[Any], None], width: float, height: float) -> str:
    """The SVG document of a figure of so many inches that `draw` draws into."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph .* missing from font", UserWarning)
        _save(buffer, draw, width, height, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _save(buffer: Any, draw: Callable[[Any], None], width: float, height: float, **how: Any) -> None:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        figure.savefig(buffer, **how)


def svg(paint: Paint, *, height: float = 3.6, grid: str = "x") -> str:
    """The SVG document of a `Plot`."""
    return Plot(paint, height, grid).svg()


def log_scale(axes: Any) -> None:
    """A logarithmic y axis with plain numbers; our style leaves the formulas raw that matplotlib would write."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())

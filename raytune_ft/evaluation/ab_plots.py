"""Plots of an A/B test: how the gain in ratings came about, and how long answers take."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from raytune_ft.core.figures import COLOURS, Plot
from raytune_ft.evaluation.config_ab import ABAnalysisConfig
from raytune_ft.evaluation.contrasts import contrast, measures_of
from raytune_ft.evaluation.exposures import Exposures
from raytune_ft.evaluation.ratings import Ratings
from raytune_ft.evaluation.statistics import Floats
from raytune_ft.evaluation.subjects import sample_of, subject_means

CAPTIONS = {
    "gain": "Gain in the share of good ratings over the control, as it was seen while subjects came, with the interval "
    "that holds it at all looks together. Dotted: the least gain that is worth a change.",
    "latency": "Share of the requests that are answered within so many seconds.",
}
_LOOKS = 60
_FEWEST = 10
"""Subjects of a variant before its gain is drawn."""


def draw(exposures: Exposures, ratings: Ratings, config: ABAnalysisConfig) -> dict[str, Plot]:
    """The plots that the logs give rise to, by name (see `CAPTIONS`)."""
    plots = {}
    gains = gains_by_look(exposures, ratings, config)
    if any(len(points) > 1 for points in gains.values()):
        plots["gain"] = _gain(exposures, gains, config)
    if (exposures.status == 200).any():
        plots["latency"] = _latency(exposures)
    return plots


def gains_by_look(
    exposures: Exposures, ratings: Ratings, config: ABAnalysisConfig
) -> dict[str, list[tuple[int, float, float, float]]]:
    """Of each variant, at looks of about the same number of new subjects, how many there were, and what was known.

    Returns:
        Subjects of the test so far, gain in good ratings, and its interval; only finite ones.
    """
    subjects = len(exposures.subject_variant)
    came = np.full(subjects, np.inf)
    np.minimum.at(came, exposures.subject, exposures.time)
    moments = np.sort(came)
    goal = measures_of(config)[0]
    control, *variants = exposures.variants
    known = ~np.isnan(ratings.good)
    found: dict[str, list[tuple[int, float, float, float]]] = {variant: [] for variant in variants}
    for number in np.unique(np.linspace(1, subjects, min(_LOOKS, subjects)).astype(int)):
        # The last look is at everything: feedback comes behind the last request, too.
        moment = math.inf if number == subjects else moments[number - 1]
        means = subject_means(ratings.good, known & (ratings.time <= moment), exposures.subject, subjects)
        samples = [sample_of(means[exposures.subject_variant == side], share=True) for side in range(1 + len(variants))]
        for variant, own in zip(variants, samples[1:], strict=True):
            if min(own.subjects, samples[0].subjects) >= _FEWEST:
                seen = contrast(goal, variant, control, (own, samples[0]), config)
                found[variant].append((int(number), seen.difference, seen.low, seen.high))
    return found


def _gain(
    exposures: Exposures, gains: dict[str, list[tuple[int, float, float, float]]], config: ABAnalysisConfig
) -> Plot:
    def paint(axes: Any) -> None:
        axes.axhline(0, color="#8b94a3", linewidth=1)
        axes.axhline(config.min_effect, color="#8b94a3", linewidth=1, linestyle=":")
        reach = config.min_effect
        for variant, points in gains.items():
            if not points:
                continue
            colour = COLOURS[exposures.variants.index(variant) % len(COLOURS)]
            number, gain, low, high = (np.array(column) for column in zip(*points, strict=True))
            axes.fill_between(number, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.plot(number, gain, color=colour, linewidth=2, label=variant)
            later = len(gain) // 5
            reach = max(reach, float(np.abs([low[later:], high[later:]]).max()))
        axes.set_ylim(-1.1 * min(reach, 1), 1.1 * min(reach, 1))
        axes.set_xlabel("subjects of the test")
        axes.set_ylabel("gain in good ratings")
        axes.figure.legend(loc="outside upper left", ncols=4, frameon=False)

    return Plot(paint, height=3.4, grid="both")


def _latency(exposures: Exposures) -> Plot:
    from matplotlib.ticker import LogLocator

    def paint(axes: Any) -> None:
        answered = exposures.status == 200
        for place, variant in enumerate(exposures.variants):
            seconds = exposures.latency_s[answered & (exposures.variant == place)]
            if len(seconds):
                at, shares = _steps(seconds)
                axes.step(at, shares, where="post", color=COLOURS[place % len(COLOURS)], linewidth=2, label=variant)
        axes.set_ylim(0, 1.02)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.set_xlabel("seconds to the end of the answer")
        axes.set_ylabel("share of requests")
        axes.figure.legend(loc="outside upper left", ncols=4, frameon=False)

    return Plot(paint, height=3.2, grid="both")


def _steps(seconds: Floats) -> tuple[Floats, Floats]:
    """The distribution of many values as at most 500 steps."""
    shares = np.linspace(0, 1, min(len(seconds), 500) + 1)[1:]
    return np.quantile(np.maximum(seconds, 1e-4), shares), shares

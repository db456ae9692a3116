"""Tests and intervals that hold however often, and whenever, one looks at a running experiment.

The mixture sequential probability ratio test: under "no difference" the likelihood ratio of a difference drawn from a
normal distribution of width `scale`, against none, is a martingale of mean 1, so that it ever reaches 1 / alpha with a
probability of at most alpha (Ville's inequality). Robbins, "Statistical methods related to the law of the iterated
logarithm", Annals of Mathematical Statistics 41 (1970); for A/B tests with estimated variances Johari, Koomen, Pekelis
and Walsh, "Always valid inference", Operations Research 70 (2022), and, for what estimated variances cost,
Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas, "Time-uniform central limit theory and asymptotic confidence
sequences", Annals of Statistics 52 (2024): the guarantee is asymptotic, so from few subjects nothing is concluded. Nor
does the theory cover subjects that come back, whose means change after they were counted; that this makes no more false
findings was simulated, and is in the tests.

`scale` is chosen before the data: near the differences that one wants to find, results come soonest.
"""

from __future__ import annotations

import math

from raytune_ft.evaluation.statistics import POWER


def always_valid_p(difference: float, standard_error: float, scale: float) -> float:
    """The p-value of "no difference" at this look: at most alpha at any look with a chance of at most alpha in all.

    Args:
        difference: estimated.
        standard_error: of the estimate, in the same units; 0 or no number where nothing is known of it.
        scale: width of the mixture, in the same units.
    """
    if not (0 < standard_error < math.inf) or not math.isfinite(difference):
        return 1.0
    variance, prior = standard_error**2, scale**2
    exponent = prior * difference**2 / (2 * variance * (variance + prior))
    return min(1.0, math.exp(0.5 * math.log1p(prior / variance) - exponent))


def always_valid_radius(standard_error: float, scale: float, *, alpha: float) -> float:
    """Half the width of the interval that holds the difference at all looks together with a chance of 1 - alpha.

    It holds 0 exactly where `always_valid_p` is above `alpha`. Infinite where nothing is known of the spread.
    """
    if not (0 < standard_error < math.inf):
        return math.inf
    variance, prior = standard_error**2, scale**2
    return math.sqrt(variance * (variance + prior) / prior * (math.log1p(prior / variance) - 2 * math.log(alpha)))


def units_to_tell(difference: float, standard_error: float, units: int, scale: float, *, alpha: float) -> int | None:
    """How many units in all it takes until a difference of this size is told, four times in five.

    From the normal approximation: the standard error shrinks with the root of the units.

    Args:
        difference: that is assumed to be there.
        standard_error: of the estimate, measured on `units` units.
        units: measured on.
        scale: as of `always_valid_p`.
        alpha: level of the test.

    Returns:
        The number of units; None where the difference is 0 or nothing is known of the spread.
    """
    from scipy.optimize import brentq
    from scipy.stats import norm

    if difference == 0 or not (0 < standard_error < math.inf) or not math.isfinite(difference):
        return None
    margin = float(norm.ppf(POWER))

    def short_of(log_error: float) -> float:
        error = math.exp(log_error)
        return always_valid_radius(error, scale, alpha=alpha) + margin * error - abs(difference)

    least, most = math.log(abs(difference)) - 12, math.log(abs(difference)) + 2
    needed = math.exp(brentq(short_of, least, most))
    return math.ceil(units * (standard_error / needed) ** 2)

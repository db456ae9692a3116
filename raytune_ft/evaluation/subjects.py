"""Subjects as the units of an A/B test: whoever was given a variant counts once, however often they asked.

Requests of one person resemble each other, so that as many requests of few people know less than they seem to. What
is compared is therefore, per subject, the mean over its requests; subjects were drawn independently.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from raytune_ft.evaluation.exposures import Bools, Ints
from raytune_ft.evaluation.statistics import Floats


@dataclass(frozen=True)
class Sample:
    """Subjects of one variant: how many, the mean of their values, and the variance of that mean."""

    subjects: int
    mean: float
    variance: float


def subject_means(values: Floats, counted: Bools, subject: Ints, subjects: int) -> Floats:
    """The mean value of each subject over its requests that are `counted`; NaN of a subject without one.

    Args:
        values: [requests].
        counted: [requests].
        subject: [requests], the number of each request's subject.
        subjects: how many there are.
    """
    chosen = subject[counted]
    sums = np.bincount(chosen, values[counted], subjects)
    counts = np.bincount(chosen, minlength=subjects)
    with np.errstate(invalid="ignore"):
        return np.asarray(sums / np.where(counts, counts, np.nan))


def sample_of(means: Floats, *, share: bool) -> Sample:
    """What a variant's subjects say together.

    The spread of shares counts two imaginary subjects more, one with 0 and one with 1 (as Agresti and Coull 1998 do
    for a proportion), so that a variant without a single error is not taken for one that cannot have any.

    Args:
        means: of each subject; NaN does not count.
        share: whether they lie between 0 and 1.
    """
    known = means[~np.isnan(means)]
    count = len(known)
    if count < 2:
        return Sample(count, float(known[0]) if count else math.nan, math.inf)
    mean = float(known.mean())
    spread = float(((known - mean) ** 2).sum())
    if share:
        spread += mean**2 + (1 - mean) ** 2
    return Sample(count, mean, spread / (count - 1) / count)


def quantile_interval(values: Floats, subject: Ints, quantile: float) -> tuple[float, float, float]:
    """A quantile of requests' values with a 95% interval that counts subjects, not requests.

    Woodruff's interval (1952): the share of values up to the quantile is a ratio of sums over subjects, whose standard
    error (linearized, as Deng, Knoblich and Lu 2018 do) is read off as quantiles at both ends.

    Args:
        values: [requests], at least one.
        subject: [requests], the number of each request's subject.
        quantile: between 0 and 1.

    Returns:
        The quantile, and the ends of its interval.
    """
    from scipy.stats import norm

    found = float(np.quantile(values, quantile))
    _, place = np.unique(subject, return_inverse=True)
    counts = np.bincount(place).astype(float)
    below = np.bincount(place, (values <= found).astype(float))
    subjects = len(counts)
    if subjects < 2:
        return found, float(values.min()), float(values.max())
    residuals = below - counts * below.sum() / counts.sum()
    error = math.sqrt(subjects / (subjects - 1) * float((residuals**2).sum())) / counts.sum()
    reach = float(norm.ppf(0.975)) * error
    low, high = np.quantile(values, [max(quantile - reach, 0.0), min(quantile + reach, 1.0)])
    return found, float(low), float(high)

"""A variant of an A/B test against the control: ratings, errors and times, by subjects, valid at every look."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from raytune_ft.evaluation.always_valid import always_valid_p, always_valid_radius, units_to_tell
from raytune_ft.evaluation.compare import signed
from raytune_ft.evaluation.config_ab import ABAnalysisConfig
from raytune_ft.evaluation.exposures import Exposures
from raytune_ft.evaluation.ratings import Ratings
from raytune_ft.evaluation.statistics import Floats, holm
from raytune_ft.evaluation.subjects import Sample, sample_of, subject_means

Role = Literal["goal", "guardrail", "watched"]
Verdict = Literal["better", "worse", "holds", "cannot tell"]


@dataclass(frozen=True)
class Measure:
    """Something that is measured of every subject, and what a difference in it means."""

    name: str
    title: str
    role: Role
    """``goal``: more is better; ``guardrail``: more is worse, up to a tolerance; ``watched``: neither."""
    scale: float
    """The size of the differences that are looked for; see `always_valid`."""
    tolerance: float = 0.0
    """How much more a guardrail allows, in the measure's own units."""
    times: bool = False
    """Whether values are logarithms of seconds, so that differences are ratios; else they are shares."""

    def value_text(self, value: float) -> str:
        """A value for people."""
        if math.isnan(value):
            return "-"
        return f"{math.exp(value):.3f} s" if self.times else f"{value:.3f}"

    def difference_text(self, difference: float) -> str:
        """A difference for people: of times as a share of the control's."""
        if not math.isfinite(difference):
            return "unknown" if math.isnan(difference) else "unbounded"
        return f"{math.expm1(difference):+.1%}" if self.times else signed(difference)


@dataclass(frozen=True)
class Contrast:
    """One variant against the control in one measure; `difference` is its value minus the control's."""

    measure: Measure
    variant: str
    control: str
    sample: Sample
    control_sample: Sample
    difference: float
    low: float
    high: float
    """The interval holds the difference at all looks together with the asked confidence; not corrected."""
    standard_error: float
    p_value: float
    """Always valid, alone; of a guardrail, of a rise beyond its tolerance. 1 with too few subjects."""
    p_adjusted: float
    """The same after Holm's correction for all `tests` that the analysis makes."""
    tests: int
    enough: bool
    """Whether both sides have the subjects that it takes to conclude anything."""
    verdict: Verdict
    share_to_tell: float | None
    """How many times as many subjects would tell, were the difference what it seems; None where that is unknown."""

    @property
    def words(self) -> str:
        """The verdict, and the numbers that carry it."""
        said = {
            "better": f"{self.variant} is better than {self.control}",
            "worse": f"{self.variant} is worse than {self.control}",
            "holds": f"{self.variant} holds against {self.control}",
            "cannot tell": f"cannot tell {self.variant} from {self.control}",
        }[self.verdict]
        if self.measure.role == "watched" and self.verdict != "cannot tell":
            said = f"{self.variant} differs from {self.control}"
        if not self.enough:
            said += ", too few subjects"
        text = self.measure.difference_text
        allowed = f", {text(self.measure.tolerance)} is allowed" if self.measure.role == "guardrail" else ""
        return (
            f"{self.measure.title}: {said} ({self.measure.value_text(self.sample.mean)} of {self.sample.subjects} "
            f"subjects against {self.measure.value_text(self.control_sample.mean)} of {self.control_sample.subjects}; "
            f"difference {text(self.difference)}, interval {text(self.low)} to {text(self.high)}{allowed})."
        )


def measures_of(config: ABAnalysisConfig) -> tuple[Measure, ...]:
    """What is measured, the goal first."""
    slower = math.log1p(config.max_latency_rise)
    return (
        Measure("good", "Good ratings", "goal", config.min_effect),
        Measure("errors", "Errors", "guardrail", config.max_error_rise, config.max_error_rise),
        Measure("latency", "Latency", "guardrail", slower, slower, times=True),
        Measure("first_token", "Time to first token", "guardrail", slower, slower, times=True),
        Measure("rated", "Rated answers", "watched", config.min_effect),
    )


def values_by_subject(measures: Sequence[Measure], exposures: Exposures, ratings: Ratings) -> dict[str, Floats]:
    """Of each measure the mean of every subject [subjects]; NaN where a subject has none.

    Requests that the client spoiled (other 4xx), or did not wait for, count neither as answered nor as an error.
    """
    answered = exposures.status == 200
    failed = exposures.status >= 500
    columns = {
        "good": (ratings.good, ~np.isnan(ratings.good)),
        "rated": (ratings.rated.astype(float), answered),
        "errors": (failed.astype(float), answered | failed),
        "latency": (_log(exposures.latency_s), answered),
        "first_token": (_log(exposures.first_token_s), answered & ~np.isnan(exposures.first_token_s)),
    }
    subjects = len(exposures.subject_variant)
    return {m.name: subject_means(*columns[m.name], exposures.subject, subjects) for m in measures}


def contrasts_of(exposures: Exposures, values: Mapping[str, Floats], config: ABAnalysisConfig) -> tuple[Contrast, ...]:
    """Every variant against the control in every measure, corrected (Holm) for being one family of tests."""
    control, *variants = exposures.variants
    found = []
    for place, variant in enumerate(variants, 1):
        for measure in measures_of(config):
            sides = [
                sample_of(values[measure.name][exposures.subject_variant == side], share=not measure.times)
                for side in (place, 0)
            ]
            found.append(contrast(measure, variant, control, (sides[0], sides[1]), config))
    adjusted = holm([one.p_value for one in found])
    return tuple(_judged(one, p, len(found), config) for one, p in zip(found, adjusted, strict=True))


def contrast(
    measure: Measure, variant: str, control: str, samples: tuple[Sample, Sample], config: ABAnalysisConfig
) -> Contrast:
    """A variant's sample against the control's, before other tests are known of."""
    own, other = samples
    difference, error = own.mean - other.mean, math.sqrt(own.variance + other.variance)
    enough = min(own.subjects, other.subjects) >= config.min_subjects
    beyond = difference - measure.tolerance
    p_value = 1.0
    if enough and (measure.role != "guardrail" or beyond > 0):
        p_value = always_valid_p(beyond, error, measure.scale)
    radius = always_valid_radius(error, measure.scale, alpha=1 - config.confidence)
    found = Contrast(
        measure=measure,
        variant=variant,
        control=control,
        sample=own,
        control_sample=other,
        difference=difference,
        low=difference - radius,
        high=difference + radius,
        standard_error=error,
        p_value=p_value,
        p_adjusted=p_value,
        tests=1,
        enough=enough,
        verdict="cannot tell",
        share_to_tell=None,
    )
    return _judged(found, p_value, 1, config)


def _judged(found: Contrast, p_adjusted: float, tests: int, config: ABAnalysisConfig) -> Contrast:
    alpha = 1 - config.confidence
    verdict: Verdict = "cannot tell"
    if found.enough and p_adjusted <= alpha + 1e-12:
        verdict = "worse" if found.measure.role == "guardrail" or found.difference < 0 else "better"
    elif found.enough and found.measure.role == "guardrail" and found.high <= found.measure.tolerance:
        verdict = "holds"
    needed = _share_to_tell(found, tests, config) if verdict == "cannot tell" else None
    return replace(found, p_adjusted=p_adjusted, tests=tests, verdict=verdict, share_to_tell=needed)


def _share_to_tell(found: Contrast, tests: int, config: ABAnalysisConfig) -> float | None:
    """Of a guardrail, until it is told to hold (or not); of the others, until the difference is told, or, of the goal,
    until a gain that is worth a change is ruled out, whichever comes first."""
    fewest = min(found.sample.subjects, found.control_sample.subjects)
    if fewest < 2:
        return None
    units = found.sample.subjects + found.control_sample.subjects
    alpha = 1 - config.confidence
    distances = [(found.difference, alpha / tests)]
    if found.measure.role == "guardrail":
        beyond = found.difference - found.measure.tolerance
        distances = [(beyond, alpha / tests if beyond > 0 else alpha)]
    elif found.measure.role == "goal" and found.difference < config.min_effect:
        distances.append((config.min_effect - found.difference, alpha))
    needed = [
        units_to_tell(distance, found.standard_error, units, found.measure.scale, alpha=level)
        for distance, level in distances
    ]
    known = [number for number in needed if number is not None]
    return max(min(known) / units, config.min_subjects / fewest, 1.0) if known else None


def _log(seconds: Floats) -> Floats:
    return np.asarray(np.log(np.maximum(seconds, 1e-6)))

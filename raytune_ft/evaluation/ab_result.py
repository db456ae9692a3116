"""What an A/B test says so far: its variants in numbers, whether the split can be trusted, and what to do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from raytune_ft.evaluation.config_ab import ABAnalysisConfig
from raytune_ft.evaluation.contrasts import Contrast, contrasts_of, measures_of, values_by_subject
from raytune_ft.evaluation.exposures import Exposures, Ints
from raytune_ft.evaluation.ratings import Ratings
from raytune_ft.evaluation.statistics import Columns, Floats, interval
from raytune_ft.evaluation.subjects import quantile_interval

MISMATCH = 0.001
"""Below this p-value of the chi-square test the split counts as broken, as Fabijan et al. (2019) have it."""
_MOST_SUBJECTS = 10_000_000
_WEEK = 7  # days
QUANTILES = (0.5, 0.95)

Action = Literal["promote", "keep", "go on", "cannot conclude"]
Span = tuple[float, float, float]
"""A value, and the ends of its interval."""


@dataclass(frozen=True)
class VariantSummary:
    """What is known of one variant; intervals are 95% ones of this look alone, over subjects."""

    name: str
    share: float
    requests: int
    subjects: int
    unanswered: dict[str, int]
    """Requests by status, other than 200."""
    values: dict[str, Span | None]
    """Of each share among the measures: the mean over subjects; None where nobody has a value."""
    latency_s: dict[str, Span]
    """Quantiles over requests of whole answers, and..."""
    first_token_s: dict[str, Span]
    """...of first tokens."""
    tokens: float
    """Mean length of an answer; NaN where there is none."""
    ratings: int


@dataclass(frozen=True)
class Decision:
    """What to do with a variant, in words."""

    variant: str
    action: Action
    words: str
    more_subjects: int | None = None
    """How many further subjects of the whole test it is likely to take, where it is to go on."""


@dataclass(frozen=True)
class ABResult:
    """What the analysis of a test found."""

    test: str
    control: str
    first: float
    last: float
    """Times of the first and last request, in seconds since 1970."""
    variants: tuple[VariantSummary, ...]
    mismatch_p: float
    """Of the chi-square test that subjects are split as the settings say."""
    contrasts: tuple[Contrast, ...]
    decisions: tuple[Decision, ...]
    notes: tuple[str, ...]


def analysed(exposures: Exposures, ratings: Ratings, config: ABAnalysisConfig) -> ABResult:
    """What the log and the feedback of a test say."""
    values = values_by_subject(measures_of(config), exposures, ratings)
    contrasts = contrasts_of(exposures, values, config)
    counts = np.bincount(exposures.subject_variant, minlength=len(exposures.shares))
    p_value = mismatch_p(counts.tolist(), list(exposures.shares.values()))
    broken = _broken(exposures, counts.tolist(), p_value)
    decisions = []
    for place, variant in enumerate(exposures.variants[1:], 1):
        own = [found for found in contrasts if found.variant == variant]
        if broken:
            decisions.append(Decision(variant, "cannot conclude", f"{variant}: cannot conclude: {broken}"))
        else:
            given = int(ratings.rated[np.isin(exposures.variant, (0, place))].sum())
            decisions.append(decided(own, config, len(exposures.subject_variant), ratings=given))
    return ABResult(
        test=exposures.test,
        control=exposures.variants[0],
        first=float(exposures.time.min()),
        last=float(exposures.time.max()),
        variants=tuple(_summary(place, exposures, ratings, values, config) for place in range(len(exposures.shares))),
        mismatch_p=p_value,
        contrasts=contrasts,
        decisions=tuple(decisions),
        notes=_notes(exposures, ratings, contrasts, decisions),
    )


def mismatch_p(counts: Sequence[int], shares: Sequence[float]) -> float:
    """The p-value of a chi-square test that so many subjects of each variant came of these shares; 1 where fewer than
    five were to be expected of one, of which the test says nothing."""
    from scipy.stats import chisquare

    expected = [sum(counts) * share / sum(shares) for share in shares]
    return float(chisquare(counts, expected).pvalue) if min(expected) >= 5 else 1.0


def decided(contrasts: Sequence[Contrast], config: ABAnalysisConfig, subjects: int, *, ratings: int = 0) -> Decision:
    """What the contrasts of one variant amount to.

    A guardrail that is shown to be broken decides, whatever people say; to promote a variant, its ratings have to be
    shown better and all guardrails to hold.

    Args:
        contrasts: of one variant with the control.
        config: what is worth a change.
        subjects: that the whole test has had so far.
        ratings: that the answers of the variant and the control have, neutral ones among them.
    """
    goal = next(found for found in contrasts if found.measure.role == "goal")
    guardrails = [found for found in contrasts if found.measure.role == "guardrail"]
    variant, control = goal.variant, goal.control
    broken = [_broken_guardrail(found) for found in guardrails if found.verdict == "worse"]
    if broken:
        return Decision(variant, "keep", f"{variant}: keep {control}: regression of {' and of '.join(broken)}.")
    if goal.verdict == "worse":
        return Decision(variant, "keep", f"{variant}: keep {control}: its answers are rated worse.")
    if goal.enough and goal.verdict == "cannot tell" and goal.high < config.min_effect:
        words = f"a gain of {config.min_effect:g} in good ratings is ruled out, it is at most {goal.high:.3f}"
        return Decision(variant, "keep", f"{variant}: keep {control}: {words}.")
    open_ones = [found for found in guardrails if found.verdict != "holds"]
    if goal.verdict == "better" and not open_ones:
        words = "its answers are rated better, and all guardrails hold"
        return Decision(variant, "promote", f"{variant}: promote it in the place of {control}: {words}.")
    return _going_on(goal, open_ones, config, subjects, ratings)


def _going_on(
    goal: Contrast, guardrails: Sequence[Contrast], config: ABAnalysisConfig, subjects: int, ratings: int
) -> Decision:
    waiting = [found for found in (goal, *guardrails) if found.verdict == "cannot tell"]
    what = ", ".join(found.measure.title.lower() for found in waiting)
    words = f"{goal.variant}: go on: not settled yet: {what}"
    few = [found for found in waiting if not found.enough]
    if few:
        least = min(min(found.sample.subjects, found.control_sample.subjects) for found in few)
        words += f" (some have {least} subjects of a variant, {config.min_subjects} are needed)"
    if goal.verdict == "cannot tell" and goal.sample.subjects + goal.control_sample.subjects == 0:
        return Decision(goal.variant, "go on", f"{words}. {_nothing_rated(ratings)}")
    shares = [found.share_to_tell for found in waiting]
    if any(share is None for share in shares):
        return Decision(goal.variant, "go on", f"{words}. How many more subjects it takes cannot be said yet.")
    more = max(1, math.ceil((max(share for share in shares if share is not None) - 1) * subjects))
    if more > _MOST_SUBJECTS:
        words += f". If things are what they seem, it takes more than {_MOST_SUBJECTS:,} further subjects"
        return Decision(goal.variant, "go on", f"{words}.", None)
    rough = float(f"{more:.2g}")
    return Decision(
        goal.variant,
        "go on",
        f"{words}. If things are what they seem, about {rough:,.0f} more subjects settle it.",
        more,
    )


def _nothing_rated(ratings: int) -> str:
    """Why ratings say nothing of good or bad."""
    if not ratings:
        return "Nobody has rated an answer: ratings decide."
    number = "The one rating is" if ratings == 1 else f"All {ratings:,} ratings are"
    return f"{number} neutral (3 of 5), neither good nor bad: ratings of good or bad decide."


def _broken_guardrail(found: Contrast) -> str:
    text = found.measure.difference_text
    return (
        f"{found.measure.title.lower()} ({text(found.difference)}, at least {text(found.low)}; "
        f"{text(found.measure.tolerance)} is allowed)"
    )


def _broken(exposures: Exposures, counts: Sequence[int], p_value: float) -> str:
    """Why nothing can be concluded; empty if something can."""
    if p_value < MISMATCH:
        wanted = ", ".join(f"{share * sum(counts):.0f}" for share in exposures.shares.values())
        return (
            f"the subjects are not split as they should be ({', '.join(map(str, counts))} where {wanted} were "
            f"expected, chi-square p {'< 0.001' if p_value > 1e-12 else '< 1e-12'}). Find out which requests are lost, "
            "or counted twice, before believing any difference: of one replica's log, of a variant that crashes, of "
            "clients that repeat one variant's requests."
        )
    if exposures.crossed:
        return (
            f"{exposures.crossed} subjects were given more than one variant, though one name and salt give each one. "
            "Find out which of the log's lines do not belong together."
        )
    return ""


def _summary(
    place: int, exposures: Exposures, ratings: Ratings, values: Mapping[str, Floats], config: ABAnalysisConfig
) -> VariantSummary:
    own = exposures.variant == place
    of_own = exposures.subject_variant == place
    answered = own & (exposures.status == 200)
    statuses, numbers = np.unique(exposures.status[own & ~answered], return_counts=True)
    shares = {m.name: _mean_of(values[m.name][of_own]) for m in measures_of(config) if not m.times}
    tokens = exposures.tokens[answered]
    return VariantSummary(
        name=exposures.variants[place],
        share=exposures.shares[exposures.variants[place]],
        requests=int(own.sum()),
        subjects=int(of_own.sum()),
        unanswered={str(status): int(number) for status, number in zip(statuses, numbers, strict=True)},
        values=shares,
        latency_s=_quantiles(exposures.latency_s[answered], exposures.subject[answered]),
        first_token_s=_quantiles(exposures.first_token_s[answered], exposures.subject[answered]),
        tokens=float(tokens.mean()) if len(tokens) else math.nan,
        ratings=int((ratings.rated & own).sum()),
    )


def _mean_of(means: Floats) -> Span | None:
    known = means[~np.isnan(means)]
    if not len(known):
        return None
    found = interval(_mean, {"score": known, "subjects": np.ones(len(known))}, best=1.0)
    return float(known.mean()), found.low, found.high


def _mean(sums: Columns) -> Floats:
    return np.asarray(sums["score"] / sums["subjects"])


def _quantiles(seconds: Floats, subject: Ints) -> dict[str, Span]:
    known = ~np.isnan(seconds)
    if not known.any():
        return {}
    return {f"p{100 * q:g}": quantile_interval(seconds[known], subject[known], q) for q in QUANTILES}


def _notes(
    exposures: Exposures, ratings: Ratings, contrasts: Sequence[Contrast], decisions: Sequence[Decision]
) -> tuple[str, ...]:
    """What a reader has to know before believing the numbers."""
    found = []
    if exposures.unsticky:
        share = exposures.unsticky / len(exposures.variant)
        found.append(
            f"{exposures.unsticky} requests ({share:.0%}) did not say who asks (`user`): each counts as a subject of "
            "its own, and its sender may have met several variants."
        )
    gone = int((exposures.status == 499).sum())
    if gone:
        found.append(f"{gone} requests have no answer because the client went away; they are no errors.")
    if ratings.others:
        found.append(
            f"{ratings.others} of {ratings.others + ratings.attributed} lines of feedback do not count: they name no "
            "answer of this test by its `id`, or say neither good nor bad of one."
        )
    for one in contrasts:
        if one.measure.role == "watched" and one.verdict != "cannot tell":
            found.append(
                f"{one.words} Those who rate may be others than those who rate the control's answers: the share of "
                "good ratings compares different people."
            )
    days = (float(exposures.time.max()) - float(exposures.time.min())) / 86400
    if days < _WEEK:
        ran = f"{days:.1f} days" if days >= 1 else f"{24 * days:.1f} hours"
        found.append(f"The test has run for {ran}: people of other hours and weekdays are not in it.")
    promoted = [decision.variant for decision in decisions if decision.action == "promote"]
    if len(promoted) > 1:
        found.append(
            f"{', '.join(promoted)} are each better than {exposures.variants[0]}; which of them is best was not tested."
        )
    return tuple(found)

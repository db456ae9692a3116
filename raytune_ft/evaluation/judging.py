"""What people's votes between answers amount to: win rates, agreement of judges, and strengths of several models."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from raytune_ft.core.grammar import number_of
from raytune_ft.evaluation.compare import stated
from raytune_ft.evaluation.statistics import Columns, Floats, interval, percentiles, permutation_p_value

Choice = Literal["model", "other", "tie", "both bad"]
CHOICES: tuple[Choice, ...] = get_args(Choice)

_SAMPLES = 500
_CONFIDENCE = 0.95
_SCORES: Mapping[Choice, float] = {"model": 1.0, "other": 0.0, "tie": 0.5, "both bad": 0.5}


@dataclass(frozen=True)
class Vote:
    """What one judge said of two models' answers to one row; the judge did not see which model was which."""

    judge: str
    row: str
    """Id of the row."""
    model: str
    other: str
    choice: Choice
    left: str
    """Whose answer stood on the left."""
    at: str = ""


@dataclass(frozen=True)
class WinRate:
    """How often one model's answer was preferred to another's; ties and both bad count half."""

    model: str
    other: str
    rows: int
    """Rows that at least one judge voted on; several judges of a row count as one vote, their mean."""
    votes: dict[str, int]
    """By choice."""
    win_rate: float
    low: float
    high: float
    p_value: float
    words: str


@dataclass(frozen=True)
class Agreement:
    """Cohen's kappa of two judges over what both voted on; None where it is undefined (one choice alone)."""

    judge: str
    other: str
    shared: int
    kappa: float | None


@dataclass(frozen=True)
class Judging:
    """All votes on a report, summed up."""

    votes: int
    judges: dict[str, int]
    """Votes of each."""
    win_rates: tuple[WinRate, ...]
    agreements: tuple[Agreement, ...]
    strengths: dict[str, tuple[float, float, float]]
    """Of more than two models, by Bradley and Terry (1952): the chance to win against an average model, and its
    interval."""
    left: int
    """Votes for the answer on the left, and..."""
    right: int
    """...on the right: far apart, they tell of a judge who looks at the side."""


def summarized(votes: Sequence[Vote], labels: Sequence[str], *, seed: int = 0) -> Judging:
    """What the votes amount to, with 95% intervals.

    Args:
        votes: the last one counts where a judge voted again on the same two answers.
        labels: of the models, in the order of the report.
        seed: of the bootstrap.
    """
    last = list({(vote.judge, vote.row, vote.model, vote.other): vote for vote in votes}.values())
    rates = []
    for other, model in itertools.combinations(labels, 2):
        between = [vote for vote in last if (vote.model, vote.other) == (model, other)]
        if between:
            rates.append(_win_rate(model, other, between, seed))
    sides = Counter(_side(vote) for vote in last)
    return Judging(
        votes=len(last),
        judges=dict(Counter(vote.judge for vote in last)),
        win_rates=tuple(rates),
        agreements=agreements(last),
        strengths=strengths(last, labels, seed=seed) if len(labels) > 2 and last else {},
        left=sides["left"],
        right=sides["right"],
    )


def agreements(votes: Sequence[Vote]) -> tuple[Agreement, ...]:
    """Cohen's kappa of every two judges that voted on the same answers."""
    by_judge: dict[str, dict[tuple[str, str, str], Choice]] = defaultdict(dict)
    for vote in votes:
        by_judge[vote.judge][vote.row, vote.model, vote.other] = vote.choice
    found = []
    for judge, other in itertools.combinations(sorted(by_judge), 2):
        shared = sorted(by_judge[judge].keys() & by_judge[other].keys())
        if shared:
            said = [[by_judge[name][key] for key in shared] for name in (judge, other)]
            found.append(Agreement(judge, other, len(shared), _kappa(*said)))
    return tuple(found)


def strengths(votes: Sequence[Vote], labels: Sequence[str], *, seed: int = 0) -> dict[str, tuple[float, float, float]]:
    """Each model's chance to win against an average one, with a 95% bootstrap interval over rows.

    Bradley and Terry's model by Hunter's (2004) minorization: ties count half to each side, and one imaginary tie
    between every two models keeps the strength of one that wins or loses all finite.
    """
    from scipy.special import expit

    places = {label: place for place, label in enumerate(labels)}
    rows = {row: place for place, row in enumerate(dict.fromkeys(vote.row for vote in votes))}
    wins = np.zeros((len(rows), len(labels), len(labels)))  # [rows, winner, loser]
    for vote in votes:
        score, model, other = _SCORES[vote.choice], places[vote.model], places[vote.other]
        wins[rows[vote.row], model, other] += score
        wins[rows[vote.row], other, model] += 1 - score
    drawn = np.random.default_rng(seed).multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=_SAMPLES)
    sums = np.concatenate([wins.sum(axis=0)[None], np.einsum("sr,rij->sij", drawn.astype(float), wins)])
    chances = expit(bradley_terry(sums))  # of each model against one of mean log-strength
    found = {}
    for label, place in places.items():
        span = percentiles(chances[1:, place], _CONFIDENCE)
        found[label] = (float(chances[0, place]), span.low, span.high)
    return found


def bradley_terry(wins: Floats) -> Floats:
    """Log-strengths [samples, models] (mean 0) for the wins [samples, winner, loser] and one imaginary tie a pair."""
    models = wins.shape[-1]
    wins = wins + 0.5 * (1 - np.eye(models))
    games = wins + wins.transpose(0, 2, 1)
    strength = np.ones(wins.shape[:2])
    for _ in range(10_000):
        expected = games / (strength[:, :, None] + strength[:, None, :])
        better = wins.sum(axis=2) / expected.sum(axis=2)
        better /= np.exp(np.log(better).mean(axis=1, keepdims=True))
        moved = float(np.max(np.abs(better / strength - 1)))
        strength = better
        if moved < 1e-10:
            break
    return np.log(strength)


def _win_rate(model: str, other: str, votes: Sequence[Vote], seed: int) -> WinRate:
    by_row: dict[str, list[float]] = defaultdict(list)
    for vote in votes:
        by_row[vote.row].append(_SCORES[vote.choice])
    scores = np.array([np.mean(said) for said in by_row.values()])
    columns = {"score": scores, "rows": np.ones(len(scores))}
    against = {"score": 1 - scores, "rows": np.ones(len(scores))}
    found = interval(_mean, columns, confidence=_CONFIDENCE, seed=seed, best=1.0)
    p_value = permutation_p_value(_mean, columns, against, seed=seed)
    counted = Counter(vote.choice for vote in votes)
    rate = float(scores.mean())
    told = p_value <= 1 - _CONFIDENCE + 1e-12
    verdict = f"cannot tell {model} from {other}"
    if told:
        verdict = f"{model} is {'preferred to' if rate > 0.5 else 'liked less than'} {other}"
    words = (
        f"People: {verdict} on {number_of(len(scores), 'row')} (win rate {rate:.0%}, {_CONFIDENCE:.0%} interval "
        f"{found.low:.0%} to {found.high:.0%}, p {stated(p_value)})."
    )
    votes_by_choice: dict[str, int] = {choice: counted[choice] for choice in CHOICES}
    return WinRate(model, other, len(scores), votes_by_choice, rate, found.low, found.high, p_value, words)


def _mean(sums: Columns) -> NDArray[np.float64]:
    return sums["score"] / sums["rows"]


def _kappa(first: Sequence[str], second: Sequence[str]) -> float | None:
    from sklearn.metrics import cohen_kappa_score

    return float(cohen_kappa_score(first, second)) if len({*first, *second}) > 1 else None


def _side(vote: Vote) -> str:
    if vote.choice not in ("model", "other"):
        return "neither"
    winner = vote.model if vote.choice == "model" else vote.other
    return "left" if winner == vote.left else "right"

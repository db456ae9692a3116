"""What judges are shown: the answers of two models to a row, in an order that tells nothing of who gave which."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raytune_ft.core.errors import ConfigError, DataError
from raytune_ft.evaluation.results import EvaluationResult


@dataclass(frozen=True)
class Pair:
    """Two answers to one row."""

    id: str
    """Tells neither the row nor the models."""
    row: str
    """The id of the row."""
    model: str
    other: str
    prompt: str
    reference: str | None
    turns: tuple[dict[str, str], ...]
    answers: Mapping[str, str]
    """By the label of the model."""
    model_is_a: bool
    """Whether `model` is the answer that pages call a."""

    @property
    def labels(self) -> dict[str, str]:
        """Which model is called a, and which b."""
        first, second = (self.model, self.other) if self.model_is_a else (self.other, self.model)
        return {"a": first, "b": second}


@dataclass(frozen=True)
class Pairs:
    """The pairs to judge, and how many there is no need or no room to show."""

    shown: tuple[Pair, ...]
    identical: int
    """Pairs whose two answers are the same text: nothing to judge."""
    left_out: int
    """Pairs above the limit."""


def pairs(
    result: EvaluationResult, *, models: Sequence[str] | None = None, max_pairs: int | None = None, seed: int = 0
) -> Pairs:
    """Every two models' answers to every row, shuffled; all judges see the same pairs in the same order.

    Args:
        result: with the answers of at least two models.
        models: labels of those to judge; all by default.
        max_pairs: only so many, drawn by the seed.
        seed: of the order, and of which answer is called a.

    Raises:
        ConfigError: if a label is unknown, or fewer than two models are left.
        DataError: if the report holds no answers, or none that differ.
    """
    chosen = [model.label for model in result.models] if models is None else list(dict.fromkeys(models))
    known = [model.label for model in result.models]
    unknown = [label for label in chosen if label not in known]
    if unknown:
        raise ConfigError(f"models: the report has no {unknown[0]!r}; it has {', '.join(known)}")
    if len(chosen) < 2:
        raise ConfigError(f"judging takes the answers of at least two models; the report has {', '.join(known)}")
    if any(answer.answer is None for label in chosen for answer in result[label].answers):
        raise DataError("the report holds no answers to judge: only likelihoods were measured; add a metric of answers")
    found: dict[str, tuple[str, str, int]] = {}  # the two models and the row, by the pair's id
    identical: set[str] = set()
    for other, model in itertools.combinations([label for label in known if label in chosen], 2):
        for place, (own, their) in enumerate(zip(result[model].answers, result[other].answers, strict=True)):
            name = _digest(own.id, model, other, seed)[:8].hex()
            if own.answer == their.answer:
                identical.add(name)
            else:
                found.setdefault(name, (model, other, place))
    if not found:
        raise DataError("there is nothing to judge: the models gave the same answer to every row")
    order = sorted(found)[:max_pairs]  # ids are hashes of the seed: this is a shuffle
    shown = tuple(_pair(result, *found[name], seed) for name in order)
    return Pairs(shown, len(identical), len(found) - len(shown))


def _digest(row: str, model: str, other: str, seed: int) -> bytes:
    return hashlib.sha256("\0".join([str(seed), row, model, other]).encode()).digest()


def _pair(result: EvaluationResult, model: str, other: str, place: int, seed: int) -> Pair:
    own, their = result[model].answers[place], result[other].answers[place]
    digest = _digest(own.id, model, other, seed)
    return Pair(
        id=digest[:8].hex(),
        row=own.id,
        model=model,
        other=other,
        prompt=own.prompt,
        reference=own.reference,
        turns=own.turns,
        answers={model: own.answer or "", other: their.answer or ""},
        model_is_a=bool(digest[8] & 1),
    )

"""What evaluations are compared by: one of their numbers, and which way it is better."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from raytune_ft.evaluation.metric_names import EvaluationMetric

_TITLES = {"eval_loss": "validation loss", "eval_perplexity": "validation perplexity", "loss": "training loss"}
OF_REWARDS = {
    "eval_reward_accuracy": ("share of validation pairs ranked right", True),
    "eval_reward_margin": ("reward margin of validation pairs", True),
    "eval_chosen_reward": ("reward of the chosen answers", True),
    "eval_chosen_nll": ("loss of the chosen answers", False),
    "eval_reward": ("reward of answers", True),
}
"""What evaluations on preferences, and of rewards, measure: in words, and whether higher is better."""


@dataclass(frozen=True)
class Goal:
    """A number of an evaluation, by its name there, and whether higher values of it are better."""

    metric: str = "eval_loss"
    higher: bool = False

    @classmethod
    def of(cls, metric: str) -> Goal:
        """The goal of this name: losses are better when lower, ``eval_<metric>`` as that metric of answers is.

        Raises:
            ValueError: if there is no such metric.
        """
        if metric in _TITLES:
            return cls(metric)
        if metric in OF_REWARDS:
            return cls(metric, higher=OF_REWARDS[metric][1])
        return cls(metric, higher=not EvaluationMetric(metric.removeprefix("eval_")).facts.lower_is_better)

    @property
    def mode(self) -> Literal["min", "max"]:
        """The direction in Ray Tune's terms."""
        return "max" if self.higher else "min"

    @property
    def is_loss(self) -> bool:
        """Whether it is a loss, or the exponential of one; these have no upper end."""
        return self.metric in _TITLES

    @property
    def title(self) -> str:
        """The number in words."""
        if self.is_loss:
            return _TITLES[self.metric]
        if self.metric in OF_REWARDS:
            return OF_REWARDS[self.metric][0]
        return f"{EvaluationMetric(self.metric.removeprefix('eval_')).facts.title} of answers"

    @property
    def worst(self) -> float:
        """What no value is worse than."""
        return -math.inf if self.higher else math.inf

    def cost(self, value: float) -> float:
        """The value turned so that lower is better: what to sort by."""
        return -value if self.higher else value

    def best(self, values: Iterable[float]) -> float | None:
        """The best of `values`; None if there are none."""
        return min(values, key=self.cost, default=None)


LOSS = Goal()
"""The validation loss."""

"""What a sweep found: every trial with its settings and curve, and the best one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from raytune_ft.core.errors import RunError
from raytune_ft.training.goal import Goal

Ending = Literal["finished", "stopped early", "failed", "infeasible"]


@dataclass(frozen=True)
class Trial:
    """One combination: its settings, how it ended, and a row of metrics for every evaluation."""

    name: str
    settings: dict[str, Any]
    ending: Ending
    curve: list[dict[str, float]]
    error: str | None = None
    snapshot: str | None = None
    """Where its last state lies while the sweep runs, if it was packed."""
    schedule: list[dict[str, Any]] = field(default_factory=list)
    """Under population-based training, the settings that made its model: `settings` and the step that they were first
    used `after`, in that order. `Trial.settings` are the last ones."""

    def best(self, metric: str) -> float | None:
        """The best value of `metric` on the curve; None without one.

        The training loss is that of a batch, and the luckiest of these says nothing: of it, the mean over the last
        quarter of the values.
        """
        values = [row[metric] for row in self.curve if metric in row]
        if metric == "loss" and values:
            return statistics.fmean(values[-math.ceil(len(values) / 4) :])
        return Goal.of(metric).best(values)

    @property
    def steps(self) -> int:
        """Optimizer steps that were made."""
        return int(self.curve[-1]["global_step"]) if self.curve else 0

    @property
    def last_step(self) -> int | None:
        """The step that it ends at if nothing stops it; None if it was never evaluated."""
        return next((int(row["last_step"]) for row in reversed(self.curve) if "last_step" in row), None)

    @property
    def tokens(self) -> float:
        """Tokens that it was trained on."""
        return next((row["tokens"] for row in reversed(self.curve) if "tokens" in row), 0.0)

    def label(self, names: Collection[str] = ()) -> str:
        """The settings in a few words; with `names`, these only."""
        return _in_words({name: value for name, value in self.settings.items() if not names or name in names})

    def schedule_in_words(self) -> str:
        """The settings that made its model, and when each began."""
        return "; ".join(f"after step {part['after']}: {_in_words(part['settings'])}" for part in self.schedule)


@dataclass(frozen=True)
class Repeated:
    """A setting that was trained with several seeds: mean of its best values, and the 95% interval of that mean.

    The interval is Student's; with one seed there is none.
    """

    settings: dict[str, Any]
    seeds: int
    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class SweepResult:
    """All trials of a sweep, those repeated with fresh seeds, and which is best by `metric`."""

    metric: str
    trials: tuple[Trial, ...]
    repeats: tuple[Trial, ...] = ()
    not_begun: int = 0
    """Trials that the budget left no room for: none of them was measured, and `trials` are the others."""

    @property
    def varied(self) -> list[str]:
        """The settings that tell the trials apart; all, if none does. Not every trial has a use for each."""
        names = list(dict.fromkeys(name for trial in self.trials for name in trial.settings))
        return [name for name in names if len({str(t.settings.get(name)) for t in self.trials}) > 1] or names

    @property
    def goal(self) -> Goal:
        """What trials are compared by, and which way."""
        return Goal.of(self.metric)

    @property
    def ranked(self) -> list[Trial]:
        """The feasible trials that reported the metric, best first; of equal ones, the one of lower validation loss."""
        feasible = [trial for trial in self.trials if trial.ending != "infeasible"]
        return sorted((trial for trial in feasible if trial.best(self.metric) is not None), key=self._place)

    @property
    def distinct(self) -> list[Trial]:
        """Of `ranked`, the best trial of each settings: a random search may try the same ones again."""
        found: list[Trial] = []
        for trial in self.ranked:
            if all(trial.settings != other.settings for other in found):
                found.append(trial)
        return found

    def _place(self, trial: Trial) -> tuple[float, float, str]:
        value, loss = trial.best(self.metric), trial.best("eval_loss")
        assert value is not None
        return self.goal.cost(value), math.inf if loss is None else loss, trial.name

    @property
    def best(self) -> Trial:
        """The trial with the best metric; where some were repeated, that of the setting with the best mean.

        If the search had stopped that one early, it is the best of its repeats, whose model is whole.

        Raises:
            RunError: if no trial reported it, with every trial's reason.
        """
        ranked = self.ranked
        if not ranked:
            reasons = "; ".join(f"{trial.label()}: {trial.error or 'reported nothing'}" for trial in self.trials)
            raise RunError(f"no trial reported {self.metric}: {reasons}")
        if not self.repeated:
            return ranked[0]
        winner = self.repeated[0].settings
        own = next(trial for trial in ranked if trial.settings == winner)
        return own if own.ending == "finished" else min(self._again(own), key=self._place)

    @property
    def repeated(self) -> list[Repeated]:
        """The repeated settings, best mean first; the search's own trial counts as one seed, as does each other.

        Only of finished trials: a mean of cut and whole ones would be of neither.
        """
        found = []
        for trial in self.distinct:
            again = self._again(trial)
            whole = (trial, *again) if trial.ending == "finished" else again
            by_seed = {t.settings.get("seed"): t.best(self.metric) for t in whole}
            if again:
                found.append(_over_seeds(trial.settings, [value for value in by_seed.values() if value is not None]))
        return sorted(found, key=lambda one: self.goal.cost(one.mean))

    def _again(self, trial: Trial) -> tuple[Trial, ...]:
        """The finished repeats of a trial's settings."""
        wanted = {**trial.settings, "seed": None}
        found = (again for again in self.repeats if {**again.settings, "seed": None} == wanted)
        return tuple(t for t in found if t.ending == "finished" and t.best(self.metric) is not None)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready mapping; `from_json` reads it."""
        best = self.best
        return {
            "schema_version": 1,
            "metric": self.metric,
            "not_begun": self.not_begun,
            "best": {"name": best.name, "settings": best.settings, self.metric: best.best(self.metric)},
            "trials": [{**asdict(trial), "snapshot": None} for trial in self.trials],
            "repeats": [{**asdict(trial), "snapshot": None} for trial in self.repeats],
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> SweepResult:
        """The result that `to_json` wrote."""
        trials, repeats = (tuple(Trial(**trial) for trial in content[key]) for key in ("trials", "repeats"))
        return cls(content["metric"], trials, repeats, content.get("not_begun", 0))


def _in_words(settings: dict[str, Any]) -> str:
    return ", ".join(
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in settings.items()
    )


def _over_seeds(settings: dict[str, Any], values: list[float]) -> Repeated:
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Repeated(settings, len(values), mean, None, None)
    from scipy.stats import t as student

    half = float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return Repeated(settings, len(values), mean, mean - half, mean + half)

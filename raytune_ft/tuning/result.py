"""What a sweep found: every trial with its settings and curve, and the best one."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from raytune_ft.core.errors import RunError

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

    def best(self, metric: str) -> float | None:
        """The lowest value of `metric` on the curve; None without one."""
        values = [row[metric] for row in self.curve if metric in row]
        return min(values) if values else None

    @property
    def steps(self) -> int:
        """Optimizer steps that were made."""
        return int(self.curve[-1]["global_step"]) if self.curve else 0

    @property
    def tokens(self) -> float:
        """Tokens that it was trained on."""
        return self.curve[-1].get("tokens", 0.0) if self.curve else 0.0

    def label(self) -> str:
        """The settings in a few words."""
        return ", ".join(
            f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in self.settings.items()
        )


@dataclass(frozen=True)
class SweepResult:
    """All trials of a sweep, and which is best by `metric` (lower is better)."""

    metric: str
    trials: tuple[Trial, ...]

    @property
    def best(self) -> Trial:
        """The trial with the lowest metric.

        Raises:
            RunError: if no trial reported it, with every trial's reason.
        """
        feasible = [trial for trial in self.trials if trial.ending != "infeasible"]
        scored = [(value, trial.name, trial) for trial in feasible if (value := trial.best(self.metric)) is not None]
        if not scored:
            reasons = "; ".join(f"{trial.label()}: {trial.error or 'reported nothing'}" for trial in self.trials)
            raise RunError(f"no trial reported {self.metric}: {reasons}")
        return min(scored, key=lambda item: item[:2])[2]

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready mapping; `from_json` reads it."""
        best = self.best
        return {
            "schema_version": 1,
            "metric": self.metric,
            "best": {"name": best.name, "settings": best.settings, self.metric: best.best(self.metric)},
            "trials": [{**asdict(trial), "snapshot": None} for trial in self.trials],
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> SweepResult:
        """The result that `to_json` wrote."""
        return cls(content["metric"], tuple(Trial(**trial) for trial in content["trials"]))

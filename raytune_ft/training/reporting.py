"""What a search hears of a training run: its evaluations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from raytune_ft.training.config import FineTuningConfig
from raytune_ft.training.loop import Decision, Metrics


class EvaluationReport:
    """Tells of every evaluation, with the step and the tokens so far.

    Of the last step it tells when the model is written: a search that hears of it may end this process at once.
    """

    def __init__(self, config: FineTuningConfig, tell: Callable[[dict[str, Any]], None]) -> None:
        self._config, self._tell = config, tell
        self.step = 0
        self._last: dict[str, Any] | None = None

    def __call__(self, step: int, metrics: Metrics) -> Decision:
        """Hears of a step."""
        self.step = step
        if any(name.startswith("eval_") for name in metrics) or self._config.eval_strategy == "no":
            row = {"global_step": step, **metrics, "tokens": metrics["tokens_so_far"]}
            if step == metrics["last_step"]:
                self._last = row
            else:
                self._tell(row)
        return Decision.CONTINUE

    def model_is_written(self) -> None:
        """Tells of the last step."""
        if self._last is not None:
            self._tell(self._last)

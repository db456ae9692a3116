"""What happens at which step: the learning rate, and when to evaluate, save and log. Pure functions of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from raytune_ft.core.errors import ConfigError
from raytune_ft.training.config import FineTuningConfig

_OF_EVALUATIONS = ("early_stopping_patience", "metric_for_best_model", "eval_generation_rows")


def learning_rate_at(step: int, total: int, *, peak: float, warmup: int, kind: str) -> float:
    """The learning rate of optimizer step `step` (from 1), as transformers' schedulers give it.

    Args:
        step: number of the step that is about to be made.
        total: number of steps of the run.
        peak: the highest rate.
        warmup: steps over which the rate rises from 0.
        kind: ``linear``, ``cosine`` or ``constant`` (with warmup).
    """
    done = step - 1
    if done < warmup:
        return peak * done / max(1, warmup)
    if kind == "constant":
        return peak
    progress = (done - warmup) / max(1, total - warmup)
    if kind == "cosine":
        return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * max(0.0, 1.0 - progress)


@dataclass(frozen=True)
class Timetable:
    """The steps of a run, and at which of them something is due."""

    total: int
    steps_per_epoch: int
    warmup: int
    eval_every: int | None
    save_every: int | None
    log_every: int | None

    @classmethod
    def of(cls, config: FineTuningConfig, rows: int, *, has_validation: bool) -> Timetable:
        """The timetable of `config` over `rows` training rows; the last batch of an epoch may be smaller."""
        per_epoch = math.ceil(rows / config.global_batch_size)
        total = config.max_steps or math.ceil(per_epoch * config.num_train_epochs)
        warmup = config.warmup_steps if config.warmup_steps is not None else math.ceil(total * config.warmup_ratio)
        return cls(
            total=total,
            steps_per_epoch=per_epoch,
            warmup=warmup,
            eval_every=_every(config.eval_strategy, config.eval_steps, per_epoch) if has_validation else None,
            save_every=_every(config.save_strategy, config.save_steps, per_epoch),
            log_every=_every(config.logging_strategy, config.logging_steps, per_epoch),
        )

    def evaluates(self, step: int) -> bool:
        """Whether the validation split is evaluated after `step`; the last step always is."""
        return self.eval_every is not None and (step % self.eval_every == 0 or step == self.total)

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is written after `step`."""
        return self.save_every is not None and step % self.save_every == 0

    def logs(self, step: int) -> bool:
        """Whether a progress line is due after `step`."""
        return self.log_every is not None and (step % self.log_every == 0 or step in {1, self.total})


def refuse_without_validation(config: FineTuningConfig) -> None:
    """Refuses settings that ask for evaluations where there is no validation split.

    Raises:
        ConfigError: naming them.
    """
    asked = [name for name in _OF_EVALUATIONS if getattr(config, name) and config.differs(name)]
    if asked:
        raise ConfigError(
            f"{', '.join(asked)}: {config.dataset_path} has no validation split to evaluate on; add one (`raytune-ft "
            "prepare`, validation_split), or leave them out"
        )


def _every(strategy: str, steps: int, per_epoch: int) -> int | None:
    return {"no": None, "epoch": per_epoch, "steps": steps}[strategy]

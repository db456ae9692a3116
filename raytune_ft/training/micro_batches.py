"""Smaller micro-batches after a step that ran out of memory: the same rows, the same global batch, the same losses."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import nn

from raytune_ft.core.errors import InfeasibleError, RunError, first_line
from raytune_ft.models.collate import PackedBatch
from raytune_ft.models.memory import is_out_of_memory, release_memory
from raytune_ft.training.config import FineTuningConfig
from raytune_ft.training.loop import Learner, Metrics

logger = logging.getLogger("raytune_ft")

Result = TypeVar("Result")
DIVISOR = "micro_batch_divisor"
_SCALES = 16
"""Halvings from DeepSpeed's first loss scale, 2^16, to 1."""


_HOPELESS = (
    "Not even one row at a time fits: lower max_length, take method=qlora, a smaller model, or gradient_checkpointing"
)


class OutOfMemoryError(RunError):
    """A step needed more memory than there is."""


class NotOneRowError(OutOfMemoryError, InfeasibleError):
    """Memory does not hold a single row."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"{where}: {reason}. {_HOPELESS}")
        self._given = where, reason

    def __reduce__(self) -> tuple[type[NotOneRowError], tuple[str, str]]:
        return type(self), self._given


class GradientsOutOfMemoryError(OutOfMemoryError):
    """Memory ran out before the optimizer moved: the step can be made again."""


@contextmanager
def before_the_optimizer() -> Iterator[None]:
    """Around forward and backward passes: what runs out of memory here has changed no weight.

    Raises:
        GradientsOutOfMemoryError: in place of the allocator's error, whose frames would keep the activations.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        message = first_line(error)
    else:
        return
    raise GradientsOutOfMemoryError(message)


def divided(batch: Sequence[PackedBatch], divisor: int) -> list[PackedBatch]:
    """The rows of each micro-batch in `divisor` parts as equal as can be, or one row each where there are fewer."""
    return [part for micro in batch for part in _parts(micro, divisor)]


def _parts(batch: PackedBatch, count: int) -> Iterator[PackedBatch]:
    count = min(count, batch.units)
    bounds = [batch.units * number // count for number in range(count + 1)]
    for first, last in pairwise(bounds):
        yield batch.part(first, last)


@dataclass
class ShrinkingLearner:
    """A learner that makes a step again with micro-batches of half the rows when memory runs out.

    Only for a learner alone in its process: ranks that share gradients cannot take a step back one by one.
    """

    learner: Learner
    base: int = 1
    """By how much the batches that it gets are divided before."""
    divisor: int = 1

    def step(self, batch: Sequence[PackedBatch], step: int) -> Metrics:
        """Makes an optimizer step, in as small parts as memory wants.

        Raises:
            NotOneRowError: if not even one row fits.
        """
        while True:
            parts = divided(batch, self.divisor)
            try:
                return {**self.learner.step(parts, step), DIVISOR: self.base * self.divisor}
            except GradientsOutOfMemoryError as error:
                reason = str(error)
            if max(part.units for part in parts) == 1:
                raise NotOneRowError(f"step {step}", reason)
            self.divisor *= 2
            release_memory()
            logger.warning("step %d: out of memory; made again with micro-batches of half the rows", step)

    def evaluate(self) -> Metrics:
        """The learner's own evaluation."""
        return self.learner.evaluate()


@dataclass
class SkippingLearner:
    """A learner in fp16: DeepSpeed leaves out a step whose gradients overflow, and scales the next loss by half.

    So it finds its scale; a norm that is no number is then no divergence, unless it stays so at every scale.
    """

    learner: Learner
    skipped: int = 0
    """Steps that were left out, one after the other."""

    def step(self, batch: Any, step: int) -> Metrics:
        """Makes an optimizer step; of one that was left out, `skipped_steps` takes the place of the norm."""
        metrics = self.learner.step(batch, step)
        if math.isfinite(metrics["grad_norm"]):
            self.skipped = 0
            return metrics
        self.skipped += 1
        if self.skipped > _SCALES or not math.isfinite(metrics["loss"]):
            return metrics
        logger.warning("step %d: left out, since its gradients overflow fp16; the next loss is scaled by less", step)
        return {**{name: value for name, value in metrics.items() if name != "grad_norm"}, "skipped_steps": 1.0}

    def evaluate(self) -> Metrics:
        """The learner's own evaluation."""
        return self.learner.evaluate()


@dataclass
class Held:
    """How many rows of a batch memory holds at a time, where no gradient is computed; starts with all of them."""

    divisor: int = 1

    def computed(
        self, result_of: Callable[[PackedBatch], Result], batch: PackedBatch, *, may_split: bool = True
    ) -> list[Result]:
        """The results of a batch's parts, as small as memory wants; smaller parts stay for the batches that follow.

        Raises:
            NotOneRowError: if not even one row fits.
        """
        while True:
            parts = divided([batch], self.divisor)
            try:
                return list(map(result_of, parts))
            except Exception as error:
                if not may_split or not is_out_of_memory(error):
                    raise
                reason = first_line(error)
            if max(part.units for part in parts) == 1:
                raise NotOneRowError("evaluation", reason)
            self.divisor *= 2
            release_memory()
            logger.warning("evaluation: out of memory; goes on with batches of half the rows")


def computed_without_gradient(
    module: nn.Module,
    result_of: Callable[[PackedBatch], Result],
    batches: Iterable[PackedBatch],
    *,
    may_split: bool,
) -> Iterator[tuple[PackedBatch, list[Result]]]:
    """Each batch with the results of its parts, as small as memory wants; in eval mode, and afterwards in train mode.

    Args:
        module: what is put into these modes.
        result_of: computes a batch, or a part of one.
        batches: any number of them.
        may_split: whether a batch that memory does not hold is computed in parts.

    Raises:
        NotOneRowError: if not even one row fits.
    """
    held = Held()
    module.eval()
    for batch in batches:
        with torch.no_grad():  # not around the yield, which would hand it to whoever asks
            parts = held.computed(result_of, batch, may_split=may_split)
        yield batch, parts
    module.train()


def shrunk(config: FineTuningConfig, divisor: int) -> FineTuningConfig:
    """The settings with micro-batches of at most a `divisor`-th of the rows, and as many more of them as that takes.

    Rows that cannot be divided evenly leave smaller ones: what a step learns from is still `config`'s global batch.
    The copy is not checked again: a DeepSpeed JSON of the user's was held against what the user wrote.
    """
    whole = config.per_device_train_batch_size
    rows = -(-whole // divisor)
    changes: dict[str, Any] = {
        "per_device_train_batch_size": rows,
        "per_device_eval_batch_size": -(-config.per_device_eval_batch_size // divisor),
        "gradient_accumulation_steps": config.gradient_accumulation_steps * -(-whole // rows),
    }
    return config if divisor == 1 else config.model_copy(update=changes)

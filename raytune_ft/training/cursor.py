"""Where a run stands in its data: the order of rows follows from these numbers alone, not from the workers' number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from raytune_ft.core.errors import ArtifactError
from raytune_ft.core.grammar import number_of
from raytune_ft.training.config import FineTuningConfig


@dataclass(frozen=True)
class Cursor:
    """What decides the order of the data (`batches.step_rows`): the step says where in it a run stands."""

    seed: int
    global_batch_size: int
    rows: int

    def at(self, step: int) -> dict[str, int]:
        """The place after a step, as a checkpoint keeps it: `epoch` from 0, and rows of it that were seen."""
        per_epoch = -(-self.rows // self.global_batch_size)
        epoch, place = divmod(step, per_epoch)
        return {**asdict(self), "epoch": epoch, "row": place * self.global_batch_size}

    def refuse_other(self, there: Mapping[str, Any], what: str, config: FineTuningConfig) -> None:
        """Refuses to go on in another order.

        Raises:
            ArtifactError: with what differs, and what would go.
        """
        if there["global_batch_size"] != self.global_batch_size:
            raise ArtifactError(other_batch(there["global_batch_size"], what, config))
        for name, mine in (("seed", self.seed), ("rows", self.rows)):
            if there[name] != mine:
                raise ArtifactError(
                    f"{what} has another order of the data: {name} is {there[name]} there and {mine} here. Go on with "
                    "the same seed and training split, or start a run of its own in another output_dir"
                )


def other_batch(wanted: int, what: str, config: FineTuningConfig) -> str:
    """Why a run of another global batch does not go on, and which layouts of the old one would."""
    rows, parts, workers = config.per_device_train_batch_size, config.gradient_accumulation_steps, config.num_workers
    choices = " or ".join(
        f"num_workers: {w}, per_device_train_batch_size: {r}, gradient_accumulation_steps: {a}"
        for w, r, a in layouts(wanted, workers, rows)
    )
    return (
        f"{what} has a global batch of {number_of(wanted, 'row')}, and these settings make {config.global_batch_size} "
        f"({rows} per_device_train_batch_size x {parts} gradient_accumulation_steps x {workers} num_workers): the "
        f"data would come in another order. What goes: {choices}"
    )


def layouts(batch: int, workers: int, most_rows: int) -> list[tuple[int, int, int]]:
    """Layouts (workers, rows, accumulation) of a global batch: with as many workers if they divide it, else with the
    nearest numbers of workers that do; the rows at a time are as many as divide their share, up to `most_rows`."""
    fitting = [number for number in range(1, batch + 1) if batch % number == 0]
    below = max(number for number in fitting if number <= workers)
    above = [number for number in fitting if number > workers][:1]
    chosen = [below] if below == workers else [below, *above]
    found = []
    for number in chosen:
        mine = batch // number
        rows = max(size for size in range(1, min(mine, most_rows) + 1) if mine % size == 0)
        found.append((number, rows, mine // rows))
    return found

"""One process's part of a training run: builds the learner, runs the loop, keeps the curves, writes the model.

Knows nothing of Ray: where it stands among the other processes is given, so a run of one process is the same code.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from raytune_ft.core.storage import Location
from raytune_ft.data.tokenize import template_beside
from raytune_ft.models.adapters import save_adapter
from raytune_ft.models.chat import Chat
from raytune_ft.training import checkpoint
from raytune_ft.training.batches import TokenRows, evaluation_batches, packed_steps
from raytune_ft.training.config import FineTuningConfig
from raytune_ft.training.engine import LocalLearner, Trainee, ZeroLearner, make_trainee
from raytune_ft.training.loop import Decision, Metrics, TrainingSummary, fit
from raytune_ft.training.schedule import Timetable
from raytune_ft.training.stopping import Patience

logger = logging.getLogger("raytune_ft")

CHECKPOINTS = "checkpoints"
HISTORY = "history.jsonl"


@dataclass(frozen=True)
class Seat:
    """Where this process stands: its rank among `world_size`, its device, and whether DeepSpeed joins the ranks."""

    rank: int = 0
    world_size: int = 1
    device: str = "cpu"
    deepspeed: bool = False


@dataclass
class History:
    """The metrics of every step; survives restarts inside checkpoints."""

    rows: list[dict[str, float]] = field(default_factory=list)

    def add(self, step: int, metrics: Metrics) -> dict[str, float]:
        """Keeps the metrics of a step with tokens per second."""
        row = {"step": step, **metrics, "tokens_per_s": metrics["tokens"] / max(metrics["step_s"], 1e-9)}
        self.rows.append(row)
        return row


def train_in_process(
    config: FineTuningConfig,
    splits: dict[str, list[str]],
    seat: Seat,
    *,
    output: Location | None,
    report: Callable[[int, Metrics], Decision] = lambda step, metrics: Decision.CONTINUE,
) -> TrainingSummary:
    """Trains, and leaves the best weights under `output` (rank 0).

    Args:
        config: the run's settings; its `model_path` must be reachable from here.
        splits: Parquet files of the tokenized ``train`` and ``validation`` splits.
        seat: this process's place.
        output: where checkpoints, curves and the model go; None writes nothing.
        report: told every step's metrics.
    """
    with tempfile.TemporaryDirectory() as cache:
        train = TokenRows(splits["train"], cache)
        validation = TokenRows(splits["validation"], cache) if splits.get("validation") else None
        timetable = Timetable.of(config, len(train), has_validation=validation is not None)
        trainee = make_trainee(config, seat.device)
        # The tokenizer is saved with the model: it takes the template that the rows were rendered with.
        Chat(trainee.tokenizer, template_beside(Location.at(splits["train"][0]).parent.parent))
        learner = _learner(trainee, config, timetable, seat, validation)
        run = _Run(config, timetable, learner, seat, output)
        run.resume()
        batches = packed_steps(
            train,
            config.global_batch_size,
            config.seed,
            start=run.start,
            rank=seat.rank,
            world_size=seat.world_size,
            micro_batches=config.gradient_accumulation_steps,
        )
        summary = fit(
            learner,
            batches,
            timetable,
            start=run.start,
            stopping=run.patience,
            on_best=run.keep_best,
            on_save=run.save,
            report=lambda step, metrics: run.note(step, metrics, report),
        )
        run.finish(summary)
    return summary


def _learner(
    trainee: Trainee, config: FineTuningConfig, timetable: Timetable, seat: Seat, validation: TokenRows | None
) -> LocalLearner | ZeroLearner:
    kind = ZeroLearner if seat.deepspeed else LocalLearner

    def evaluation() -> Any:
        if validation is None:
            return iter(())
        return evaluation_batches(validation, config.per_device_eval_batch_size, seat.rank, seat.world_size)

    return kind(trainee, config, timetable, seat.device, evaluation)


class _Run:
    """What is kept of a run while it goes: history, best weights, checkpoints."""

    def __init__(
        self,
        config: FineTuningConfig,
        timetable: Timetable,
        learner: LocalLearner | ZeroLearner,
        seat: Seat,
        output: Location | None,
    ) -> None:
        self.config, self.timetable, self.learner, self.seat, self.output = config, timetable, learner, seat, output
        self.patience = Patience(config.early_stopping_patience)
        self.history = History()
        self.best: checkpoint.State | None = None
        self.start = 0

    @property
    def _leads(self) -> bool:
        return self.seat.rank == 0 and self.output is not None

    def resume(self) -> None:
        """Goes on from the newest whole checkpoint, if there is one."""
        found = checkpoint.newest(self.output / CHECKPOINTS) if self.output is not None else None
        if found is None:
            if self.seat.rank == 0 and self.output is not None:
                logger.info("training starts: %d steps", self.timetable.total)
            return
        checkpoint.restore(self.learner, found)
        self.start = found.step
        self.patience = Patience(self.config.early_stopping_patience, **found.progress["patience"])
        self.history = History(found.progress["history"])
        best = {name.removeprefix("best."): t for name, t in found.moments.items() if name.startswith("best.")}
        self.best = best or None
        if self.seat.rank == 0:
            logger.info("training resumes after step %d of %d", self.start, self.timetable.total)

    def keep_best(self, step: int) -> None:
        """Keeps the weights of the best evaluation so far (rank 0's memory, and every checkpoint)."""
        if self._leads:
            self.best = checkpoint.trainable_state(self.learner.trainee)

    def save(self, step: int) -> None:
        """Writes a checkpoint; every rank takes part, rank 0 writes."""
        if self.output is None:
            return
        patience = {"best": self.patience.best, "best_step": self.patience.best_step, "waited": self.patience.waited}
        taken = checkpoint.take(self.learner, step, {"patience": patience, "history": self.history.rows})
        if self._leads:
            for name, tensor in (self.best or {}).items():
                taken.moments[f"best.{name}"] = tensor
            checkpoint.write(self.output / CHECKPOINTS, taken, keep=self.config.save_total_limit)

    def note(self, step: int, metrics: Metrics, report: Callable[[int, Metrics], Decision]) -> Decision:
        """Takes in a step's metrics, says them when a line is due, and passes them on."""
        row = self.history.add(step, metrics)
        if self._leads and (self.timetable.logs(step) or "eval_loss" in metrics):
            logger.info("%s", progress_line(row, self.timetable.total))
        return report(step, metrics)

    def finish(self, summary: TrainingSummary) -> None:
        """Writes the model with the best weights (the last ones, if nothing was evaluated) and the curves."""
        if not self._leads or self.output is None:
            return
        trainee = self.learner.trainee
        if self.best is not None:
            trainee.load(self.best)
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            if self.config.uses_adapter:
                save_adapter(trainee.model, trainee.tokenizer, folder)
            else:
                trainee.model.save_pretrained(folder)
                trainee.tokenizer.save_pretrained(folder)
            lines = [json.dumps(row) for row in self.history.rows]
            (folder / HISTORY).write_text("\n".join(lines) + "\n", encoding="utf-8")
            (folder / "summary.json").write_text(json.dumps(asdict(summary), indent=2), encoding="utf-8")
            self.output.upload(folder)
        logger.info("training ends at step %d: %s", summary.steps, summary.reason)


def progress_line(row: dict[str, float], total: int) -> str:
    """A step's metrics in words."""
    parts = [f"step {row['step']:.0f}/{total}", f"loss {row['loss']:.4f}"]
    if "eval_loss" in row:
        parts.append(f"validation loss {row['eval_loss']:.4f}")
    parts += [
        f"lr {row['learning_rate']:.2e}",
        f"grad norm {row['grad_norm']:.2f}",
        f"{row['tokens_per_s']:.0f} tokens/s",
    ]
    return ", ".join(parts)

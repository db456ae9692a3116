"""What is kept of a run while it goes and at its end: history, best weights, checkpoints, and the finished folder."""

from __future__ import annotations

import json
import logging
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from raytune_ft.core.errors import ArtifactError
from raytune_ft.core.manifest import MANIFEST
from raytune_ft.core.storage import Location
from raytune_ft.models.adapters import save_adapter
from raytune_ft.training import checkpoint
from raytune_ft.training.config import FineTuningConfig
from raytune_ft.training.curves import draw_curves
from raytune_ft.training.engine import LocalLearner, ZeroLearner
from raytune_ft.training.loop import Metrics, TrainingSummary
from raytune_ft.training.monitor import Monitor
from raytune_ft.training.stopping import Patience

logger = logging.getLogger("raytune_ft")

CHECKPOINTS = "checkpoints"
HISTORY, SUMMARY, DIAGNOSIS, CURVES = "history.jsonl", "summary.json", "diagnosis.json", "curves.svg"
TENSORBOARD = "tensorboard"


@dataclass
class History:
    """The metrics of every step; survives restarts inside checkpoints."""

    rows: list[dict[str, float]] = field(default_factory=list)

    def add(self, step: int, metrics: Metrics) -> dict[str, float]:
        """Keeps the metrics of a step with tokens per second."""
        row = {"step": step, **metrics, "tokens_per_s": metrics["tokens"] / max(metrics["step_s"], 1e-9)}
        self.rows.append(row)
        return row


def starting_checkpoint(config: FineTuningConfig, output: Location | None) -> checkpoint.Checkpoint | None:
    """Where a run goes on: its own newest whole checkpoint, else the one that `resume_from_checkpoint` names.

    Raises:
        ArtifactError: if the named folder is no whole checkpoint, with what is wrong.
    """
    own = checkpoint.newest(output / CHECKPOINTS) if output is not None else None
    if own is not None or config.resume_from_checkpoint == "auto":
        return own
    return named_checkpoint(config.resume_from_checkpoint)


def named_checkpoint(path: str) -> checkpoint.Checkpoint:
    """The whole checkpoint in a folder.

    Raises:
        ArtifactError: if it is none, with what is wrong.
    """
    where = Location.at(path)
    wanted = "resume_from_checkpoint wants auto, or the folder of a checkpoint (.../checkpoints/step-00000010)"
    if not where.exists():
        raise ArtifactError(f"{where}: there is no such folder; {wanted}")
    if not (where / MANIFEST).exists():
        inside = [name for name in where.folders() if name.startswith("step-")]
        hint = f"it holds checkpoints, name one of them: {', '.join(inside[-3:])}" if inside else wanted
        raise ArtifactError(f"{where}: is no finished checkpoint (it has no {MANIFEST}); {hint}")
    try:
        return checkpoint.read(where)
    except (ArtifactError, ValueError, KeyError, OSError) as error:
        raise ArtifactError(f"{where}: is not a whole checkpoint: {error}; {wanted}") from None


class Keeper:
    """A run's memory; `output` None keeps nothing on storage, and only `leads` (rank 0) writes there."""

    def __init__(
        self, config: FineTuningConfig, learner: LocalLearner | ZeroLearner, output: Location | None, *, leads: bool
    ) -> None:
        self.config, self.learner, self.output = config, learner, output
        self.leads = leads and output is not None
        self.patience = Patience(config.early_stopping_patience)
        self.history = History()
        self.best: checkpoint.State | None = None
        self.start = 0

    def resume(self, total: int) -> None:
        """Goes on from a checkpoint, if there is one, and says which.

        Raises:
            ArtifactError: if it belongs to a model of other trainable weights.
        """
        found = starting_checkpoint(self.config, self.output)
        if found is None:
            if self.leads:
                logger.info("training starts: %d steps", total)
            return
        self._refuse_other_weights(found)
        checkpoint.restore(self.learner, found)
        self.start = found.step
        self.patience = Patience(self.config.early_stopping_patience, **found.progress["patience"])
        self.history = History(found.progress["history"])
        best = {name.removeprefix("best."): t for name, t in found.moments.items() if name.startswith("best.")}
        self.best = best or None
        if self.leads:
            logger.info("training resumes after step %d of %d", self.start, total)

    def _refuse_other_weights(self, found: checkpoint.Checkpoint) -> None:
        mine = {name: tuple(p.shape) for name, p in self.learner.trainee.trainable().items()}
        there = {name: tuple(tensor.shape) for name, tensor in found.weights.items()}
        odd = sorted(name for name in mine.keys() | there.keys() if mine.get(name) != there.get(name))
        if odd:
            raise ArtifactError(
                f"the checkpoint of step {found.step} is of another model or method: {odd[0]} is {there.get(odd[0])} "
                f"there and {mine.get(odd[0])} here ({len(odd)} differ). Choose a checkpoint of the same settings"
            )

    def keep_best(self, step: int) -> None:
        """Keeps the weights of the best evaluation so far (rank 0's memory, and every checkpoint)."""
        if self.leads:
            self.best = checkpoint.trainable_state(self.learner.trainee)

    def save(self, step: int) -> None:
        """Writes a checkpoint; every rank takes part, rank 0 writes."""
        if self.output is None:
            return
        patience = {"best": self.patience.best, "best_step": self.patience.best_step, "waited": self.patience.waited}
        taken = checkpoint.take(self.learner, step, {"patience": patience, "history": self.history.rows})
        if self.leads:
            for name, tensor in (self.best or {}).items():
                taken.moments[f"best.{name}"] = tensor
            checkpoint.write(self.output / CHECKPOINTS, taken, keep=self.config.save_total_limit)

    def last_good(self) -> str:
        """The newest whole checkpoint in words."""
        found = checkpoint.newest(self.output / CHECKPOINTS) if self.output is not None else None
        if found is None:
            return "There is no checkpoint"
        return f"The last good checkpoint is {self.output}/{CHECKPOINTS}/step-{found.step:08d}"

    def finish(self, summary: TrainingSummary, monitor: Monitor | None, events: Path | None) -> None:
        """Writes the model with the best weights (the last ones, if nothing was evaluated), curves and diagnosis."""
        if not self.leads or self.output is None or monitor is None:
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
            rows = self.history.rows
            _write(folder / HISTORY, "\n".join(json.dumps(row) for row in rows))
            _write(folder / CURVES, draw_curves(rows, [(f.step, f.kind.value) for f in monitor.findings]))
            _write(folder / DIAGNOSIS, json.dumps(monitor.report(), indent=2))
            _write(folder / SUMMARY, json.dumps(asdict(summary), indent=2))
            self.output.upload(folder)
        if events is not None and events.is_dir() and not self.output.is_local:
            (self.output / TENSORBOARD).upload(events)
        logger.info("training ends at step %d: %s", summary.steps, summary.reason)


def _write(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8")


def read_report(output: Location) -> dict[str, Any]:
    """The diagnosis in a finished folder."""
    report: dict[str, Any] = json.loads((output / DIAGNOSIS).read())
    return report

"""What is kept of a run while it goes and at its end: history, best weights, checkpoints, and the finished folder."""

from __future__ import annotations

import json
import logging
import secrets
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor

from raytune_ft.core.errors import ArtifactError
from raytune_ft.core.grammar import number_of
from raytune_ft.core.storage import Location
from raytune_ft.models.adapters import save_adapter
from raytune_ft.models.golden import Golden, write_golden
from raytune_ft.models.references import resolve_model
from raytune_ft.models.sparsity import carry_mark
from raytune_ft.training import checkpoint
from raytune_ft.training.checkpoint import StoredCheckpoint
from raytune_ft.training.config import FineTuningConfig
from raytune_ft.training.cursor import Cursor
from raytune_ft.training.curves import draw_curves
from raytune_ft.training.engine import LocalLearner, ZeroLearner
from raytune_ft.training.folder import CHECKPOINTS, CURVES, DIAGNOSIS, HISTORY, SUMMARY, TENSORBOARD
from raytune_ft.training.learner_state import LearnerState, random_state, set_random_state
from raytune_ft.training.loop import Metrics, TrainingSummary
from raytune_ft.training.monitor import Monitor
from raytune_ft.training.peers import Peers
from raytune_ft.training.stopping import Patience
from raytune_ft.training.writer import CheckpointWriter, Save

logger = logging.getLogger("raytune_ft")


@dataclass
class History:
    """The metrics of every step; survives restarts inside checkpoints."""

    rows: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokens = sum(row["tokens"] for row in self.rows)

    @property
    def last(self) -> Metrics:
        """The metrics of the last step; empty before the first."""
        return {name: value for name, value in self.rows[-1].items() if name != "step"} if self.rows else {}

    def add(self, step: int, metrics: Metrics) -> dict[str, float]:
        """Keeps the metrics of a step with tokens per second."""
        row = {"step": step, **metrics, "tokens_per_s": metrics["tokens"] / max(metrics["step_s"], 1e-9)}
        self.rows.append(row)
        self.tokens += metrics["tokens"]
        return row


class Keeper:
    """A run's memory; `output` None keeps nothing on storage. Every rank has one, and all make the same calls."""

    def __init__(
        self,
        config: FineTuningConfig,
        learner: LocalLearner | ZeroLearner,
        output: Location | None,
        peers: Peers,
        *,
        of_trial: bool = False,
    ) -> None:
        self.config, self.learner, self.output, self.peers = config, learner, output, peers
        self.leads = peers.leads and output is not None
        self.patience = Patience(config.early_stopping_patience, config.goal)
        self.history = History()
        self.start = 0
        self._state = LearnerState(learner)
        self._best: dict[str, Tensor] | None = None
        self._cursor: Cursor | None = None
        self._writer: CheckpointWriter | None = None
        if output is not None:
            attempt = peers.leader_says(secrets.randbits(62))
            keep = config.save_total_limit
            self._writer = CheckpointWriter(output / CHECKPOINTS, peers, keep=keep, attempt=attempt, of_trial=of_trial)

    def resume(self, total: int, cursor: Cursor) -> None:
        """Goes on from a checkpoint, if there is one, and says which; the best so far is only taken over from its own.

        Args:
            total: steps of the run.
            cursor: what the order of the data follows from.

        Raises:
            ArtifactError: if it belongs to a model of other trainable weights, to another order of the data, or to a
                step that this run does not reach.
        """
        self._cursor = cursor
        found = self._starting_checkpoint()
        if found is None:
            if self.leads:
                logger.info("training starts: %s", number_of(total, "step"))
            return
        self._refuse_other_weights(found)
        cursor.refuse_other(found.progress["cursor"], f"the checkpoint of step {found.step}", self.config)
        if found.step > total or (found.step == total and not self._is_own(found)):
            raise ArtifactError(
                f"{found.target}: is of step {found.step}, and this run ends at step {total}; raise max_steps or "
                "num_train_epochs, or start from an earlier checkpoint"
            )
        self._state.restore(found)
        set_random_state(found, self.peers)
        self.start = found.step
        if self._is_own(found):  # another run's best may be by another metric, or on other rows
            self._best = self._state.best_in(found)
            patience = self.config.early_stopping_patience
            self.patience = Patience(patience, self.config.goal, **found.progress["patience"])
        self.history = History(found.progress["history"])
        if self.leads:
            then = found.progress["world_size"]
            other = f", which {number_of(then, 'worker')} wrote," if then != self.peers.world_size else ""
            logger.info("training resumes after step %d of %d from %s%s", self.start, total, found.target, other)

    def _starting_checkpoint(self) -> StoredCheckpoint | None:
        """The run's own newest whole checkpoint, else the one that `resume_from_checkpoint` names."""
        own = checkpoint.newest(self.output / CHECKPOINTS, self.peers) if self.output is not None else None
        if own is not None and self._writer is not None:
            self._writer.trust(own.step)
        if own is not None or self.config.resume_from_checkpoint == "auto":
            return own
        return checkpoint.named(self.config.resume_from_checkpoint, self.peers)

    def _is_own(self, found: StoredCheckpoint) -> bool:
        return self.output is not None and found.target == checkpoint.folder_of(self.output / CHECKPOINTS, found.step)

    def _refuse_other_weights(self, found: StoredCheckpoint) -> None:
        mine, there = self._state.shapes, found.shapes(checkpoint.WEIGHTS)
        odd = sorted(name for name in mine.keys() | there.keys() if mine.get(name) != there.get(name))
        if odd:
            raise ArtifactError(
                f"the checkpoint of step {found.step} is of another model or method: {odd[0]} is {there.get(odd[0])} "
                f"there and {mine.get(odd[0])} here ({len(odd)} differ). Choose a checkpoint of the same settings"
            )

    def keep_best(self, step: int) -> None:
        """Keeps the weights of the best evaluation so far: each rank its own, in memory and in every checkpoint."""
        if self.output is not None:
            self._best = self._state.weights_here()

    def save(self, step: int) -> None:
        """Copies the state of the run, and begins to write it; waits for the save before."""
        if self._writer is None or self._cursor is None:
            return
        self._writer.settle()
        slices = self._state.snapshot(self.peers) | random_state(self.peers)
        if self._best is not None:
            slices |= self._state.best_slices(self._best, self.peers)
        progress = {
            "cursor": self._cursor.at(step),
            "world_size": self.peers.world_size,
            "patience": self.patience.remembered(),
            "history": list(self.history.rows),
            **self._state.scalars(),
        }
        self._writer.start(Save(step, slices, progress, self.patience.best_step or None))

    def settle(self) -> None:
        """Waits until what is being saved is whole."""
        if self._writer is not None:
            self._writer.settle()

    def abandon(self) -> None:
        """As `settle`, where other ranks may be gone."""
        if self._writer is not None:
            self._writer.abandon()

    def saved_words(self) -> str:
        """What became of the last save, in words."""
        if self._writer is None:
            return "nothing was to be saved"
        return "saved" if self._writer.refused_step is None else f"but not saved. {self.last_good()}"

    def last_good(self, lost_at: int | None = None) -> str:
        """The newest whole checkpoint in words; all ranks ask.

        `lost_at`: a step whose loss or gradient norm was no number, which the weights after the step before gave.
        """
        if self.output is None:
            return "There is no checkpoint"
        folder = self.output / CHECKPOINTS
        newest = checkpoint.newest(folder, self.peers)
        if newest is None:
            return "There is no checkpoint"
        if lost_at is None or newest.step < lost_at - 1:
            return f"The last good checkpoint is {newest.target}"
        found = checkpoint.newest(folder, self.peers, before=lost_at - 1)
        good = "There is no good checkpoint" if found is None else f"The last good checkpoint is {found.target}"
        return f"{good} (the weights in {newest.target.name} are those that gave this)"

    def finish(
        self,
        summary: TrainingSummary,
        monitor: Monitor | None,
        events: Path | None,
        golden: Callable[[], Golden | None] | None = None,
    ) -> None:
        """Writes the model with the best weights (the last ones, if nothing was evaluated), curves and diagnosis.

        `golden` gives the answers that a server checks itself by; None where no rank holds the whole model.
        """
        if self._best is not None:
            self._state.set_weights(self._best)
        gathered = self.learner.gathered_state()
        if not self.leads or self.output is None or monitor is None:
            return
        trainee = self.learner.trainee
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            if self.config.uses_adapter:
                save_adapter(trainee.model, trainee.tokenizer, folder, state=gathered)
            else:
                trainee.model.save_pretrained(folder, state_dict=gathered)
                trainee.tokenizer.save_pretrained(folder)
                carry_mark(resolve_model(self.config.model_path).base, folder)
            found = golden() if golden is not None else None
            if found is not None:
                write_golden(found, folder)
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

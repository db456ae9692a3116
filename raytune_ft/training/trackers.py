"""Where a run's curves go besides its own history: TensorBoard event files, MLflow, Weights & Biases.

A configured tracker that cannot start fails the run before it trains; one that fails later is warned about once,
counted, and does not stop the run.
"""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from raytune_ft.core.digest import short_hash
from raytune_ft.core.errors import ArtifactError, ConfigError, MissingDependencyError, first_line
from raytune_ft.core.storage import Location
from raytune_ft.training.config import Tracking
from raytune_ft.training.event_file import EventFile

logger = logging.getLogger("raytune_ft")

Row = Mapping[str, float]
TRACKED = "trackers.txt"
_PACKAGES = {Tracking.TENSORBOARD: "tensorboardX", Tracking.MLFLOW: "mlflow", Tracking.WANDB: "wandb"}


class Tracker(Protocol):
    """Takes the metrics of each step."""

    def recall(self, rows: Sequence[Row]) -> None:
        """Takes the rows of a resumed run's history up to its checkpoint."""

    def log(self, row: Row) -> None:
        """Takes a row of the history; its ``step`` says where it belongs."""

    def close(self, status: str) -> None:
        """Ends the run there as ``finished``, ``stopped`` or ``failed``."""


def refuse_missing(names: Iterable[Tracking]) -> None:
    """Refuses trackers that are not installed, before anything starts.

    Raises:
        MissingDependencyError: with the command that installs it.
    """
    for name in names:
        if find_spec(_PACKAGES[name]) is None:
            raise MissingDependencyError(
                f"report_to: {name} is not installed: pip install {_PACKAGES[name]} (on every node), or leave it out"
            )


class Trackers:
    """All configured trackers of a run as one.

    `failures` counts by tracker how often each failed; runs that share one say the first failure of all only.
    """

    def __init__(
        self,
        running: dict[Tracking, Tracker],
        failures: dict[str, int] | None = None,
        key: str = "",
        kept: Location | None = None,
    ) -> None:
        self._running, self._key, self._kept = running, key, kept
        self.failures = {} if failures is None else failures
        for name in running:
            self.failures.setdefault(name, 0)

    @classmethod
    def start(
        cls,
        names: Sequence[Tracking],
        *,
        folder: Path,
        run: str,
        settings: Mapping[str, Any],
        failures: dict[str, int] | None = None,
        kept: Location | None = None,
    ) -> Trackers:
        """Starts the trackers.

        Args:
            names: which.
            folder: where event files are written.
            run: what the run is called; without `kept`, the same name goes on with the same run of MLflow and W&B.
            settings: the run's settings.
            failures: those of other runs, which this one's are added to.
            kept: the file that an earlier attempt left in which run of MLflow and W&B to go on with (`go_on_later`);
                where there is none, a new one begins.

        Raises:
            MissingDependencyError: if one is not installed.
            ConfigError: if one cannot start.
        """
        refuse_missing(names)
        key = short_hash(run)
        if kept is not None:
            key = kept.read().decode() if kept.exists() else secrets.token_hex(8)
        makers: dict[Tracking, Callable[[], Tracker]] = {
            Tracking.TENSORBOARD: lambda: TensorBoard(folder),
            Tracking.MLFLOW: lambda: MLflow(run, settings, key),
            Tracking.WANDB: lambda: WandB(run, settings, key),
        }
        running: dict[Tracking, Tracker] = {}
        for name in names:
            try:
                running[name] = makers[name]()
            except Exception as error:
                raise ConfigError(
                    f"report_to: {name} cannot start: {first_line(error)} Mend its settings, or leave it out; nothing "
                    "was trained"
                ) from error
        return cls(running, failures, key, kept)

    def go_on_later(self) -> None:
        """Notes, once there is a checkpoint to go on from, which run of MLflow and W&B goes on with it."""
        kept, self._kept = self._kept, None
        if kept is None or not {Tracking.MLFLOW, Tracking.WANDB} & self._running.keys():
            return
        try:
            kept.write(self._key.encode())
        except (OSError, ArtifactError) as error:
            logger.warning("%s cannot be written (%s): after a restart, trackers begin a new run", kept, error)

    def recall(self, rows: Sequence[Row]) -> None:
        """Passes a resumed run's history on to all."""
        for name, tracker in self._running.items():
            self._guarded(name, lambda tracker=tracker: tracker.recall(rows))  # type: ignore[misc]

    def log(self, row: Row) -> None:
        """Passes a row on to all."""
        for name, tracker in self._running.items():
            self._guarded(name, lambda tracker=tracker: tracker.log(row))  # type: ignore[misc]

    def close(self, status: str) -> None:
        """Ends all."""
        for name, tracker in self._running.items():
            self._guarded(name, lambda tracker=tracker: tracker.close(status))  # type: ignore[misc]

    def _guarded(self, name: Tracking, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - a tracker's failure must not end a run
            self.failures[name] += 1
            if self.failures[name] == 1:
                logger.warning("%s: failed (%s); training goes on, further failures are only counted", name, error)


class TensorBoard:
    """Event files, one tag a metric; those of an earlier attempt are written again from the history."""

    def __init__(self, folder: Path) -> None:
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        self._file = EventFile(folder)

    def recall(self, rows: Sequence[Row]) -> None:
        """Writes the steps before the restart."""
        for row in rows:
            self.log(row)

    def log(self, row: Row) -> None:
        """Adds each metric as a scalar."""
        self._file.add(_metrics(row), int(row["step"]))

    def close(self, status: str) -> None:
        """Closes the file."""
        self._file.close()


class MLflow:
    """A run of MLflow's, where its own variables say: MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME."""

    def __init__(self, run: str, settings: Mapping[str, Any], key: str) -> None:
        import mlflow

        self._client = mlflow.MlflowClient()
        self._experiment = mlflow.set_experiment(_experiment()).experiment_id
        tag = "raytune_ft.run"
        found = self._client.search_runs([self._experiment], f"tags.`{tag}` = '{key}'", max_results=1)
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, "RUNNING")
        else:
            made = self._client.create_run(self._experiment, tags={tag: key}, run_name=run.rpartition("/")[2])
            self._id = made.info.run_id
            for name, value in settings.items():
                self._client.log_param(self._id, name, str(value)[:500])

    def recall(self, rows: Sequence[Row]) -> None:
        """Nothing: the run there has them."""

    def log(self, row: Row) -> None:
        """Adds the metrics in one request."""
        import time

        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        step = int(row["step"])
        self._client.log_batch(self._id, metrics=[Metric(k, v, now, step) for k, v in _metrics(row).items()])

    def close(self, status: str) -> None:
        """Ends the run there."""
        self._client.set_terminated(self._id, {"finished": "FINISHED", "stopped": "KILLED"}.get(status, "FAILED"))


class WandB:
    """A run of Weights & Biases', where its own variables say: WANDB_PROJECT, WANDB_API_KEY, WANDB_MODE."""

    def __init__(self, run: str, settings: Mapping[str, Any], key: str) -> None:
        import os

        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "raytune_ft"),
            name=run.rpartition("/")[2],
            id=key,
            resume="allow",
            config=dict(settings),
            reinit="create_new",  # a sweep's run and those of its trials are open at the same time
        )

    def recall(self, rows: Sequence[Row]) -> None:
        """Nothing: the run there has them."""

    def log(self, row: Row) -> None:
        """Adds the metrics of a step."""
        self._run.log(_metrics(row), step=int(row["step"]))

    def close(self, status: str) -> None:
        """Ends the run there."""
        self._run.finish(exit_code=int(status == "failed"))


def _metrics(row: Row) -> dict[str, float]:
    return {key: float(value) for key, value in row.items() if key != "step" and math.isfinite(value)}


def _experiment() -> str:
    import os

    return os.environ.get("MLFLOW_EXPERIMENT_NAME", "raytune_ft")

"""Trials in the trackers that the training settings name: each is a run there, of its evaluations."""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raytune_ft.core.digest import short_hash
from raytune_ft.core.errors import ConfigError
from raytune_ft.core.storage import Location
from raytune_ft.training.config import Tracking
from raytune_ft.training.folder import TENSORBOARD
from raytune_ft.training.trackers import Trackers
from raytune_ft.tuning.space import settings_at

logger = logging.getLogger("raytune_ft")

_LONGEST = 120
"""Characters of a run's name, which is a folder's, too."""
_STATUS = {"failed": "failed", "infeasible": "failed", "stopped early": "stopped"}


@dataclass(frozen=True)
class Tracked:
    """Which trackers a sweep has, the folder of its artifact, and the training settings that all its trials share."""

    names: tuple[Tracking, ...]
    output: Location
    settings: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """Where event files are written: where they stay, if that is a local path, so that TensorBoard can follow."""
        if self.output.is_local:
            return Path((self.output / TENSORBOARD).path)
        key = short_hash(self.output.uri)
        return Path(tempfile.gettempdir()) / f"raytune-ft-events-{key}"

    def start(self, name: str, settings: Mapping[str, Any], failures: dict[str, int] | None = None) -> Trackers:
        """The trackers of a run below the sweep's; started again, they go on with it.

        `failures` of other runs are what this one's are added to.

        Raises:
            MissingDependencyError: if one is not installed.
            ConfigError: if one cannot start.
        """
        together = {**self.settings, **settings}
        folder, run = self.folder / name, f"{self.output}/{name}"
        return Trackers.start(self.names, folder=folder, run=run, settings=together, failures=failures)

    @contextmanager
    def sweep(self, settings: Mapping[str, Any]) -> Iterator[Trackers]:
        """A run for the sweep as a whole, started at once: a tracker that cannot start ends the sweep before it began.

        Raises:
            MissingDependencyError: if one is not installed.
            ConfigError: if one cannot start.
        """
        if not self.output.is_local:  # what an attempt left that was killed
            shutil.rmtree(self.folder, ignore_errors=True)
        trackers, status = self.start("sweep", settings), "failed"
        try:
            yield trackers
            status = "finished"
        finally:
            trackers.close(status)
            if not self.output.is_local and self.folder.is_dir():
                (self.output / TENSORBOARD).upload(self.folder)
                shutil.rmtree(self.folder)


@dataclass
class TrackedTrials:
    """The trackers of all trials that reported anything; what fails is said once, counted, and stops nothing."""

    tracked: Tracked
    _failures: dict[str, int] = field(default_factory=dict)
    _running: dict[str, Trackers] = field(default_factory=dict)
    _known: set[str] = field(default_factory=set)

    @property
    def failures(self) -> dict[str, int]:
        """How often each tracker failed that did."""
        return {name: count for name, count in self._failures.items() if count}

    def knows(self, trial: str) -> bool:
        """Whether anything was heard of a trial."""
        return trial in self._known

    def log(self, trial: str, label: str, settings: Mapping[str, Any], curve: Sequence[Mapping[str, float]]) -> None:
        """Takes the last row of a trial's curve; of one that is not known here, those before it, too."""
        self._known.add(trial)
        if trial not in self._running:
            # Some object stores take no blanks in a path.
            name = re.sub(r"[^\w.,=+]+", "_", f"{trial} {label}".replace(", ", ","))[:_LONGEST]
            self._running[trial] = self._started(name, settings_at(dict(settings), dict(self.tracked.settings)))
            self._running[trial].recall([_row(point) for point in curve[:-1]])
        self._running[trial].log(_row(curve[-1]))

    def end(self, trial: str, ending: str) -> None:
        """A trial's last word; one that goes on later is taken up again."""
        trackers = self._running.pop(trial, None)
        if trackers is None:
            return
        trackers.close(_STATUS.get(ending, "finished"))

    def close(self) -> None:
        """Ends what is left as stopped."""
        for trial in list(self._running):
            self.end(trial, "stopped early")

    def _started(self, name: str, settings: Mapping[str, Any]) -> Trackers:
        try:
            return self.tracked.start(name, settings, self._failures)
        except ConfigError as error:
            if not self.failures:
                logger.warning("%s; the sweep goes on, further failures are only counted", error)
            for tracker in self.tracked.names:
                self._failures[tracker] = self._failures.get(tracker, 0) + 1
            return Trackers({})


def _row(point: Mapping[str, float]) -> dict[str, float]:
    """A point of a curve as trackers take it."""
    return {"step" if name == "global_step" else name: value for name, value in point.items() if name != "last_step"}

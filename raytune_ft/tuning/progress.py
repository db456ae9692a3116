"""What Ray Tune tells of its trials: shown as it comes, and kept as their curves."""

from __future__ import annotations

import json
import math
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

from pyarrow.fs import FileType
from ray.tune.callback import Callback
from ray.tune.logger import TBXLoggerCallback

from raytune_ft.core.errors import ArtifactError, RunError
from raytune_ft.core.storage import Location
from raytune_ft.training.checkpoint import StoredCheckpoint, folder_of, steps_below
from raytune_ft.training.folder import CHECKPOINTS
from raytune_ft.tuning.arrangement import TRIALS
from raytune_ft.tuning.pointer import write_pointer
from raytune_ft.tuning.refusals import raise_noted
from raytune_ft.tuning.result import Trial
from raytune_ft.tuning.space import settings_at
from raytune_ft.tuning.tracking import Tracked, TrackedTrials
from raytune_ft.tuning.view import SweepView

_CURVES, _TRACKER_FAILURES, _SECONDS = "curves.json", "tracker_failures.json", "seconds_before.json"
_COLUMNS = ("global_step", "last_step", "loss", "learning_rate", "tokens", "time_total_s")
_EVALUATED = "eval_"

Curves = dict[str, list[dict[str, float]]]


class Progress(Callback):  # type: ignore[misc]  # Ray's classes count as Any
    """Shows each evaluation and ending of a trial, tells trackers, and keeps the curves of all, by the trial's id.

    They are part of the state that Ray Tune resumes from, so they fit the trials in it. Ray's own files of results do
    not: when a trial goes on after a pause, they are put back to how they were last uploaded.
    """

    def __init__(self, folder: Location, metric: str, tracked: Tracked, *, resumes: bool = False) -> None:
        """Without any curve.

        Args:
            folder: where Ray Tune keeps its state.
            metric: what trials are compared by.
            tracked: the trackers that are told.
            resumes: whether the search goes on from that state.
        """
        self._folder, self._view, self._curves = folder, SweepView(metric), Curves()
        self._trackers = TrackedTrials(tracked)
        self._began, self._seconds_before = time.monotonic(), 0.0
        self._restored, self._resumes = False, resumes

    def __reduce__(self) -> Any:  # Ray Tune keeps callbacks with its state; a terminal or a tracker cannot be kept
        return _resumed, (self._folder, self._view.metric, self._trackers.tracked)

    def get_state(self) -> dict[str, Any]:
        """Ray Tune's hook: what it keeps with the trials."""
        return {"curves": self._curves, "seconds": self._seconds_before + time.monotonic() - self._began}

    def set_state(self, state: dict[str, Any]) -> None:
        """Ray Tune's hook: what it kept."""
        self._curves, self._seconds_before = state["curves"], state.get("seconds", 0.0)
        self._restored = True

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Ray Tune's hook: of restored trials, checkpoints are forgotten that were deleted after the state was written.

        Ray would delete them again, and take it for an error that they are gone. The newest, which a trial goes on
        from, is written again from what the trial told with it: the states that checkpoints name are kept for longer.
        What a trial told last is in Ray's part of the state, which may be newer than the curves; what it told between
        is in its own.

        Raises:
            RunError: if Ray could not read its state: it logs that, and goes on with an empty search, without a space.
            Exception: if storage has not taken something, in what the system said.
        """
        raise_noted()
        if self._resumes and not trials and _knows_trials(self._folder):
            raise lost_state(self._folder)
        self._resumes = False
        if self._restored:
            self._restored = False
            for trial in trials:
                _forget_deleted(trial.run_metadata.checkpoint_manager)
                curve, told = self._curves.get(trial.trial_id, []), trial.last_result or {}
                known = max((row["global_step"] for row in curve), default=0)
                if told.get("global_step", 0) > known:
                    run = self._trackers.tracked.output / TRIALS / trial.trial_id
                    past = _evaluations(_history(told, run), told.get("last_step"))
                    missed = [row for row in past if known < row["global_step"] < told["global_step"]]
                    self._curves[trial.trial_id] = [*curve, *missed, _kept(told)]

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Ray Tune's hook."""
        self._view.hear(trial.trial_id, self._label(trial), state="running")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Ray Tune's hook."""
        step, value = result["global_step"], result.get(self._view.metric, math.nan)
        last = int(result.get("last_step", 0))
        self._view.hear(trial.trial_id, self._label(trial), state="running", step=step, last_step=last, value=value)
        curve = self._curves.setdefault(trial.trial_id, [])
        curve.append(_kept(result))
        self._trackers.log(trial.trial_id, self._label(trial), trial.config, curve)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Ray Tune's hook."""
        state = self._state_of(trial)
        self._view.hear(trial.trial_id, self._label(trial), state=state)
        self._trackers.end(trial.trial_id, state)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Ray Tune's hook."""
        self._view.hear(trial.trial_id, self._label(trial), state="failed")
        self._trackers.end(trial.trial_id, "failed")

    def _label(self, trial: Any) -> str:
        settings = settings_at(dict(trial.config), dict(self._trackers.tracked.settings))
        return Trial(trial.trial_id, settings, "finished", []).label()

    @staticmethod
    def _state_of(trial: Any) -> str:
        """How a trial ended that did not fail."""
        last = trial.last_result or {}
        if last.get("infeasible"):
            return "infeasible"
        return "stopped early" if last.get("global_step", 0) < last.get("last_step", 0) else "done"

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """Ray Tune's hook: the curves go into a file; trackers hear of trials whose end an earlier driver saw."""
        self._view.close()
        for trial in trials:
            if trial.trial_id in self._curves and not self._trackers.knows(trial.trial_id):
                self._trackers.log(trial.trial_id, self._label(trial), trial.config, self._curves[trial.trial_id])
                self._trackers.end(trial.trial_id, "failed" if trial.status == "ERROR" else self._state_of(trial))
        self._trackers.close()
        (self._folder / _TRACKER_FAILURES).write(json.dumps(self._trackers.failures).encode())
        (self._folder / _SECONDS).write(json.dumps(self._seconds_before).encode())
        (self._folder / _CURVES).write(json.dumps(self._curves).encode())


class NoEventFiles(TBXLoggerCallback):  # type: ignore[misc]  # Ray's classes count as Any
    """Stands where Ray Tune would put its own writer of event files: ours are written by `Tracked`."""

    def __init__(self) -> None:
        """Opens nothing."""

    def log_trial_start(self, trial: Any) -> None:
        """Writes nothing."""

    def log_trial_result(self, iteration: int, trial: Any, result: dict[str, Any]) -> None:
        """Writes nothing."""

    def log_trial_end(self, trial: Any, failed: bool = False) -> None:
        """Writes nothing."""


def lost_state(folder: Location) -> RunError:
    """The error of a search whose state in a folder Ray Tune cannot read."""
    return RunError(
        f"{folder}: the state of the search cannot be read, as a full disk may leave it. Make room, delete this "
        "folder, and run the same command again: the search then begins anew"
    )


def _resumed(folder: Location, metric: str, tracked: Tracked) -> Progress:
    return Progress(folder, metric, tracked, resumes=True)


def _knows_trials(folder: Location) -> bool:
    """Whether Ray Tune's newest state names trials, or cannot be read."""
    states = [name for name in folder.files() if name.startswith("experiment_state-")]
    try:
        return bool(states) and bool(json.loads((folder / max(states)).read())["trial_data"])
    except (ValueError, KeyError):
        return True


def _forget_deleted(manager: Any) -> None:
    """Takes the checkpoints out of Ray's list of a trial's whose folder is gone; the newest is there again."""
    newest = manager.latest_checkpoint_result
    if newest is not None and _is_gone(newest.checkpoint):
        there, told = newest.checkpoint, newest.metrics
        write_pointer(there.filesystem, there.path, told["snapshot"], told["global_step"])
    manager._checkpoint_results = [
        kept for kept in manager._checkpoint_results if kept is newest or not _is_gone(kept.checkpoint)
    ]


def _is_gone(checkpoint: Any) -> bool:
    return bool(checkpoint.filesystem.get_file_info(checkpoint.path).type == FileType.NotFound)


def curves_in(folder: Location) -> Curves:
    """The curves of all trials that reported anything, in order of steps; a step reported again counts once."""
    curves: Curves = json.loads((folder / _CURVES).read())
    return {
        trial: [row for _, row in sorted({row["global_step"]: row for row in told}.items())]
        for trial, told in curves.items()
    }


def of_its_state(trial: Trial) -> Trial:
    """A trial of a population with the curve, and the schedule of settings, of the state that it ended in.

    Of what it reported before it went on from another's state, the model is gone.

    Raises:
        RunError: if that state cannot be read.
    """
    if trial.snapshot is None:
        return trial
    try:
        kept = StoredCheckpoint(Location.at(trial.snapshot)).progress
    except (ArtifactError, OSError, ValueError, KeyError) as error:
        raise RunError(f"the state of trial {trial.label()} is lost: {error}") from None
    curve = _evaluations(kept["history"], trial.last_step)
    earlier, schedule = kept.get("earlier", []), list[dict[str, Any]]()
    configs = [*(before["config"] for before in earlier), kept["config"]]
    for after, config in zip([0, *(before["until"] for before in earlier)], configs, strict=True):
        settings = {key: config[key] for key in trial.settings}
        if not schedule or schedule[-1]["settings"] != settings:
            schedule.append({"after": after, "settings": settings})
    return replace(trial, curve=curve, settings=schedule[-1]["settings"], schedule=schedule)


def _evaluations(history: list[dict[str, float]], last_step: float | None) -> list[dict[str, float]]:
    """What a run with a history told: its evaluations and its last step; without any evaluation, every step."""
    curve, tokens = list[dict[str, float]](), 0.0
    evaluated = any(_is_evaluation(row) for row in history)
    for number, row in enumerate(history, start=1):
        tokens += row["tokens"]
        if _is_evaluation(row) or not evaluated or number == len(history):
            curve.append(_kept({**row, "global_step": row["step"], "last_step": last_step, "tokens": tokens}))
    return curve


def _is_evaluation(row: dict[str, float]) -> bool:
    return any(name.startswith(_EVALUATED) for name in row)


def _history(told: dict[str, Any], run: Location) -> list[dict[str, float]]:
    """The history in the state that a trial told of, or in the newest of its own run; none where these are gone."""
    saved = run / CHECKPOINTS
    own = (folder_of(saved, step) for step in reversed(steps_below(saved)))
    for state in [Location.at(told["snapshot"])] if told.get("snapshot") else own:
        with suppress(ArtifactError, OSError, ValueError, KeyError):
            history: list[dict[str, float]] = StoredCheckpoint(state).progress["history"]
            return history
    return []


def seconds_before_in(folder: Location) -> float:
    """How long earlier drivers were at it, as far as the state tells that the last one went on from."""
    file = folder / _SECONDS
    return float(json.loads(file.read())) if file.exists() else 0.0


def tracker_failures_in(folder: Location) -> dict[str, int]:
    """How often each tracker failed that did."""
    failures: dict[str, int] = json.loads((folder / _TRACKER_FAILURES).read())
    return failures


def _kept(result: dict[str, Any]) -> dict[str, float]:
    """What curves keep of what was told."""
    kept = {name: told for name, told in result.items() if name in _COLUMNS or name.startswith(_EVALUATED)}
    return {name: float(told) for name, told in kept.items() if told is not None and math.isfinite(told)}

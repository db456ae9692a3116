"""Checkpoints written while training goes on: a copy in memory is taken at once, and a thread takes it to storage.

Ranks meet on storage, since a process group must not be used by two threads: each puts a small note beside its file,
and rank 0, which sees them all, writes the manifest. A save that storage refuses is said and given up; the run goes on.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from raytune_ft.core.errors import ArtifactError
from raytune_ft.core.manifest import MANIFEST
from raytune_ft.core.storage import Location
from raytune_ft.training.checkpoint import (
    StoredCheckpoint,
    folder_of,
    opened,
    publish,
    steps_below,
    write_progress,
    write_rank,
)
from raytune_ft.training.peers import Peers
from raytune_ft.training.slices import Slice
from raytune_ft.training.tensor_file import Written

logger = logging.getLogger("raytune_ft")

_FIRST_LOOK_S, _SLOWEST_LOOK_S = 0.005, 1.0
_REFUSALS = (OSError, ArtifactError)


@dataclass(frozen=True)
class Save:
    """What is to be written of a step: this rank's slices, the run's scalars, and the step of the best evaluation."""

    step: int
    slices: Mapping[str, Slice]
    progress: Mapping[str, Any]
    best_step: int | None = None


@dataclass
class _Writing:
    """A save on its way."""

    save: Save
    thread: threading.Thread | None = None
    own_part_done: threading.Event = field(default_factory=threading.Event)
    given_up: threading.Event = field(default_factory=threading.Event)
    failed: bool = False
    unexpected: BaseException | None = None


class CheckpointWriter:
    """Writes one checkpoint at a time below `folder`; `attempt` tells this attempt's notes from an earlier one's.

    Each save that storage refuses is said; of a trial of a sweep (`of_trial`), which saves at every evaluation beside
    others that do, the first of several in a row.
    """

    def __init__(self, folder: Location, peers: Peers, *, keep: int, attempt: int, of_trial: bool = False) -> None:
        self._folder, self._peers, self._keep, self._attempt = folder, peers, keep, attempt
        self._of_trial, self._told = of_trial, False
        self._current: _Writing | None = None
        self._verified: set[int] = set()
        self.refused_step: int | None = None
        """The step of the last save, if storage refused it."""

    def trust(self, step: int) -> None:
        """Notes that the checkpoint of a step was verified by reading it."""
        self._verified.add(step)

    def start(self, save: Save) -> None:
        """Begins to write; every rank calls it, after the save before is settled."""
        self.settle()
        writing = self._current = _Writing(save)
        writing.thread = threading.Thread(target=self._write, args=(writing,), daemon=True, name=f"save-{save.step}")
        writing.thread.start()

    def settle(self) -> None:
        """Waits until the save under way is whole, or given up by all ranks; every rank calls it."""
        writing, self._current = self._current, None
        if writing is None or writing.thread is None:
            return
        writing.own_part_done.wait()
        if not self._peers.all_say(not writing.failed):
            writing.given_up.set()
            writing.failed = True
        writing.thread.join()
        if writing.unexpected is not None:
            raise writing.unexpected
        self.refused_step = writing.save.step if writing.failed else None
        if writing.failed and self._peers.leads:
            self._remove_rest(writing.save.step)

    def abandon(self, patience_s: float = 10.0) -> None:
        """Lets a save under way end by itself where other ranks may be gone; gives up after `patience_s`."""
        writing, self._current = self._current, None
        if writing is None or writing.thread is None:
            return
        writing.thread.join(patience_s)
        writing.given_up.set()
        if writing.failed and self._peers.leads:
            self._remove_rest(writing.save.step)

    def _write(self, writing: _Writing) -> None:
        save = writing.save
        try:
            self._write_parts(writing, folder_of(self._folder, save.step))
            self._told = False
        except _REFUSALS as error:
            writing.failed = True
            self._tell(save.step, error)
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that trains
            writing.failed, writing.unexpected = True, error
        finally:
            writing.own_part_done.set()

    def _tell(self, step: int, error: Exception) -> None:
        if not self._of_trial:
            logger.warning(
                "checkpoint of step %d could not be written (%s); training goes on, and what was saved before is "
                "there. Make room, or lower save_total_limit",
                step,
                error,
            )
        elif not self._told:
            logger.warning(
                "%s: the checkpoint of step %d could not be written (%s); the trial goes on, and what it saved before "
                "is there. Make room; until there is, this is not said again",
                self._folder.parent,
                step,
                error,
            )
        self._told = True

    def _write_parts(self, writing: _Writing, target: Location) -> None:
        save = writing.save
        files = write_rank(target, save.slices, self._peers)
        _read_back(target, files)
        if not self._peers.leads:
            note = {name: asdict(file) for name, file in files.items()}
            (target / self._note(self._peers.rank)).write(json.dumps(note).encode())
            return
        files |= write_progress(target, save.progress)
        writing.own_part_done.set()
        others = self._notes_of_others(target, writing.given_up)
        if others is None:
            return
        publish(target, save.step, files | others)
        self._verified.add(save.step)
        try:
            delete_old(self._folder, save.step, keep=self._keep, best_step=save.best_step, verified=self._verified)
        except _REFUSALS as error:
            logger.warning("old checkpoints could not be deleted (%s)", error)

    def _note(self, rank: int) -> str:
        return f"rank-{rank:05d}.{self._attempt:x}.json"

    def _notes_of_others(self, target: Location, given_up: threading.Event) -> dict[str, Written] | None:
        """What the other ranks have written, as soon as all have; None if the save was given up."""
        wanted = [self._note(rank) for rank in range(1, self._peers.world_size)]
        pause_s = _FIRST_LOOK_S
        while wanted and not set(wanted) <= target.files().keys():
            if given_up.wait(pause_s):
                return None
            pause_s = min(2 * pause_s, _SLOWEST_LOOK_S)
        found: dict[str, Written] = {}
        for name in wanted:
            note = json.loads((target / name).read())
            found |= {file: Written(**entry) for file, entry in note.items()}
        return found

    def _remove_rest(self, step: int) -> None:
        """An unfinished checkpoint is of no use, and its room may be what is missing."""
        target = folder_of(self._folder, step)
        try:
            if not _is_whole(target):
                target.delete()
        except ArtifactError as error:
            logger.warning("checkpoint of step %d: its rest stays there (%s)", step, error)


def _read_back(target: Location, files: Mapping[str, Written]) -> None:
    """Each rank reads what it wrote, so that a checkpoint is known to be whole before an older one goes.

    Raises:
        OSError: if storage gives back something else.
    """
    for name, file in files.items():
        if (target / name).sha256() != file.sha256:
            raise OSError(f"{name} does not read back as it was written")


def delete_old(folder: Location, newest: int, *, keep: int, best_step: int | None, verified: set[int]) -> None:
    """Deletes old checkpoints: never the best one's, and none before one that stays was read and found whole.

    Those that an earlier attempt left unfinished are of no use: they go, and do not count.

    Args:
        folder: what they lie in.
        newest: the step of the newest finished one.
        keep: how many stay, the best one among them; the newest always does.
        best_step: the step of the best evaluation, whether or not there is a checkpoint of it.
        verified: steps that were read and found whole; one read here is added.
    """
    steps = []
    for step in steps_below(folder):
        if step <= newest and (folder_of(folder, step) / MANIFEST).exists():
            steps.append(step)
        elif step < newest:
            folder_of(folder, step).delete()
    best = [best_step] if best_step in steps[:-keep] else []
    kept = steps[-max(1, keep - len(best)) :]
    old = [step for step in steps if step not in (*kept, *best)]
    if not old:
        return
    if not verified & set(kept):
        try:
            opened(folder_of(folder, newest))
        except ValueError as error:
            logger.warning("checkpoint of step %d is not whole (%s): older ones are kept", newest, error)
            return
        verified.add(newest)
    for step in old:
        folder_of(folder, step).delete()


def _is_whole(target: Location) -> bool:
    try:
        StoredCheckpoint(target).check()
    except (ArtifactError, ValueError, KeyError, OSError):
        return False
    return True

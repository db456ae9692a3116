"""What lies under a storage path: every finished, failed and unfinished artifact, and how runs of a kind differ.

In core, apart from `artifacts`, because it reads many folders at once and never writes: rooms make artifacts, only the
command line and the pipeline's report look over all of them. One listing of the storage finds everything, and no
file but manifests, claims and failures is read.
"""

from __future__ import annotations

import os
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from pydantic import ValidationError

from raytune_ft.core.artifacts import read_claim
from raytune_ft.core.errors import ArtifactError
from raytune_ft.core.manifest import (
    CLAIM,
    FAILURES,
    MANIFEST,
    ArtifactKind,
    Failure,
    FileEntry,
    Manifest,
    Parent,
)
from raytune_ft.core.storage import Location


class RunState(StrEnum):
    """How far a run got."""

    FINISHED = "finished"
    FAILED = "failed"
    UNFINISHED = "unfinished"
    """Still running, or killed without a word."""
    DAMAGED = "damaged"
    """Its manifest is there and cannot be read as one."""


_CLAIMED = ("kind", "parents", "settings", "started_at")
_SHARED = (*_CLAIMED, "numbers", "versions", "files", "finished_at")


@dataclass(frozen=True)
class Run:
    """One folder with a manifest, or with a claim and no manifest yet; `name` is relative to the listed path."""

    name: str
    location: Location
    kind: ArtifactKind
    state: RunState
    parents: Sequence[Parent]
    settings: Mapping[str, Any]
    started_at: str
    finished_at: str = ""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, FileEntry] = field(default_factory=dict)
    failures: Sequence[Failure] = ()

    @property
    def outcome(self) -> str:
        """The state in words, with the number of failures that were kept."""
        count = len(self.failures)
        return f"{self.state} ({count} failure{'s' * (count != 1)} kept)" if count else str(self.state)


def list_runs(where: str | os.PathLike[str] | Location) -> list[Run]:
    """Every run at or below a storage path, oldest first.

    Raises:
        ArtifactError: if nothing is there.
    """
    root = Location.at(where)
    if not root.exists():
        raise ArtifactError(f"{root}: there is no such folder; name the storage path that your runs write to")
    files = root.files()
    folders = sorted({_folder(name) for name in files if name.rpartition("/")[2] in {MANIFEST, CLAIM}})
    runs = [run for folder in folders if (run := _read_run(root, folder, files)) is not None]
    return sorted(runs, key=lambda run: (run.started_at, run.name))


def find_run(name: str, storage: str | os.PathLike[str] | Location) -> Run:
    """The run in the folder `name` (a path or URI), or the one below `storage` whose name is or ends in `name`.

    Raises:
        ArtifactError: if there is none, or more than one (they are named).
    """
    here = Location.at(name)
    if (here / MANIFEST).is_file() or (here / CLAIM).is_file():
        run = _read_run(here.parent, here.name, [f"{here.name}/{file}" for file in here.files()])
        if run is not None:
            return run
    root = Location.at(storage)
    runs = list_runs(root) if root.exists() else []
    wanted = name.strip("/")
    found = [run for run in runs if run.name == wanted] or [r for r in runs if r.name.endswith(f"/{wanted}")]
    if len(found) == 1:
        return found[0]
    if found:
        raise ArtifactError(f"{name}: more than one run is called so: {', '.join(run.name for run in found)}")
    known = ", ".join(run.name for run in runs[-5:]) or "nothing"
    raise ArtifactError(f"{name}: is no run, and none below {root} is called so (there: {known})")


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def differing(runs: Iterable[Run]) -> dict[str, dict[str, Any]]:
    """For each run's name the settings that are not the same in all `runs`, with dotted keys.

    Where a run writes to (`output_dir`, `output_path`) always differs and says nothing; it is left out.
    """
    settings = {run.name: flat(run.settings) for run in runs}
    keys = sorted({key for values in settings.values() for key in values})
    telling = [
        key
        for key in keys
        if key.rpartition(".")[2] not in {"output_dir", "output_path"}
        and len({repr(values.get(key)) for values in settings.values()}) > 1
    ]
    return {name: {key: values.get(key) for key in telling} for name, values in settings.items()}


def table(runs: Sequence[Run]) -> list[tuple[str, str, str, str, str]]:
    """One row a run of the same kind: name, state, what it was made from, settings that differ, first numbers."""
    settings = differing(runs)
    rows = []
    for run in runs:
        origin = "\n".join(f"{parent.role}: {parent.where}" for parent in run.parents)
        rows.append((run.name, run.outcome, origin, lines(settings[run.name]), lines(scalars(run.numbers), most=6)))
    return rows


def story(run: Run) -> list[tuple[str, str]]:
    """Everything that is known of a run, as headings with lines of text."""
    failures = [f"{kept.at} {kept.error}: {kept.message}" for kept in run.failures]
    files = [f"{entry.size:>13,}  {name}" for name, entry in run.files.items()]
    return [
        ("what", f"{run.kind} at {run.location}"),
        ("state", run.outcome),
        ("time", f"{run.started_at} to {run.finished_at or '?'}"),
        ("from", "\n".join(f"{parent.role}: {parent.where} ({parent.digest})" for parent in run.parents) or "-"),
        ("settings", lines(flat(run.settings))),
        ("numbers", lines(flat(run.numbers)) or "-"),
        ("versions", lines(run.versions) or "-"),
        ("failures", "\n".join(failures) or "none"),
        ("files", "\n".join(_cut(files, 40)) or "-"),
    ]


def scalars(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers and words among nested `numbers`, with dotted keys; lists and blanks are left out."""
    return {key: value for key, value in flat(numbers).items() if isinstance(value, str | int | float)}


def lines(values: Mapping[str, Any], most: int = 1000) -> str:
    """A line for each of at most `most` values, as `assigned`."""
    return "\n".join(_cut(assigned(values), most))


def assigned(values: Mapping[str, Any]) -> list[str]:
    """``key=value`` of each value, with fractions cut to four digits."""
    return [f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in values.items()]


def _cut(items: list[str], most: int) -> list[str]:
    return items[:most] + [f"... and {len(items) - most} more"] * (len(items) > most)


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _read_run(root: Location, folder: str, files: Iterable[str]) -> Run | None:
    location = root / folder if folder else root
    prefix = f"{folder}/" if folder else ""
    inside = {name.removeprefix(prefix) for name in files if name.startswith(prefix)}
    name = folder or root.name
    failures = _failures(location, inside)
    if MANIFEST in inside:
        try:
            manifest = Manifest.model_validate_json((location / MANIFEST).read())
        except ValidationError:
            if CLAIM not in inside:
                return None  # some other program's manifest.json
        else:
            shared = {key: getattr(manifest, key) for key in _SHARED}
            return Run(name, location, state=RunState.FINISHED, failures=failures, **shared)
    claim = read_claim(location)
    if claim is None:
        return None  # torn by the kill that ended the attempt before any work was done
    shared = {key: getattr(claim, key) for key in _CLAIMED}
    return Run(name, location, state=_state(inside, failures), failures=failures, **shared)


def _state(inside: Container[str], failures: Sequence[Failure]) -> RunState:
    if MANIFEST in inside:
        return RunState.DAMAGED
    return RunState.FAILED if failures else RunState.UNFINISHED


def _failures(location: Location, inside: Iterable[str]) -> list[Failure]:
    names = [name for name in inside if _folder(name) == FAILURES and name.endswith(".json")]
    names.sort(key=lambda name: (len(name), name))  # 2.json before 10.json
    found = []
    for name in names:
        try:
            found.append(Failure.model_validate_json((location / name).read()))
        except ValidationError:
            found.append(Failure(at="", error="unreadable", message=f"{name} is torn"))
    return found

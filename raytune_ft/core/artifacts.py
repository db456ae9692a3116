"""Artifacts: a folder on shared storage that is finished exactly when its ``manifest.json`` is there.

The manifest is written last, by a single PUT (object stores have no rename), and names kind, parents, resolved
settings, versions, numbers, and size and sha256 of every file. ``started.json`` claims a folder before the work;
``failures/`` keeps why earlier attempts stopped. Folders may be local paths or URIs (``s3://``, ``gs://``).
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from pydantic import ValidationError

from raytune_ft.core.config import masked
from raytune_ft.core.errors import ArtifactError
from raytune_ft.core.manifest import (
    CLAIM,
    FAILURES,
    MANIFEST,
    ArtifactKind,
    Claim,
    Failure,
    FileEntry,
    Manifest,
    Parent,
    differences,
    now,
    versions,
)
from raytune_ft.core.storage import Location, cache_folder


@dataclass(frozen=True)
class Artifact:
    """A finished folder, verified when it was opened."""

    location: Location
    manifest: Manifest

    @cached_property
    def digest(self) -> str:
        """What identifies the content: the sha256 over all file hashes, 16 hex digits."""
        text = json.dumps({name: entry.sha256 for name, entry in self.manifest.files.items()}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def seconds(self) -> float:
        """How long the attempt that finished it took."""
        began, ended = (datetime.fromisoformat(t) for t in (self.manifest.started_at, self.manifest.finished_at))
        return (ended - began).total_seconds()

    @property
    def numbers(self) -> dict[str, Any]:
        """The figures that the run measured."""
        return self.manifest.numbers

    def __truediv__(self, name: str) -> Location:
        return self.location / name

    def as_parent(self, role: str) -> Parent:
        """The reference that a child's manifest keeps."""
        return Parent(role=role, where=str(self.location), digest=self.digest)

    def read_json(self, name: str) -> Any:
        """The content of a JSON file of the artifact."""
        return json.loads((self.location / name).read())

    def local(self) -> Path:
        """A local folder with the artifact's files; remote ones are copied once into this machine's cache."""
        if self.location.is_local:
            return Path(self.location.path)
        target = cache_folder() / "artifacts" / self.digest
        complete = target / MANIFEST
        if not complete.exists():
            target.mkdir(parents=True, exist_ok=True)
            manifest = (self.location / MANIFEST).read()
            for name in self.manifest.files:
                (target / name).parent.mkdir(parents=True, exist_ok=True)
            self.location.download(target)
            complete.write_bytes(manifest)
        return target


def has_manifest(where: str | os.PathLike[str] | Location) -> bool:
    """Whether a manifest lies in the folder (verified or not)."""
    return (Location.at(where) / MANIFEST).is_file()


def open_artifact(
    where: str | os.PathLike[str] | Location, *kinds: ArtifactKind, verify: Literal["hash", "size"] = "hash"
) -> Artifact:
    """The finished artifact in a folder, with every file checked against the manifest.

    Args:
        where: local path or URI of the folder.
        kinds: the kinds that will do; any, if none is given.
        verify: ``hash`` reads every file and compares its sha256, ``size`` only lists the folder.

    Raises:
        ArtifactError: if there is no manifest (the run did not finish), it is not ours, the kind is another, or a
            file is missing or differs (each is named).
    """
    location = Location.at(where)
    manifest = _read_manifest(location)
    if kinds and manifest.kind not in kinds:
        wanted = " or ".join(kinds)
        raise ArtifactError(f"{location}: expected a {wanted}, found a {manifest.kind}")
    faults = _faults(location, manifest, verify)
    if faults:
        raise ArtifactError(
            f"{location}: does not match its {MANIFEST}: "
            + "; ".join(faults[:5])
            + _more(faults)
            + ". Restore the files, or delete the folder and run its command again."
        )
    return Artifact(location, manifest)


def _more(items: Sequence[str]) -> str:
    return f" and {len(items) - 5} more" if len(items) > 5 else ""


def _read_manifest(location: Location) -> Manifest:
    if not location.exists():
        raise ArtifactError(f"{location}: there is no such folder")
    if not has_manifest(location):
        if (location / CLAIM).exists():
            raise ArtifactError(
                f"{location} has no {MANIFEST}: the run that writes it did not finish. "
                "Run the same command again to resume."
            )
        raise ArtifactError(f"{location} has no {MANIFEST}: it was not made by raytune-ft, or was copied without it")
    try:
        return Manifest.model_validate_json((location / MANIFEST).read())
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(str(part) for part in fault["loc"])
        raise ArtifactError(
            f"{location / MANIFEST}: is not a manifest of raytune-ft ({key + ': ' if key else ''}{fault['msg']})"
        ) from None


def _faults(location: Location, manifest: Manifest, verify: Literal["hash", "size"]) -> list[str]:
    present = location.files()
    faults = []
    for name, entry in manifest.files.items():
        if name not in present:
            faults.append(f"{name} is missing")
        elif present[name] != entry.size:
            faults.append(f"{name} has {present[name]} bytes instead of {entry.size}")
        elif verify == "hash" and (location / name).sha256() != entry.sha256:
            faults.append(f"{name} was changed (its sha256 differs)")
    return faults


@dataclass
class Draft:
    """An artifact in the making; as a context manager it writes the manifest at the end, or keeps the failure."""

    location: Location
    claim: Claim
    finished: Artifact | None = None
    numbers: dict[str, Any] = field(default_factory=dict)
    _scratch: tempfile.TemporaryDirectory[str] | None = None

    @property
    def folder(self) -> Path:
        """A local folder to write files into: the artifact's own, or a scratch folder that is uploaded at the end."""
        if self.location.is_local:
            path = Path(self.location.path)
            path.mkdir(parents=True, exist_ok=True)
            return path
        if self._scratch is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="raytune-ft-")
        return Path(self._scratch.name)

    def __enter__(self) -> Draft:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._finish()
            else:
                self._keep_failure(error)
        finally:
            if self._scratch is not None:
                self._scratch.cleanup()

    @property
    def artifact(self) -> Artifact:
        """The finished artifact, after the ``with`` block."""
        if self.finished is None:
            raise ArtifactError(f"{self.location}: is not finished")
        return self.finished

    def write_json(self, name: str, content: Any) -> None:
        """Writes `content` as a JSON file of the artifact."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def _finish(self) -> None:
        if not self.location.is_local and self._scratch is not None:
            self.location.upload(self.folder)
        names = [name for name in self.location.files() if _is_content(name)]
        files = {n: FileEntry(size=(self.location / n).size(), sha256=(self.location / n).sha256()) for n in names}
        manifest = Manifest(
            **self.claim.model_dump(exclude={"schema_version", "started_at"}),
            versions=versions(),
            numbers=self.numbers,
            files=files,
            failures=read_failures(self.location),
            started_at=self.claim.started_at,
            finished_at=now(),
        )
        (self.location / MANIFEST).write(manifest.model_dump_json(indent=2).encode())
        self.finished = Artifact(self.location, manifest)

    def _keep_failure(self, error: BaseException) -> None:
        failure = Failure(
            at=now(),
            error=type(error).__name__,
            message=str(masked(str(error))),
            trace=str(masked("".join(traceback.format_exception(error)))),
        )
        number = len(read_failures(self.location)) + 1
        (self.location / FAILURES / f"{number}.json").write(failure.model_dump_json(indent=2).encode())


def begin(
    where: str | os.PathLike[str] | Location,
    kind: ArtifactKind,
    *,
    settings: Mapping[str, Any],
    identity: Mapping[str, Any] | None = None,
    parents: Iterable[Parent] = (),
    keep: Sequence[str] = (),
) -> Draft:
    """Claims a folder for an artifact, or finds the same run's finished work there.

    The same run is one with the same `identity` (by default `settings`) and the same parents' digests. A folder that
    holds an unfinished attempt is taken over; what lies in it is removed, except what is named in `keep` (subfolders
    that the run can go on from) and the failures.

    Returns:
        A draft; its `finished` is set when there is nothing left to do.

    Raises:
        ArtifactError: if the folder holds something else: another artifact, the same with other settings (finished,
            or with work to go on from), or files that are not ours. Nothing is touched then.
    """
    location = Location.at(where)
    claim = Claim(
        kind=kind,
        identity=dict(identity if identity is not None else settings),
        settings=dict(settings),
        parents=list(parents),
        started_at=now(),
    )
    if location.is_file():
        raise ArtifactError(f"{location}: is a file; a folder is needed to write the {kind} into")
    if has_manifest(location):
        done = open_artifact(location)
        _refuse_other(location, claim, done.manifest, "holds a finished")
        return Draft(location, claim, finished=done)
    present = list(location.files())
    if CLAIM in present:
        try:
            earlier = Claim.model_validate_json((location / CLAIM).read())
        except ValidationError:
            earlier = None  # torn by the kill that ended the attempt before any work was done
        # Work that the run could go on from is not given up for other settings; without any, nothing is lost.
        resumable = any(name.partition("/")[0] in keep for name in present)
        if earlier is not None and (earlier.kind != kind or resumable):
            _refuse_other(location, claim, earlier, "holds an unfinished")
        for name in present:
            if name != CLAIM and name.partition("/")[0] not in {FAILURES, *keep}:
                (location / name).delete()
    elif present:
        raise ArtifactError(
            f"{location}: holds something else ({', '.join(present[:3])}{_more(present)}); "
            "choose an empty or a new folder. Nothing was overwritten."
        )
    (location / CLAIM).write(claim.model_dump_json(indent=2).encode())
    return Draft(location, claim)


def _refuse_other(location: Location, wanted: Claim, found: Claim | Manifest, what: str) -> None:
    if found.kind != wanted.kind:
        difference = f"a {wanted.kind} was to be written there"
    else:
        changed = differences(found.identity, json.loads(json.dumps(wanted.identity)))
        older = {(parent.role, parent.digest) for parent in found.parents}
        changed += [
            f"{parent.role}: another content at {parent.where}"
            for parent in wanted.parents
            if (parent.role, parent.digest) not in older
        ]
        if not changed:
            return
        difference = "made with other settings: " + "; ".join(changed[:5]) + _more(changed)
    raise ArtifactError(
        f"{location}: {what} {found.kind}, {difference}. Choose another output folder, or delete this one first. "
        "Nothing was overwritten."
    )


def read_failures(where: str | os.PathLike[str] | Location) -> list[Failure]:
    """Why earlier attempts at the artifact in a folder stopped, oldest first."""
    folder = Location.at(where) / FAILURES
    names = sorted(folder.files(), key=lambda name: int(Path(name).stem) if Path(name).stem.isdigit() else 0)
    found = []
    for name in names:
        try:
            found.append(Failure.model_validate_json((folder / name).read()))
        except ValidationError:  # torn by a kill or a full disk: it still counts as a failure
            found.append(Failure(at="", error="unknown", message=f"{FAILURES}/{name} cannot be read"))
    return found


def read_claim(where: str | os.PathLike[str] | Location) -> Claim | None:
    """The claim of an unfinished or finished folder; None where there is none."""
    location = Location.at(where) / CLAIM
    if not location.is_file():
        return None
    try:
        return Claim.model_validate_json(location.read())
    except ValidationError:
        return None


def _is_content(name: str) -> bool:
    return name not in {MANIFEST, CLAIM} and name.partition("/")[0] != FAILURES

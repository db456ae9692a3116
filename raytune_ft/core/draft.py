"""Artifacts in the making: a folder is claimed before the work, and its manifest written last, by a single PUT.

``started.json`` claims a folder; ``failures/`` keeps why earlier attempts stopped. Object stores have no rename, so a
folder without a manifest is unfinished, whatever lies in it.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import tempfile
import traceback
import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raytune_ft.core.artifacts import (
    Artifact,
    has_manifest,
    open_artifact,
    read_claim,
    read_failures,
    read_manifest,
)
from raytune_ft.core.config import masked
from raytune_ft.core.errors import ArtifactError
from raytune_ft.core.grammar import more
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
from raytune_ft.core.refusals import not_stored, refused
from raytune_ft.core.storage import Location

logger = logging.getLogger("raytune_ft")

_TORN_CLAIM = re.compile(rf"\.{re.escape(CLAIM)}\.\d+-\d+\.part")
"""What a kill leaves of a claim that was being written."""


@dataclass
class Draft:
    """An artifact in the making; as a context manager it writes the manifest at the end, or keeps the failure."""

    location: Location
    claim: Claim
    finished: Artifact | None = None
    numbers: dict[str, Any] = field(default_factory=dict)
    lock: FolderLock | None = None
    resumes: bool = False
    """Whether a repeated run goes on from what lies here."""
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

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if error is None:
                self._finish()
            elif self._is_ours():
                self._keep_failure(error)
        except (ArtifactError, OSError) as trouble:
            if error is None:
                raise self._refused(trouble) if isinstance(trouble, OSError) else trouble from None
            logger.warning("%s: why it failed could not be kept: %s", self.location, trouble)
        finally:
            if self.lock is not None:
                self.lock.release()
            if self._scratch is not None:
                self._scratch.cleanup()
        cause = not_stored(error)
        if cause is not None:
            raise self._refused(cause) from error

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

    def _refused(self, error: Exception) -> ArtifactError:
        goes_on = "goes on from what is there" if self.resumes else "begins anew"
        return refused(self.location, error, f"Then the same command {goes_on}.")

    def _is_ours(self) -> bool:
        """Whether no other run has claimed the folder since."""
        found = read_claim(self.location)
        return found is not None and found.attempt == self.claim.attempt

    def _finish(self) -> None:
        if not self._is_ours():
            raise ArtifactError(
                f"{self.location}: another run has begun in this folder since this one did; both put files there, so "
                "this one's work is not called finished. Run one at a time, or give each a folder of its own."
            )
        if not self.location.is_local and self._scratch is not None:
            self.location.upload(self.folder)
        names = [name for name in self.location.files() if _is_content(name)]
        files = {n: FileEntry(size=(self.location / n).size(), sha256=(self.location / n).sha256()) for n in names}
        manifest = Manifest(
            **self.claim.model_dump(),
            versions=versions(),
            numbers=self.numbers,
            files=files,
            failures=read_failures(self.location),
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
    renew: bool = False,
    idle: Collection[str] = (),
) -> Draft:
    """Claims a folder for an artifact, or finds the same run's finished work there.

    The same run is one with the same `identity` (by default `settings`; but for what of it is `idle`: dotted keys that
    decide nothing beside the others) and the same parents' digests. A folder that holds an unfinished attempt is taken
    over; what lies in it is removed, except what is named in `keep` (subfolders that the run can go on from) and the
    failures. With `renew`, so is what the same kind of run has finished with other settings or parents: for what is put
    together from other artifacts within seconds.

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
        attempt=uuid.uuid4().hex,
    )
    _refuse_file(location, kind)
    outdated = renew and has_manifest(location) and _is_other(claim, read_manifest(location))
    if has_manifest(location) and not outdated:
        done = open_artifact(location)
        _refuse_other(location, claim, done.manifest, "holds a finished", idle)
        return Draft(location, claim, finished=done)
    lock = _locked(location)
    try:
        if outdated:
            (location / MANIFEST).delete()
        _claim(location, claim, keep, idle)
    except BaseException as error:
        if lock is not None:
            lock.release()  # whoever keeps the error's traceback would keep the lock, too
        if isinstance(error, OSError):
            raise refused(location, error) from error
        raise
    return Draft(location, claim, lock=lock, resumes=bool(keep))


def refuse_other(
    where: str | os.PathLike[str] | Location,
    kind: ArtifactKind,
    identity: Mapping[str, Any] | None = None,
    *,
    idle: Collection[str] = (),
) -> None:
    """Checks, long before it is its turn, that `begin` will not refuse a folder for what lies there.

    Args:
        where: the folder.
        kind: what is going to be made there.
        identity: of the run that makes it; None where it is not known yet. Unfinished work is not held against it.
        idle: dotted keys of it that decide nothing beside the others.

    Raises:
        ArtifactError: as `begin`.
    """
    location = Location.at(where)
    finished = has_manifest(location)
    found: Claim | None = read_manifest(location) if finished else read_claim(location)
    if found is not None:
        known = identity if finished and identity is not None else found.identity
        wanted = found.model_copy(update={"kind": kind, "identity": dict(known), "parents": []})
        _refuse_other(location, wanted, found, f"holds {'a finished' if finished else 'an unfinished'}", idle)
        return
    _refuse_file(location, kind)
    if CLAIM not in (present := list(location.files())) and not _only_torn(present):
        raise _foreign(location, present)


def _refuse_file(location: Location, kind: ArtifactKind) -> None:
    if location.is_file():
        raise ArtifactError(f"{location}: is a file; a folder is needed to write the {kind} into")


def _only_torn(present: Sequence[str]) -> bool:
    return all(map(_TORN_CLAIM.fullmatch, present))


def _foreign(location: Location, present: Sequence[str]) -> ArtifactError:
    return ArtifactError(
        f"{location}: holds something else ({', '.join(present[:3])}{more(present)}); "
        "choose an empty or a new folder. Nothing was overwritten."
    )


def _claim(location: Location, claim: Claim, keep: Sequence[str], idle: Collection[str]) -> None:
    """Takes a folder without a manifest over; what is left of earlier attempts goes, but for what is kept."""
    present = list(location.files())
    if CLAIM in present:
        earlier = read_claim(location)  # None: torn by the kill that ended the attempt before any work was done
        # Work that the run could go on from is not given up for other settings; without any, nothing is lost.
        resumable = any(name.partition("/")[0] in keep for name in present)
        if earlier is not None and (earlier.kind != claim.kind or resumable):
            _refuse_other(location, claim, earlier, "holds an unfinished", idle)
        for name in present:
            if name != CLAIM and name.partition("/")[0] not in {FAILURES, *keep}:
                (location / name).delete()
    elif not _only_torn(present):
        raise _foreign(location, present)
    for name in filter(_TORN_CLAIM.fullmatch, present):
        (location / name).delete()
    (location / CLAIM).write(claim.model_dump_json(indent=2).encode())


class FolderLock:
    """A local folder that this process alone writes into, until `release` or its end, however that comes."""

    def __init__(self, folder: Path) -> None:
        """Locks the folder.

        Raises:
            BlockingIOError: if another process, or another lock of this one, holds it.
            OSError: if the folder cannot be opened, or its file system knows no locks.
        """
        self._handle = -1
        self._handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.release()
            raise

    def release(self) -> None:
        """Lets others in."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def __del__(self) -> None:
        self.release()


def _locked(location: Location) -> FolderLock | None:
    """The folder, made if need be, for this process alone; None where there are no such locks, as on object stores."""
    if not location.is_local:
        return None
    folder = Path(location.path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"{location}: this folder cannot be made ({error.strerror}); choose another") from None
    try:
        return FolderLock(folder)
    except BlockingIOError:
        raise ArtifactError(
            f"{location}: another run is writing into this folder right now. Wait for it, or choose another folder. "
            "Nothing was overwritten."
        ) from None
    except OSError:
        return None  # network file systems without locks: two runs tell each other apart by their claims at the end


def _is_other(wanted: Claim, found: Claim) -> bool:
    """Whether an artifact of the wanted kind was made with other settings, or of other parents."""
    return found.kind == wanted.kind and bool(_changes(wanted, found))


def _changes(wanted: Claim, found: Claim, idle: Collection[str] = ()) -> list[str]:
    """What is different between two runs of a kind: settings but for those `idle`, and parents' contents."""
    changed = differences(found.identity, json.loads(json.dumps(wanted.identity)))
    changed = [said for said in changed if said.partition(":")[0] not in idle]
    older = {(parent.role, parent.digest) for parent in found.parents}
    known = {parent.role for parent in found.parents}  # earlier versions noted fewer roles
    return changed + [
        f"{parent.role}: another content at {parent.where}"
        for parent in wanted.parents
        if parent.role in known and (parent.role, parent.digest) not in older
    ]


def _refuse_other(location: Location, wanted: Claim, found: Claim, what: str, idle: Collection[str]) -> None:
    if found.kind != wanted.kind:
        difference = f"a {wanted.kind} was to be written there"
    elif changed := _changes(wanted, found, idle):
        difference = "made with other settings: " + "; ".join(changed[:5]) + more(changed)
    else:
        return
    raise ArtifactError(
        f"{location}: {what} {found.kind}, {difference}. Choose another output folder, or delete this one first. "
        "Nothing was overwritten."
    )


def _is_content(name: str) -> bool:
    return name not in {MANIFEST, CLAIM} and name.partition("/")[0] != FAILURES

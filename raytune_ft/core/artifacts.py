"""Artifacts: a folder on shared storage that is finished exactly when its ``manifest.json`` is there.

The manifest is written last, by a single PUT (object stores have no rename), and names kind, parents, resolved
settings, versions, numbers, and size and sha256 of every file. Folders may be local paths or URIs (``s3://``,
``gs://``). How one is made: `core.draft`.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from raytune_ft.core.digest import short_hash
from raytune_ft.core.errors import ArtifactError
from raytune_ft.core.grammar import more
from raytune_ft.core.manifest import (
    CLAIM,
    FAILURES,
    MANIFEST,
    ArtifactKind,
    Claim,
    Failure,
    Manifest,
    Parent,
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
        return short_hash(text)

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
            self.location.download(target, self.manifest.files)
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
    manifest = read_manifest(location)
    if kinds and manifest.kind not in kinds:
        wanted = " or ".join(kinds)
        raise ArtifactError(f"{location}: expected a {wanted}, found a {manifest.kind}")
    faults = _faults(location, manifest, verify)
    if faults:
        raise ArtifactError(
            f"{location}: does not match its {MANIFEST}: "
            + "; ".join(faults[:5])
            + more(faults)
            + ". Restore the files, or delete the folder and run its command again."
        )
    return Artifact(location, manifest)


def read_manifest(location: Location) -> Manifest:
    """The manifest in a folder; its files are not looked at.

    Raises:
        ArtifactError: if there is none, or it is not ours.
    """
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

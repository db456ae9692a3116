"""Source files: which there are behind paths, folders, globs and URIs; the driver lists them and reads none."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass

from raytune_ft.core.artifacts import has_manifest
from raytune_ft.core.errors import ArtifactError, DataError
from raytune_ft.core.manifest import Parent
from raytune_ft.core.storage import Location, source_digest

logger = logging.getLogger("raytune_ft")

KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
_COMPRESSED = (".gz", ".zst", ".bz2")
_HASHED_FILES = 64


@dataclass(frozen=True)
class SourceFile:
    """One file to read: `label` names it in records, `number` is its place in the order of all files."""

    uri: str
    label: str
    kind: str
    number: int
    is_test: bool


def find_files(sources: Sequence[str], test_sources: Sequence[str] = ()) -> list[SourceFile]:
    """The files behind paths, folders, globs and URIs; those of the test first, else in the order given.

    Raises:
        DataError: if a source is missing, matches nothing, is empty, or is of no known kind.
    """
    found: dict[str, tuple[Location, bool]] = {}
    for source, is_test in [(s, True) for s in test_sources] + [(s, False) for s in sources]:
        for location in _files_of(source):
            if location.uri in found and found[location.uri][1] != is_test:
                raise DataError(f"{location}: stands in sources and in test_sources; a row cannot be in both")
            found.setdefault(location.uri, (location, is_test))
    labels = _labels([location for location, _ in found.values()])
    return [
        SourceFile(location.uri, label, kind_of(location), number, is_test)
        for number, (label, (location, is_test)) in enumerate(zip(labels, found.values(), strict=True))
    ]


def source_parents(sources: Sequence[str], role: str) -> list[Parent]:
    """A manifest's entries for `sources`, one each, whose digest changes when any file behind it changes.

    Up to 64 files are hashed; of more, size and time of change count, so that the driver need not read them.
    """
    parents = []
    for source in sources:
        files = _files_of(source)
        if len(files) <= _HASHED_FILES:
            content = [[file.name, source_digest(file)] for file in files]
        else:
            content = [[file.name, str(file._info().size), str(file._info().mtime_ns)] for file in files]
        digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
        parents.append(Parent(role=role, where=str(Location.at(source)), digest=digest))
    return parents


def kind_of(location: Location) -> str:
    """The kind of a file by its name: jsonl, json, csv, parquet or text.

    Raises:
        DataError: if the name tells none.
    """
    kind = _kind(location.name)
    if kind is None:
        raise DataError(f"{location}: of no known kind; expected a file named {', '.join(KINDS)} (also with .gz, .zst)")
    return kind


def _kind(name: str) -> str | None:
    for ending in _COMPRESSED:
        name = name.removesuffix(ending)
    return KINDS.get("." + name.rpartition(".")[2]) if "." in name else None


def _files_of(source: str) -> list[Location]:
    location = Location.at(source)
    try:
        if location.is_file():
            kind_of(location)
            if location.size() == 0:
                raise DataError(f"{location}: is empty")
            return [location]
        if location.exists():
            return _in_folder(location)
        if any(sign in source for sign in "*?"):
            return _matching(location)
    except ArtifactError as error:
        raise DataError(str(error)) from None
    raise DataError(f"{location}: there is no such file or folder to read records from")


def _in_folder(folder: Location) -> list[Location]:
    names = folder.files()
    if has_manifest(folder):  # a dataset of ours: its splits, not what it rejected or says about itself
        names = {n: size for n, size in names.items() if n.endswith(".parquet") and not n.startswith("rejected/")}
    return _usable(folder, names, f"{folder}: holds no file to read ({', '.join(KINDS)})")


def _matching(pattern: Location) -> list[Location]:
    head = re.split(r"[*?]", pattern.uri, maxsplit=1)[0].rpartition("/")[0]
    signs = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", pattern.uri[len(head) + 1 :])
    wanted = re.compile("".join(signs.get(part) or re.escape(part) for part in parts))
    folder = Location(head or "/")
    names = {name: size for name, size in folder.files().items() if wanted.fullmatch(name)}
    return _usable(folder, names, f"{pattern}: no file to read matches")


def _usable(folder: Location, names: dict[str, int], nothing: str) -> list[Location]:
    visible = {name: size for name, size in names.items() if not any(p.startswith((".", "_")) for p in name.split("/"))}
    usable = [name for name, size in visible.items() if size and _kind(name)]
    if not usable:
        raise DataError(nothing)
    if len(usable) < len(visible):
        passed_over = sorted(set(visible) - set(usable))
        logger.warning(
            "%s: passed over %d file(s), empty or of no known kind: %s",
            folder,
            len(passed_over),
            ", ".join(passed_over[:3]),
        )
    return [folder / name for name in usable]


def _labels(locations: Sequence[Location]) -> list[str]:
    """The shortest path endings that tell the files apart, so that records do not name this machine's folders."""
    paths = [str(location).split("/") for location in locations]
    depth = 1
    while True:
        labels = ["/".join(path[-depth:]) for path in paths]
        if len(set(labels)) == len(labels) or depth > max(map(len, paths)):
            return labels
        depth += 1

"""Source files: which there are behind paths, folders, globs and URIs; the driver lists them and reads none."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import unquote

from raytune_ft.core.artifacts import has_manifest, open_artifact
from raytune_ft.core.digest import short_hash
from raytune_ft.core.errors import ArtifactError, DataError
from raytune_ft.core.grammar import number_of
from raytune_ft.core.manifest import CLAIM, MANIFEST, Parent
from raytune_ft.core.storage import Location, is_hidden, refuse_broken_links, source_digest
from raytune_ft.data.export import MARKER
from raytune_ft.data.hub import SCHEME, HubSource, content_of, parts_of

logger = logging.getLogger("raytune_ft")

KINDS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow",
    ".txt": "text",
}  # fmt: skip
COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
_WHOLE = frozenset({"parquet", "arrow"})
COLUMNAR = _WHOLE | {"hub"}
"""Kinds in which all structs of a column have the same fields."""
_HASHED_FILES = 64
_MOST_MARKER_BYTES = 1 << 20
_BROKEN = -1
"""Stands for the size of a link that leads nowhere."""


@dataclass(frozen=True)
class SourceFile:
    """One file to read: `label` names it in records, `number` is its place in the order of all files.

    A shard of a hub's dataset is one, too, of the kind ``hub``.
    """

    uri: str
    label: str
    kind: str
    number: int
    is_test: bool


def find_files(sources: Sequence[str], test_sources: Sequence[str] = ()) -> list[SourceFile]:
    """The files behind paths, folders, globs and URIs, each once; those of the test first, else in the order given.

    A local file that several names lead to (symbolic links, a link to a folder above it) is one.

    Raises:
        DataError: if a source is missing, matches nothing, is empty, or is of no known kind.
    """
    found: dict[str, tuple[Location, bool]] = {}
    for source, is_test in [(s, True) for s in test_sources] + [(s, False) for s in sources]:
        for location in _files_of(source):
            file = os.path.realpath(location.uri) if location.is_local else location.uri
            if file in found and found[file][1] != is_test:
                raise DataError(f"{location}: stands in sources and in test_sources; a row cannot be in both")
            found.setdefault(file, (location, is_test))
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
        if source.startswith(SCHEME):
            digest = short_hash(content_of(source))
            parents.append(Parent(role=role, where=source_uri(source), digest=digest))
            continue
        files = _files_of(source)
        if len(files) <= _HASHED_FILES:
            content = [[file.name, source_digest(file)] for file in files]
        else:
            content = [[file.name, str(file._info().size), str(file._info().mtime_ns)] for file in files]
        digest = short_hash(json.dumps(content))
        parents.append(Parent(role=role, where=str(Location.at(source)), digest=digest))
    return parents


def kind_of(location: Location) -> str:
    """The kind of a file by its name: jsonl, json, csv, parquet, arrow, text, or hub for a dataset's shard.

    Raises:
        DataError: if the name tells none, or a file that is read in parts is compressed as a whole.
    """
    if location.uri.startswith(SCHEME):
        return "hub"
    kind = _kind(location.name)
    if kind is None:
        raise DataError(
            f"{location}: of no known kind; expected a file named {', '.join(KINDS)} (also with .gz, .zst, .bz2)"
        )
    if kind in _WHOLE and compression_of(location.name):
        raise DataError(f"{location}: {kind} is compressed inside already; unpack this file and give it as .{kind}")
    return kind


def compression_of(name: str) -> str | None:
    """How a file is compressed, by its name: gzip, zstd, bz2 or None."""
    return next((codec for ending, codec in COMPRESSED.items() if name.lower().endswith(ending)), None)


def _kind(name: str) -> str | None:
    name = name.lower()
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    return KINDS.get("." + name.rpartition(".")[2]) if "." in name else None


def source_uri(source: str) -> str:
    """A source as the URIs of its files begin: absolute, or the dataset of the hub with its split."""
    return str(HubSource.parse(source)) if source.startswith(SCHEME) else Location.at(source).uri


def _files_of(source: str) -> list[Location]:
    if source.startswith(SCHEME):
        return [Location(part) for part in parts_of(source)]
    location = Location.at(source)
    try:
        if location.is_file():
            kind_of(location)
            if location.size() == 0:
                raise DataError(f"{location}: is empty")
            return [location]
        if location.exists():
            return _in_folder(location)
        pattern = source.partition("?")[0] if "://" in source else source  # behind the ? of a URI stand options
        if any(sign in pattern for sign in "*?") and not location.uri.startswith(("http://", "https://")):
            return _matching(location)
    except ArtifactError as error:
        raise DataError(str(error)) from None
    raise DataError(f"{location}: there is no such file or folder to read records from")


def _in_folder(folder: Location) -> list[Location]:
    names = _without_marker(folder, _without_saved(folder, _without_outputs(folder, _listed(folder))))
    if has_manifest(folder):  # a dataset of ours: its splits, not what it rejected, says about itself or exported
        splits = open_artifact(folder, verify="size").manifest.files
        names = {n: names[n] for n in splits if n.endswith(".parquet") and not n.startswith("rejected/")}
    return _usable(folder, names, f"{folder}: holds no file to read ({', '.join(KINDS)})")


def _listed(folder: Location) -> dict[str, int]:
    """Relative path and size of every file below a folder; of a link that leads nowhere `_BROKEN`."""
    return {**dict.fromkeys(folder.broken_links(), _BROKEN), **folder.files()}


def _without_outputs(folder: Location, names: dict[str, int]) -> dict[str, int]:
    """Of the files below a folder those that are not in an output of ours, finished or not."""
    parts = [name.rpartition("/") for name in names]
    outputs = sorted({base for base, _, file in parts if base and file in {MANIFEST, CLAIM}})
    if not outputs:
        return names
    logger.warning("%s: passed over what runs wrote below it: %s; name a folder to read it", folder, ", ".join(outputs))
    return {name: size for name, size in names.items() if not name.startswith(tuple(base + "/" for base in outputs))}


def _without_marker(folder: Location, names: dict[str, int]) -> dict[str, int]:
    """Of the files below a folder those that hold rows, where it is an export of ours."""
    if not 0 < names.get(MARKER, 0) < _MOST_MARKER_BYTES:
        return names
    try:
        marker = json.loads((folder / MARKER).read())
    except ValueError:
        return names
    is_ours = isinstance(marker, dict) and set(marker) == {"format", "splits"}
    return {name: size for name, size in names.items() if name != MARKER} if is_ours else names


def _without_saved(folder: Location, names: dict[str, int]) -> dict[str, int]:
    """Of the files below a folder, for each dataset that `save_to_disk` wrote there only those that hold its rows."""
    kept = dict(names)
    splits = []
    for state in [name for name in names if name.rpartition("/")[2] == "state.json"]:
        base = state.removesuffix("state.json")
        if base + "dataset_info.json" not in names:
            continue
        try:
            rows = {base + file["filename"] for file in json.loads((folder / state).read())["_data_files"]}
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{folder / state}: is not what save_to_disk writes; the dataset is damaged") from None
        lacking = sorted(rows - set(names))
        if lacking:
            raise DataError(f"{folder / lacking[0]}: is missing, and the dataset's state.json names it")
        splits.append(base.rstrip("/") or ".")
        inside = {name for name in names if name.startswith(base) and "/" not in name[len(base) :]}
        kept = {name: size for name, size in kept.items() if name not in inside or name in rows}
    if "dataset_dict.json" in kept and splits:
        del kept["dataset_dict.json"]
        logger.info("%s: reading all its splits (%s); give a split's folder to read one", folder, ", ".join(splits))
    return kept


def _matching(pattern: Location) -> list[Location]:
    uri, question, query = pattern.uri.partition("?") if "://" in pattern.uri else (pattern.uri, "", "")
    head = re.split(r"[*?]", uri, maxsplit=1)[0].rpartition("/")[0]
    wanted = re.compile(pattern_of(unquote(uri[len(head) + 1 :]) if "://" in uri else uri[len(head) + 1 :]))
    folder = Location((head or "/") + question + query)
    names = {name: size for name, size in _listed(folder).items() if wanted.fullmatch(name)}
    return _usable(folder, names, f"{pattern}: no file to read matches")


def pattern_of(glob: str) -> str:
    """A glob as a regular expression: ``*`` and ``?`` stay in a folder, ``**`` goes below."""
    signs = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(signs.get(part) or re.escape(part) for part in re.split(r"(\*\*/|\*\*|\*|\?)", glob))


def _usable(folder: Location, names: dict[str, int], nothing: str) -> list[Location]:
    visible = {name: size for name, size in names.items() if not is_hidden(name)}
    refuse_broken_links(folder, [name for name, size in visible.items() if size == _BROKEN])
    usable = [name for name, size in visible.items() if size and _kind(name)]
    if not usable:
        raise DataError(nothing)
    if len(usable) < len(visible):
        passed_over = sorted(set(visible) - set(usable))
        logger.warning(
            "%s: passed over %s, empty or of no known kind: %s",
            folder,
            number_of(len(passed_over), "file"),
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

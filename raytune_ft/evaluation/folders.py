"""Which files of a folder hold rows: none is passed over without a word."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from raytune_ft.core.errors import DataError
from raytune_ft.core.grammar import more, number_of
from raytune_ft.core.storage import Location, is_hidden, refuse_broken_links

logger = logging.getLogger("raytune_ft")

ROWS = (".jsonl", ".parquet")
"""Endings of the files that rows are read from."""


def files_of(folder: Location, kinds: tuple[str, ...] = ROWS) -> list[Location]:
    """The files below a folder whose names end in one of `kinds`; says which others it holds.

    Raises:
        DataError: if links below the folder lead nowhere.
    """
    refuse_broken_links(folder, _visible(folder.broken_links()))
    return _chosen(folder, list(folder.files()), kinds)


def files_of_split(folder: Location, split: str) -> list[Location]:
    """The files of a split below a folder: ``<split>.jsonl``, ``<split>.parquet``, or those in ``<split>/``; says which
    others lie in the last.

    Raises:
        DataError: if there are none, or links among them lead nowhere.
    """
    refuse_broken_links(folder, [name for name in _visible(folder.broken_links()) if _split_of(name) == split])
    names = list(folder.files())
    found = split_files(folder, names, split)
    _chosen(folder, [name for name in names if name.startswith(f"{split}/")], ROWS)
    return found


def split_files(folder: Location, names: Sequence[str], split: str) -> list[Location]:
    """The files of a split among the names in a folder.

    Raises:
        DataError: if there are none.
    """
    splits: dict[str, list[Location]] = {}
    for name in names:
        if name.endswith(ROWS):
            splits.setdefault(_split_of(name), []).append(folder / name)
    splits.pop("rejected", None)
    if split not in splits:
        found = ", ".join(sorted(splits)) or "none"
        raise DataError(f"{folder}: has no split {split!r} (splits with rows: {found})")
    return splits[split]


def _split_of(name: str) -> str:
    top = name.partition("/")[0]
    return top.rpartition(".")[0] or top if top == name else top


def _visible(names: Sequence[str]) -> list[str]:
    return [name for name in names if not is_hidden(name)]


def _chosen(folder: Location, names: Sequence[str], kinds: tuple[str, ...]) -> list[Location]:
    others = [name for name in _visible(names) if not name.endswith(kinds)]
    if others:
        logger.warning(
            "%s: passed over %s named %s: %s",
            folder,
            number_of(len(others), "file that is not", "files that are not"),
            " or ".join(f"*{kind}" for kind in kinds),
            ", ".join(others[:5]) + more(others),
        )
    return [folder / name for name in names if name.endswith(kinds)]

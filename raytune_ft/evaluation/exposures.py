"""The log of an A/B test, read back: who got which variant, and what became of the request."""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytune_ft.core.errors import ConfigError, DataError
from raytune_ft.core.storage import Location
from raytune_ft.evaluation.folders import files_of
from raytune_ft.evaluation.statistics import Floats

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Line = tuple[dict[str, Any], str]
"""A line's content, and its place in words."""


@dataclass(frozen=True)
class Exposures:
    """The requests of one test, in columns [requests], and its subjects [subjects]."""

    test: str
    shares: dict[str, float]
    """Of each variant, the control first."""
    variant: Ints
    """The place of the request's variant in `shares`."""
    subject: Ints
    """The number of the request's subject."""
    time: Floats
    """When the request came, in seconds since 1970."""
    status: Ints
    """HTTP status; 499 where the client went away."""
    latency_s: Floats
    first_token_s: Floats
    """NaN where there was none."""
    tokens: Floats
    """Of the answers; NaN where there was none."""
    subject_variant: Ints
    """The place of each subject's (first) variant in `shares`."""
    rows: dict[str, int]
    """The number of the request that an answer's id belongs to."""
    unsticky: int
    """Requests without a subject of their own; each counts as one subject."""
    crossed: int
    """Subjects that were given more than one variant."""
    files: LogFiles

    @property
    def variants(self) -> tuple[str, ...]:
        """Their names, the control first."""
        return tuple(self.shares)


@dataclass
class LogFiles:
    """What was read of a folder of JSON lines."""

    where: str
    lines: int = 0
    torn: int = 0
    """Last lines that are cut off: of a replica that was killed, or that is writing just now."""
    digest: str = ""
    """Of the whole lines, 16 hex digits."""


def log_lines(path: str, files: LogFiles, *, setting: str) -> Iterator[Line]:
    """The whole JSON lines of a file, or of the ``.jsonl`` files of a folder, in the order of their names.

    Args:
        path: of the file or folder.
        files: is told what was read.
        setting: that named the path, for errors.

    Raises:
        DataError: if there is none, a link leads nowhere, or a line is no JSON object.
    """
    location = Location.at(path)
    if not location.exists():
        raise DataError(f"{setting}: {location}: there is no such file or folder")
    found = [location] if location.is_file() else files_of(location, (".jsonl",))
    if not found:
        raise DataError(f"{setting}: {location}: holds no .jsonl file")
    hasher = hashlib.sha256()
    for file in found:
        for number, line in enumerate(file.lines(errors="replace"), 1):
            if not line.endswith("\n"):
                files.torn += 1
            elif line.strip():
                hasher.update(line.encode())
                files.lines += 1
                yield _parsed(line, f"{file}:{number}"), f"{file}:{number}"
    files.digest = hasher.hexdigest()[:16]


def read_exposures(path: str, test: str | None = None) -> Exposures:
    """The requests of a test in the log at `path`.

    Args:
        path: the `log_path` of the endpoint's test.
        test: its name; may be left out where the log holds one test.

    Raises:
        ConfigError: if the log holds several tests and none is named, or not the one that is.
        DataError: if there is no log, a line is none of an A/B test, or the test's settings changed while it ran.
    """
    files = LogFiles(str(Location.at(path)))
    by_test: dict[str, _Collected] = {}
    for line, where in log_lines(path, files, setting="exposures_path"):
        try:
            by_test.setdefault(str(line["test"]), _Collected(str(line["test"]))).add(line, where)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{where}: is no line of an A/B test's log ({error!r:.80})") from None
    names = ", ".join(sorted(by_test))
    if not by_test:
        raise DataError(f"exposures_path: {files.where}: no request was written down yet")
    if test is None and len(by_test) > 1:
        raise ConfigError(f"test: the log holds several tests; name one of {names}")
    if test is not None and test not in by_test:
        raise ConfigError(f"test: there is no test {test!r} in {files.where}; it holds {names}")
    return by_test[test or names].exposures(files)


class _Collected:
    """The lines of one test."""

    def __init__(self, test: str) -> None:
        self._test = test
        self._settings: tuple[str, dict[str, float]] | None = None
        self._columns = {
            name: array("d")
            for name in ("variant", "subject", "time", "status", "latency_s", "first_token_s", "tokens")
        }
        self._subjects: dict[str, int] = {}
        self._first: list[int] = []
        self._crossed: set[int] = set()
        self._rows: dict[str, int] = {}
        self._unsticky = 0

    def add(self, line: dict[str, Any], where: str) -> None:
        """Takes a line.

        Raises:
            DataError: if its settings are others than those of the lines before.
        """
        settings = (line["control"], line["shares"])
        if self._settings is None:
            _refuse_no_shares(settings[1])
            self._settings = settings
            self._places = {name: place for place, name in enumerate(_ordered(*settings))}
        elif settings != self._settings:
            raise DataError(
                f"{where}: the test {self._test!r} was changed while it ran: control and shares are {settings}, before "
                f"they were {self._settings}. Subjects that changed their variant cannot be compared: give a changed "
                "test another name"
            )
        variant = self._places[line["variant"]]
        subject = self._subjects.setdefault(line["subject"], len(self._subjects))
        if subject == len(self._first):
            self._first.append(variant)
        elif self._first[subject] != variant:
            self._crossed.add(subject)
        if line.get("id") is not None:
            self._rows[line["id"]] = len(self._columns["variant"])
        self._unsticky += not line["sticky"]
        values = (
            variant, subject, datetime.fromisoformat(line["time"]).timestamp(), int(line["status"]), line["latency_s"],
            _or_nan(line.get("first_token_s")), _or_nan(line.get("completion_tokens")),
        )  # fmt: skip
        for column, value in zip(self._columns.values(), map(float, values), strict=True):
            column.append(value)

    def exposures(self, files: LogFiles) -> Exposures:
        """All of them."""
        assert self._settings is not None
        whole = {name: np.array(column) for name, column in self._columns.items()}
        for name in ("variant", "subject", "status"):
            whole[name] = whole[name].astype(np.int64)
        return Exposures(
            test=self._test,
            shares=_ordered(*self._settings),
            **whole,
            subject_variant=np.array(self._first, dtype=np.int64),
            rows=self._rows,
            unsticky=self._unsticky,
            crossed=len(self._crossed),
            files=files,
        )


def _refuse_no_shares(shares: dict[str, float]) -> None:
    if min(shares.values()) < 0 or not 0 < sum(shares.values()) < math.inf:
        raise ValueError(f"shares must be positive numbers, not {shares}")


def _ordered(control: str, shares: dict[str, float]) -> dict[str, float]:
    """The shares, the control's first."""
    return {control: shares[control], **{name: share for name, share in sorted(shares.items()) if name != control}}


def _parsed(line: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: is not valid JSON ({error})") from None
    if not isinstance(found, dict):
        raise DataError(f"{where}: expected a JSON object, found {line[:40]!r}")
    return found


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value

"""What people said of the answers of an A/B test: feedback, by the id of the answer that it names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np

from raytune_ft.core.errors import DataError
from raytune_ft.core.storage import Location
from raytune_ft.evaluation.exposures import Bools, Exposures, LogFiles, log_lines
from raytune_ft.evaluation.statistics import Floats

_GOOD: Mapping[Any, float] = {"up": 1.0, "down": 0.0, 5: 1.0, 4: 1.0, 3: math.nan, 2: 0.0, 1: 0.0}
"""3 of 5 is a rating, but neither good nor bad."""


@dataclass(frozen=True)
class Ratings:
    """The last judgement of each request, in columns [requests]."""

    good: Floats
    """1 good, 0 bad (a correction says that the answer was, too), NaN where there is no judgement, or a neutral one."""
    rated: Bools
    """Whether there is any."""
    time: Floats
    """When it came, in seconds since 1970; infinite where there is none."""
    attributed: int
    """Lines of feedback that name an answer of the test."""
    others: int
    """Lines that name none, or an answer outside the test."""
    files: LogFiles | None = None


def read_ratings(path: str | None, exposures: Exposures) -> Ratings:
    """The feedback at `path` on the answers of a test; none where there is no path.

    A pair of a preferred and a rejected answer says of neither that it is good or bad, and does not count.

    Raises:
        DataError: if there is no such folder, or a line is no feedback.
    """
    requests = len(exposures.variant)
    good, when = np.full(requests, np.nan), np.full(requests, np.inf)
    rated = np.zeros(requests, dtype=bool)
    if path is None:
        return Ratings(good, rated, when, 0, 0)
    files = LogFiles(str(Location.at(path)))
    attributed = others = 0
    for line, where in log_lines(path, files, setting="feedback_path"):
        name = line.get("id")
        row = exposures.rows.get(name) if isinstance(name, str) else None
        if row is None or (line.get("rating") is None and not line.get("correction")):
            others += 1
            continue
        attributed += 1
        at, judged = _judged(line, where)
        if not rated[row] or at >= when[row]:
            good[row], when[row], rated[row] = judged, at, True
    return Ratings(good, rated, when, attributed, others, files)


def _judged(line: dict[str, Any], where: str) -> tuple[float, float]:
    """When, and what, a line says."""
    try:
        at = datetime.fromisoformat(line["time"]).timestamp()
        rating = line.get("rating")
        if isinstance(rating, bool):  # as `prepare` takes it; Python would take true for the number 1, the worst rating
            rating = "up" if rating else "down"
        return at, 0.0 if line.get("correction") else _GOOD[rating]
    except (KeyError, TypeError, ValueError):
        raise DataError(
            f"{where}: is no feedback of an endpoint: expected `time`, and `rating` as up, down or 1 to 5"
        ) from None

"""What lies in the folder of a training run, by name; loads nothing that only training needs."""

from __future__ import annotations

import json
from typing import Any

from raytune_ft.core.storage import Location

CHECKPOINTS = "checkpoints"
HISTORY, SUMMARY, DIAGNOSIS, CURVES = "history.jsonl", "summary.json", "diagnosis.json", "curves.svg"
TENSORBOARD = "tensorboard"


def read_history(output: Location) -> list[dict[str, Any]]:
    """The metrics of every step of a finished run."""
    return [json.loads(line) for line in (output / HISTORY).read().decode().splitlines()]


def read_summary(output: Location) -> dict[str, Any]:
    """How a finished run ended (`loop.TrainingSummary`)."""
    return _json(output / SUMMARY)


def read_report(output: Location) -> dict[str, Any]:
    """The diagnosis of a finished run."""
    return _json(output / DIAGNOSIS)


def _json(where: Location) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(where.read())
    return found

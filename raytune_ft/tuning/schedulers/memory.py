"""What a search has decided by, in files that outlive its driver."""

from __future__ import annotations

import json
from typing import Any

from raytune_ft.core.storage import Location

TIME = "global_step"
"""What schedulers call the time."""


def recalled(memory: Location) -> Any:
    """What an earlier driver, or this one, left in a file; None if there is none yet."""
    return json.loads(memory.read()) if memory.exists() else None


def remember(memory: Location, value: Any) -> None:
    """Writes what `recalled` gives back."""
    memory.write(json.dumps(value).encode())


def reached_step(trial: Any) -> int:
    """The step that a trial has reported, as far as Ray Tune's state knows."""
    return int((trial.last_result or {}).get(TIME, 0))

"""Where a trial's state lies: all that Ray Tune keeps of it, a small file in the trial's checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_FILE = "bank.json"


def write_pointer(filesystem: Any, folder: str, snapshot: str | None, step: int) -> None:
    """Writes which state is a step's into a checkpoint's folder; without a snapshot the trial's own run finds its own.

    Args:
        filesystem: pyarrow's.
        folder: in it.
        snapshot: the state, on storage.
        step: of the state.
    """
    filesystem.create_dir(folder, recursive=True)
    with filesystem.open_output_stream(f"{folder}/{_FILE}") as stream:
        stream.write(json.dumps({"snapshot": snapshot, "step": step}).encode())


def read_pointer(folder: str) -> tuple[str | None, int]:
    """The snapshot and the step that a checkpoint's folder, which is here, names."""
    found = json.loads((Path(folder) / _FILE).read_text(encoding="utf-8"))
    return found["snapshot"], found["step"]

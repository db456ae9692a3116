"""Runs of Weights & Biases as the real package writes them where it may not reach its server."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

_HEADER, _BLOCK = 7, 32768


@dataclass
class WandbRun:
    """What was told of a run in one process."""

    key: str
    name: str
    project: str
    settings: dict[str, Any]
    rows: list[dict[str, float]] = field(default_factory=list)
    exit_code: int | None = None


class Offline:
    """W&B without its server: its variables point into a folder, another one for each process that is played."""

    def __init__(self, wandb: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._wandb, self._folder, self._monkeypatch, self._begun = wandb, folder, monkeypatch, 0
        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.setenv("WANDB_SILENT", "true")
        monkeypatch.delenv("WANDB_PROJECT", raising=False)
        self.anew()

    def anew(self) -> None:
        """As if another process began: W&B reads its variables once, and has nothing open."""
        self._wandb.teardown()
        self._begun += 1
        (self._folder / str(self._begun)).mkdir(parents=True)
        self._monkeypatch.setenv("WANDB_DIR", str(self._folder / str(self._begun)))

    def runs(self) -> list[WandbRun]:
        """What every process told of every run, by processes and names of the runs."""
        self._wandb.teardown()  # all is written then
        places = [self._folder / str(number + 1) for number in range(self._begun)]
        return [
            run for place in places for run in sorted(map(_read, place.rglob("run-*.wandb")), key=lambda run: run.name)
        ]


@pytest.fixture
def offline_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Offline]:
    """The real W&B, which writes what it would send into files."""
    wandb = pytest.importorskip("wandb", reason="the extra `trackers` is not installed")
    yield Offline(wandb, tmp_path / "offline", monkeypatch)
    wandb.teardown()


def _read(file: Path) -> WandbRun:
    from wandb.proto import wandb_internal_pb2

    found: WandbRun | None = None
    for data in _records(file.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        if record.HasField("run"):
            settings = {told.key: json.loads(told.value_json) for told in record.run.config.update}
            settings.pop("_wandb", None)
            found = WandbRun(record.run.run_id, record.run.display_name, record.run.project, settings)
        elif found is not None and record.HasField("history"):
            row = {(told.key or told.nested_key[0]): json.loads(told.value_json) for told in record.history.item}
            own = {name: value for name, value in row.items() if not name.startswith("_")}
            found.rows.append({"step": record.history.step.num, **own})
        elif found is not None and record.HasField("exit"):
            found.exit_code = record.exit.exit_code
    assert found is not None
    return found


def _records(data: bytes) -> Iterator[bytes]:
    """Of a log in LevelDB's format, behind a header: checksum, length, kind (1: whole; 2, 3, 4: parts), content."""
    at, parts = _HEADER, b""
    while at + _HEADER <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < _HEADER:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + _HEADER])
        parts += data[at + _HEADER : at + _HEADER + length]
        at += _HEADER + length
        if kind in {1, 4}:
            yield parts
            parts = b""

"""What stands written in an artifact's folder: its claim before the work, its manifest after it, and failures between.

Apart from `artifacts`, which reads and writes folders, because these are plain data with a versioned schema.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from importlib import metadata
from typing import Any, Literal

from pydantic import BaseModel

MANIFEST = "manifest.json"
CLAIM = "started.json"
FAILURES = "failures"
_PACKAGES = ("ray", "torch", "transformers", "peft", "deepspeed", "bitsandbytes", "datasets", "pyarrow")


class ArtifactKind(StrEnum):
    """What a finished folder holds."""

    DATASET = "dataset"
    MODEL = "model"
    SWEEP = "sweep"
    REPORT = "report"
    ANSWERS = "answers"
    ENDPOINT = "endpoint"
    PIPELINE = "pipeline"


class FileEntry(BaseModel, frozen=True, extra="forbid"):
    """Size in bytes and sha256 of one file of an artifact."""

    size: int
    sha256: str


class Parent(BaseModel, frozen=True, extra="forbid"):
    """What an artifact was made from: its role here (``dataset``, ``model``), where it lay, and its digest."""

    role: str
    where: str
    digest: str


class Failure(BaseModel, frozen=True, extra="forbid"):
    """Why an attempt at an artifact stopped."""

    at: str
    error: str
    message: str
    trace: str = ""


class Claim(BaseModel, frozen=True, extra="forbid"):
    """What a folder is going to hold, written before the work starts."""

    schema_version: Literal[1] = 1
    kind: ArtifactKind
    identity: dict[str, Any]
    settings: dict[str, Any]
    parents: list[Parent]
    started_at: str
    attempt: str = ""
    """Which of all attempts to make it: no two claims are alike."""


class Manifest(Claim):
    """What a finished folder holds, and how it came to be."""

    versions: dict[str, str]
    numbers: dict[str, Any]
    files: dict[str, FileEntry]
    failures: list[Failure]
    finished_at: str


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two settings, as ``dotted.key: old -> new``."""
    found: list[str] = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key}: {before!r} -> {after!r}")
    return found


def versions() -> dict[str, str]:
    """Installed versions of what decides a result."""
    found = {"python": platform.python_version(), "raytune-ft": sys.modules["raytune_ft"].__version__}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")

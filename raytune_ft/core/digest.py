"""A short name for a content: in manifests, records and paths alike."""

from __future__ import annotations

import hashlib


def short_hash(text: str) -> str:
    """16 hex digits of the sha256 of `text`."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]

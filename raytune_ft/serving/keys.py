"""API keys: made here, kept as their sha256, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Sequence


def new_key() -> str:
    """A key with 256 random bits; it is shown once and stored nowhere."""
    return f"rt-{secrets.token_urlsafe(32)}"


def hashed(key: str) -> str:
    """What settings hold of a key: the 64 hex digits of its sha256. A key's randomness makes salt needless."""
    return hashlib.sha256(key.encode()).hexdigest()


def admits(authorization: str | None, hashes: Sequence[str]) -> bool:
    """Whether an ``Authorization: Bearer KEY`` header carries one of the keys."""
    return known_by(authorization, hashes) is not None


def known_by(authorization: str | None, hashes: Sequence[str]) -> str | None:
    """The hash of the key that the header carries, if it is one of these; every hash is compared, in full."""
    scheme, _, key = (authorization or "").partition(" ")
    given = hashed(key.strip()) if scheme.lower() == "bearer" else ""
    found = [hmac.compare_digest(given.encode(), known.lower().encode()) for known in hashes]
    return next((known for known, same in zip(hashes, found, strict=True) if same), None)

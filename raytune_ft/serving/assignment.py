"""Which variant of an A/B test a request gets: a pure function of the test and the request's subject."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass

from raytune_ft.serving.config_ab import ABTestConfig


@dataclass(frozen=True)
class Assignment:
    """The variant of a subject, and the subject as logs name it."""

    variant: str
    subject: str
    """16 hex digits that tell nothing of the user's id, and are others in another test."""
    sticky: bool
    """Whether the request named its subject, so that its next one gets the same variant."""


def assign(test: ABTestConfig, subject: str | None) -> Assignment:
    """The variant of a subject; without one, that of a subject drawn for this request alone.

    The subject's HMAC-SHA256 is keyed by the test's name and salt. Its first 64 bits, as a fraction of 2**64, are a
    place between 0 and 1, where the variants, sorted by name, lie side by side with their shares as widths. The next
    64 bits name the subject in the log: who knows these does not know the place.
    """
    key = f"{test.name}\0{test.salt.get_secret_value()}".encode()
    named = (subject or secrets.token_hex(16)).encode("utf-8", "surrogatepass")
    digest = hmac.new(key, named, hashlib.sha256).digest()
    place = int.from_bytes(digest[:8]) / 2**64
    return Assignment(_at(test, place), digest[8:16].hex(), sticky=bool(subject))


def _at(test: ABTestConfig, place: float) -> str:
    names = sorted(test.variants)
    edge = 0.0
    for name in names[:-1]:
        edge += test.variants[name]
        if place < edge:
            return name
    return names[-1]

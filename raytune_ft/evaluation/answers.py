"""How an answer is read: as strict JSON, as fields, or as words."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Hashable
from typing import Any


def parse_json(text: str) -> dict[str, Any] | list[Any] | None:
    """The JSON object or array that `text` is, blanks around it aside; None if it is none.

    Strict: NaN and Infinity, and an object that names a key twice, are not JSON here.
    """
    try:
        value = json.loads(text, object_pairs_hook=_distinct, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict | list) else None


def canonical(value: Any) -> Hashable:
    """A JSON value as something that compares and hashes as JSON means it: 1 is 1.0, but true is not 1."""
    if isinstance(value, dict):
        return "object", frozenset((key, canonical(item)) for key, item in value.items())
    if isinstance(value, list):
        return "array", tuple(canonical(item) for item in value)
    return "true/false" if isinstance(value, bool) else "value", value


def fields(text: str) -> dict[str, Hashable]:
    """Keys and canonical values of the JSON object that `text` is; empty if it is none."""
    parsed = parse_json(text)
    return {key: canonical(value) for key, value in parsed.items()} if isinstance(parsed, dict) else {}


def words(text: str) -> list[str]:
    """Words as SQuAD takes them: lower case, without ASCII punctuation and English articles, split at blanks."""
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")

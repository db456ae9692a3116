"""Numbers with what they count, for messages: ``1 row``, ``2 rows``; apart because every room counts something."""

from __future__ import annotations

from collections.abc import Sequence


def number_of(number: int, one: str, many: str | None = None) -> str:
    """The number with `one` behind it, or with `many`, which by default is `one` with an s."""
    return f"{number} {agreeing(number, one, many or one + 's')}"


def agreeing(number: int, one: str, many: str) -> str:
    """The word that agrees with a number, as *is* and *are* do."""
    return one if number == 1 else many


def more(items: Sequence[str]) -> str:
    """How many of a list were not among the first five that a message names."""
    return f" and {len(items) - 5} more" if len(items) > 5 else ""

"""Words that messages of every room need: numbers with what they count (``1 row``, ``2 rows``), what was meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def number_of(number: int, one: str, many: str | None = None) -> str:
    """The number with `one` behind it, or with `many`, which by default is `one` with an s."""
    return f"{number} {agreeing(number, one, many or one + 's')}"


def agreeing(number: int, one: str, many: str) -> str:
    """The word that agrees with a number, as *is* and *are* do."""
    return one if number == 1 else many


def more(items: Sequence[str]) -> str:
    """How many of a list were not among the first five that a message names."""
    return f" and {len(items) - 5} more" if len(items) > 5 else ""


def meant(name: str, known: Iterable[str], likeness: float = 0.6) -> str:
    """``; did you mean X?``, of the name that is spelt most like an unknown one; empty if none is like it."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=likeness)
    return f"; did you mean {near[0]}?" if near else ""

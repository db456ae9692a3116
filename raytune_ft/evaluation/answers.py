"""How an answer is read: as strict JSON, as fields, or as words."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Hashable
from decimal import Decimal
from fractions import Fraction
from typing import Any

from raytune_ft.core.words import spaced


def parse_json(text: str) -> dict[str, Any] | list[Any] | None:
    """The JSON object or array that `text` is, blanks around it aside; None if it is none.

    Strict: NaN and Infinity, an object that names a key twice, and more than 100 values in one another are not JSON
    here.
    """
    try:
        value = json.loads(text, object_pairs_hook=_distinct, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict | list) and not _is_deeper(value, _DEEPEST) else None


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
    """Words as SQuAD takes them: lower case, without ASCII punctuation and English articles, split at blanks.

    Characters of scripts that write no spaces between words are words of their own.
    """
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", spaced(kept)).split()


_DEEPEST = 100
"""Beyond, Python's own stack would end the comparison of values."""


def _is_deeper(value: Any, most: int) -> bool:
    level = [value]
    for _ in range(most):
        level = [
            item
            for outer in level
            if isinstance(outer, dict | list)
            for item in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return bool(level)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def extracted(text: str, how: str) -> str | None:
    """The answer within a text; None where there is none.

    Args:
        text: what a model or a reference says.
        how: ``gsm8k`` (the first number behind ``####``; Cobbe et al., 2021), ``last_number``, ``boxed`` (what the last
            ``\\boxed{}`` holds; Hendrycks et al., 2021), or a regular expression with one group, whose first match
            counts.
    """
    if how == "last_number":
        return next(iter(reversed(re.findall(_NUMBER, text))), None)
    if how == "boxed":
        return _boxed(text)
    found = re.search(r"####[\s*_]*(" + _NUMBER + ")" if how == "gsm8k" else how, text)
    return found.group(1) if found and found.group(1) is not None else None


def same_answer(one: str, other: str) -> bool:
    """Whether two extracted answers are equal: as numbers where both are (``$1,000.00`` is ``1000``), else as text."""
    numbers = _number(one), _number(other)
    return numbers[0] == numbers[1] if None not in numbers else one.strip() == other.strip()


def listed(text: str) -> list[Hashable]:
    """The items of a list, canonical and without repetition: of a JSON array, else of lines, or of what commas part."""
    parsed = parse_json(text)
    if isinstance(parsed, list):
        return list(dict.fromkeys(i.strip().lower() if isinstance(i, str) else canonical(i) for i in parsed))
    parts = text.strip().splitlines() if "\n" in text.strip() else re.split(r"[,;]", text)
    items = (re.sub(r"^\s*(?:[-*•]|\d+[.)])\s+", "", part).strip().lower() for part in parts)
    return list(dict.fromkeys(item for item in items if item))


def repeated_share(text: str) -> float:
    """Share of a text's runs of four words that stood in it before; 0 where it has none (Welleck et al., 2020)."""
    said = text.split()
    grams = list(zip(said, said[1:], said[2:], said[3:], strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


_MINUS = r"(?<!\d)[-\u2212]"
_CURRENCY = r"[$€£¥][ \t]?"
_NUMBER = (
    rf"(?:{_CURRENCY}{_MINUS}|(?:{_MINUS})?{_CURRENCY}|{_MINUS})?"
    r"(?:\d+(?:,\d+)*(?:\.\d+)?|(?<![\w.])\.\d+)(?:[eE][-+]?\d+)?(?:[/:]\d+(?:\.\d+)?)*"
)
"""With what belongs to it: a fraction, a time or a list without blanks is taken whole.

A minus behind a digit is a dash or an operator, and a point behind a letter, digit or point ends something else."""


_GROUPED = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d{1,2}(?:,\d{2})+,\d{3})(?:\.\d*)?(?:[eE][-+]?\d+)?")
"""Digits in groups of three, or as India groups them."""


def _number(text: str) -> Decimal | Fraction | None:
    bare = re.sub(r"[$€£¥\s]", "", text).replace("\u2212", "-").rstrip(".,")
    if "," in bare and not _GROUPED.fullmatch(bare):
        return None  # a list, not the digits of one number
    above, slash, below = bare.replace(",", "").partition("/")
    try:
        found = Decimal(above)
        if not found.is_finite():
            return None
        return Fraction(int(above), int(below)) if slash else found
    except (ArithmeticError, ValueError):
        return None


def _boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    begin = place = start + len("\\boxed{")
    depth = 1
    while place < len(text) and depth:
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        place += 1
    return text[begin : place - 1] if depth == 0 else None

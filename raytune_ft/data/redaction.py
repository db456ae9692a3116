"""Personal data and keys in texts, replaced by placeholders: found by form, and by check digits where there are any.

What has a check (card numbers: Luhn, ISO/IEC 7812; IBAN: ISO 13616, mod 97 and the length of its country) is replaced
only if it passes, so that ordinary long numbers stay. Phone numbers need a country code or the usual American
grouping: a bare run of digits may be anything.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from typing import Any

from raytune_ft.data.config import PersonalData
from raytune_ft.data.json_text import is_json, loads

_KEY_FORMS = (
    r"sk-ant-[\w-]{20,}",  # Anthropic
    r"sk-(?:proj-|svcacct-|admin-)?(?=[\w-]*\d)[\w-]{20,}",  # OpenAI and those who follow it
    r"hf_[A-Za-z0-9]{30,}",  # Hugging Face
    r"gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{22,}",  # GitHub
    r"glpat-[\w-]{20,}",  # GitLab
    r"(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Z0-9])",  # Amazon
    r"AIza[\w-]{35}",  # Google
    r"xox[abeoprs]-[\w-]{10,}",  # Slack
    r"(?:sk|rk|pk)_(?:live|test)_[A-Za-z0-9]{16,}",  # Stripe
    r"SG\.[\w-]{22}\.[\w-]{43}",  # SendGrid
    r"npm_[A-Za-z0-9]{36}",
    r"pypi-[\w-]{50,}",
    r"eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}",  # JSON web tokens
)
_KEY = re.compile(
    r"-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----.*?(?:-----END (?:[A-Z]+ )?PRIVATE KEY-----|\Z)"
    r"|(?<![\w-])(?:" + "|".join(_KEY_FORMS) + ")",
    re.DOTALL,
)
_EMAIL = re.compile(
    r"(?<![\w.+-])[\w.%+'-]{1,64}@(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.){1,8}"
    r"(?!(?:png|jpe?g|gif|svg|webp|css|js|py)\b)[^\W\d_]{2,24}\b(?!:[\w/])"
)
_CARD = re.compile(
    r"(?<![\d.+-])(?<!\b0,)"  # a comma may part cells of a table; 0,4111... is a fraction
    r"(?:\d{4}([ -]?)\d{4}\1\d{4}\1\d{1,7}|\d{4}([ -])\d{6}\2\d{4,5}|\d{14,19})(?![\d-]|\.\d)"
)
_CARD_STARTS = re.compile(
    r"4(?:\d{15}|\d{18})$|(?=\d{16}$)(?:5[1-5]|222[1-9]|22[3-9]|2[3-6]|27[01]|2720)\d+$|3[47]\d{13}$"
    r"|(?:6011|65|64[4-9])\d{12,}$|3(?:0[0-5]|[68])\d{11,}$|35\d{14}$|62\d{14,17}$|(?:50|5[6-9]|6\d)\d{14,17}$"
)
_PHONE = re.compile(
    r"(?<![\w+./-])\+[1-9]\d{0,2}(?:[ .-]?\(0?\d{1,4}\))?(?:[ .-]?\d{2,5}){2,5}(?![\w-]|[.,]\d)"
    r"|(?<![\w+./-])\+[2-9]\d{1,2}[ .-]\d(?:[ .-]?\d{2,5}){2,5}(?![\w-]|[.,]\d)"  # an area code of one digit
    r"|(?<![\w+.,/-])(?:1[ .-])?(?:\([2-9]\d{2}\) ?[2-9]\d{2}[ .-]|[2-9]\d{2}[.-][2-9]\d{2}[.-])\d{4}(?![\w-]|[.,]\d)"
)
_IBAN = re.compile(r"(?<![A-Za-z0-9])([A-Z]{2})(\d{2})((?: ?[A-Z0-9]){11,30})")
_IBAN_LENGTHS = {
    "AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22, "BR": 29, "BY": 28,
    "CH": 21, "CR": 22, "CY": 28, "CZ": 24, "DE": 22, "DK": 18, "DO": 28, "EE": 20, "EG": 29, "ES": 24, "FI": 18,
    "FO": 18, "FR": 27, "GB": 22, "GE": 22, "GI": 23, "GL": 18, "GR": 27, "GT": 28, "HR": 21, "HU": 28, "IE": 22,
    "IL": 23, "IQ": 23, "IS": 26, "IT": 27, "JO": 30, "KW": 30, "KZ": 20, "LB": 28, "LC": 32, "LI": 21, "LT": 20,
    "LU": 20, "LV": 21, "LY": 25, "MC": 27, "MD": 24, "ME": 22, "MK": 19, "MR": 27, "MT": 31, "MU": 30, "NL": 18,
    "NO": 15, "PK": 24, "PL": 28, "PS": 29, "PT": 25, "QA": 29, "RO": 24, "RS": 22, "SA": 24, "SC": 31, "SE": 24,
    "SI": 19, "SK": 24, "SM": 27, "ST": 25, "SV": 28, "TL": 23, "TN": 24, "TR": 26, "UA": 29, "VA": 22, "VG": 24,
    "XK": 20,
}  # fmt: skip
_PHONE_DIGITS = range(8, 16)  # E.164 allows at most 15
_LEAST_NUMBER = 10**12  # JSON numbers below have too few digits for a card
_JSON_LITERAL = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|(?<![\d.eE+-])\d{13,}(?![\d.eE])')
"""A text, or a whole number of as many digits as a card has, in what is known to be JSON."""


def redact(text: str, kinds: Iterable[PersonalData]) -> tuple[str, Counter[str]]:
    """The text with what was found of `kinds` replaced by ``[EMAIL]``, ``[PHONE]`` and so on, and how many of each."""
    found: Counter[str] = Counter()
    wanted = set(kinds)
    for kind, replace in _STEPS:
        if kind in wanted:
            text, count = replace(text, f"[{kind.upper()}]")
            if count:
                found[kind] += count
    return text, found


def redact_text(text: str, kinds: Iterable[PersonalData], found: Counter[str]) -> str:
    """A text redacted; counts are added to `found`.

    Where it is JSON (an answer, a call's arguments, a source's line), each text in it, keys too, is redacted by what it
    says, and so are numbers that are card numbers: it stays JSON, and what is not redacted stays as it is written.
    """
    if not is_json(text):
        text, here = redact(text, kinds)
        found.update(here)
        return text

    def one(match: re.Match[str]) -> str:
        literal = match[0]
        value = loads(literal) if literal.startswith('"') else int(literal)
        redacted = redact_value(value, kinds, found)
        return literal if redacted == value else json.dumps(redacted, ensure_ascii=False)

    return _JSON_LITERAL.sub(one, text)


def redact_value(value: Any, kinds: Iterable[PersonalData], found: Counter[str]) -> Any:
    """A JSON value with all its texts, keys, and numbers that are card numbers redacted; counts go to `found`.

    Of keys that become the same all are kept, numbered.
    """
    if isinstance(value, str):
        return redact_text(value, kinds, found)
    if isinstance(value, dict):
        redacted: dict[str, Any] = {}
        for key, item in value.items():
            redacted[_unused(redact_text(key, kinds, found), redacted)] = redact_value(item, kinds, found)
        return redacted
    if isinstance(value, list):
        return [redact_value(item, kinds, found) for item in value]
    if isinstance(value, int) and value >= _LEAST_NUMBER:
        text, here = redact(str(value), kinds)
        found.update(here)
        return text if here else value
    return value


def _unused(key: str, taken: Collection[str]) -> str:
    numbered = (f"{key} ({number})" for number in itertools.count(2))
    return key if key not in taken else next(name for name in numbered if name not in taken)


def passes_luhn(digits: str) -> bool:
    """Whether the last digit checks the others by Luhn's formula."""
    doubled = (sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (sum(map(int, digits[-1::-2])) + sum(doubled)) % 10 == 0


def passes_iban(iban: str) -> bool:
    """Whether an IBAN without blanks has its country's length and the right check digits."""
    if len(iban) != _IBAN_LENGTHS.get(iban[:2]):
        return False
    return int("".join(str(int(sign, 36)) for sign in iban[4:] + iban[:4])) % 97 == 1


def _by_pattern(pattern: re.Pattern[str], needs: str = "") -> Callable[[str, str], tuple[str, int]]:
    def replace(text: str, placeholder: str) -> tuple[str, int]:
        return pattern.subn(placeholder, text) if needs in text else (text, 0)

    return replace


def _checked(pattern: re.Pattern[str], part: Callable[[re.Match[str]], int]) -> Callable[[str, str], tuple[str, int]]:
    """Replaces of each match as many characters as `part` says are meant (0: it only looks like it)."""

    def replace(text: str, placeholder: str) -> tuple[str, int]:
        count = 0

        def one(match: re.Match[str]) -> str:
            nonlocal count
            length = part(match)
            count += bool(length)
            return placeholder + match[0][length:] if length else match[0]

        before = -1
        while count > before:  # what stands behind a replaced part is looked at again
            before = count
            text = pattern.sub(one, text)
        return text, count

    return replace


def _card(match: re.Match[str]) -> int:
    digits = re.sub(r"\D", "", match[0])
    meant = _CARD_STARTS.match(digits) and len(set(digits)) > 1 and passes_luhn(digits)
    return len(match[0]) if meant else 0


def _phone(match: re.Match[str]) -> int:
    digits = sum(map(str.isdigit, match[0]))
    grouped = len(re.findall(r"\d+", match[0])) > 1 or digits >= 10
    return len(match[0]) if digits in _PHONE_DIGITS and grouped else 0


def _iban(match: re.Match[str]) -> int:
    """The match may run into the next word, so only as many signs count as the country's IBAN have."""
    wanted = _IBAN_LENGTHS.get(match[1], 0)
    seen = 0
    for place, sign in enumerate(match[0]):
        seen += sign != " "
        if seen == wanted:
            rest = match.string[match.start() + place + 1 :][:1]
            return place + 1 if not rest.isalnum() and passes_iban(match[0][: place + 1].replace(" ", "")) else 0
    return 0


_STEPS: tuple[tuple[PersonalData, Callable[[str, str], tuple[str, int]]], ...] = (
    (PersonalData.API_KEY, _by_pattern(_KEY)),
    (PersonalData.EMAIL, _by_pattern(_EMAIL, "@")),
    (PersonalData.IBAN, _checked(_IBAN, _iban)),
    (PersonalData.CARD, _checked(_CARD, _card)),
    (PersonalData.PHONE, _checked(_PHONE, _phone)),
)
"""In this order: a key may hold what looks like a number, an IBAN what looks like a card."""

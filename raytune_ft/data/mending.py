"""Mending of texts: encoding, control characters, blanks and capitals; each step a function of a text alone."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

_LINE_BREAKS = re.compile(r"\r\n|[\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")
"""What `str.splitlines` takes for the end of a line."""
_CONTROLS = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x08\x0e-\x1f\x7f-\x9f\ufeff]")
_BLANKS = re.compile(r"[ \t\u00a0]{2}|[\t\u00a0]|[ \t]\n|\n\n\n")
_INNER_BLANKS = re.compile(r"(?<=[^\s])[ \t\u00a0]+(?=[^\s])")
_LINE_ENDS = re.compile(r"[ \t\u00a0]+(?=\n|\Z)")
_EMPTY_LINES = re.compile(r"\n{3,}")
_FENCES = re.compile(r"(```.*?(?:```|\Z))", re.DOTALL)
_LINE = re.compile(r"[^\n]+")
_CAPITAL_WORDS = re.compile(r"[^\W\d_]{2,}")
_LEAST_CAPITAL_WORDS = 4
_CODE = re.compile(r"[{}<>=_;|\\`*]")
_SENTENCE_STARTS = re.compile(r"\A\W*\w|[.!?]\s+\w|\bi\b(?=[ ',])")


def fix_encoding(text: str) -> str:
    """Text with mojibake repaired and Unicode in NFC (ftfy); quotes, width and HTML entities stay as they are."""
    return text if text.isascii() else _ftfy()(text)


@functools.cache
def _ftfy() -> Callable[[str], str]:
    import ftfy

    config = ftfy.TextFixerConfig(
        unescape_html=False,
        uncurl_quotes=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        fix_line_breaks=False,
        remove_control_chars=False,
        remove_terminal_escapes=False,
        explain=False,
    )
    return functools.partial(ftfy.fix_text, config=config)


def remove_control_characters(text: str) -> str:
    """Text without control characters and terminal escapes; every kind of line end becomes a newline, tabs stay."""
    return _CONTROLS.sub("", _LINE_BREAKS.sub("\n", text))


def normalize_whitespace(text: str) -> str:
    """Text with one blank for several inside a line, and one empty line for several.

    Blanks that indent a line stay, and so does code between fences.
    """
    return _outside_fences(text, _one_blank) if _BLANKS.search(text) else text


def _one_blank(text: str) -> str:
    return _EMPTY_LINES.sub("\n\n", _LINE_ENDS.sub("", _INNER_BLANKS.sub(" ", text)))


def normalize_capitalization(text: str) -> str:
    """Text whose lines that are all in capitals are in sentence case: four words or more, and no code."""
    return _outside_fences(text, lambda part: _LINE.sub(_sentence_case, part))


def _sentence_case(match: re.Match[str]) -> str:
    line = match[0]
    if len(_CAPITAL_WORDS.findall(line)) < _LEAST_CAPITAL_WORDS or not line.isupper() or _CODE.search(line):
        return line
    return _SENTENCE_STARTS.sub(lambda start: start[0].upper(), line.lower())


def _outside_fences(text: str, change: Callable[[str], str]) -> str:
    parts = _FENCES.split(text)
    return "".join(part if place % 2 else change(part) for place, part in enumerate(parts))


STEPS: dict[str, Callable[[str], str]] = {
    "fix_encoding": fix_encoding,
    "remove_control_characters": remove_control_characters,
    "strip_whitespace": str.strip,
    "normalize_whitespace": normalize_whitespace,
    "normalize_capitalization": normalize_capitalization,
}
"""Settings and what they do to a text, in order."""

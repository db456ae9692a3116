"""Which characters are words of their own: those of the scripts that write no spaces between words."""

from __future__ import annotations

import re
import unicodedata

UNSPACED_SCRIPTS = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
"""These scripts as Arrow's regular expressions (RE2) name them, for a class of characters."""
# The same characters for Python, whose regular expressions know no scripts.
_RANGES = """
E01-E3A E40-E5B E81-E82 E84 E86-E8A E8C-EA3 EA5 EA7-EBD EC0-EC4 EC6 EC8-ECE ED0-ED9 EDC-EDF 1000-109F
1780-17DD 17E0-17E9 17F0-17F9 19E0-19FF 2E80-2E99 2E9B-2EF3 2F00-2FD5 3005 3007 3021-3029 3038-303B
3041-3096 309D-309F 30A1-30FA 30FD-30FF 31F0-31FF 32D0-32FE 3300-3357 3400-4DBF 4E00-9FFF A9E0-A9FE
AA60-AA7F F900-FA6D FA70-FAD9 FF66-FF6F FF71-FF9D 16FE2-16FE3 16FF0-16FF1 1AFF0-1AFF3 1AFF5-1AFFB
1AFFD-1AFFE 1B000-1B122 1B132 1B150-1B152 1B155 1B164-1B167 1F200 20000-2A6DF 2A700-2B739 2B740-2B81D
2B820-2CEA1 2CEB0-2EBE0 2EBF0-2EE5D 2F800-2FA1D 30000-3134A 31350-323AF
"""


def _character_class(ranges: str) -> str:
    ends = (part.partition("-") for part in ranges.split())
    return "".join(f"{chr(int(first, 16))}-{chr(int(last or first, 16))}" for first, _, last in ends)


_UNSPACED = _character_class(_RANGES)
_ONE = re.compile(f"([{_UNSPACED}])")
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation; each character of an unspaced script is one."""
    return _WORD.findall(text.lower())


def plain(text: str) -> str:
    """The text without what no reader minds: in one case and width (NFKC, casefolded), one blank between words."""
    folded = text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.split())


def whole(text: str) -> str:
    """The text with ``?`` for each half character: JSON can escape half a surrogate pair, which no file or tokenizer
    can hold."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def spaced(text: str) -> str:
    """The text with blanks around each character of an unspaced script."""
    return text if text.isascii() else _ONE.sub(r" \1 ", text)


def unspaced_share(text: str) -> float:
    """Share of a text's letters and digits that belong to unspaced scripts; 0 for a text without any."""
    letters = [character for character in text if character.isalnum()]
    return sum(_ONE.match(character) is not None for character in letters) / len(letters) if letters else 0.0

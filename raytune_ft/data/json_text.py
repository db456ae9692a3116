"""JSON as it lies in files: one value from a text, and the items of a list of any length, a few at a time in memory.

Stricter than Python's own parser where that would lose something without a word: a key that an object has twice and
a value nested more than `MOST_LEVELS` deep are faults; so is a number of more digits than Python reads.
"""

from __future__ import annotations

import codecs
import json
import sys
from collections.abc import Callable, Iterator
from json import JSONDecodeError
from typing import Any

from raytune_ft.core.words import whole

MOST_LEVELS = 200
_CHUNK = 1 << 20
_TAIL = 16  # a value cut at the end of what was read fails at most this many characters before it
_BLANK = " \t\n\r"
_OF_NUMBERS = "+-.0123456789eE"


class JsonFault(ValueError):  # noqa: N818 - a finding about a text, turned into a reason or an error by policy
    """Why a text is no JSON that can be used; `line` counts from 1, `text` is the item's, where they are known."""

    def __init__(self, message: str, line: int | None = None, text: str | None = None) -> None:
        super().__init__(message)
        self.line = line
        self.text = text


class _RepeatedKey(Exception):  # noqa: N818 - leaves the parser from inside a hook
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        repeated = sorted({name for name in names if names.count(name) > 1})
        raise _RepeatedKey(", ".join(map(repr, repeated)))
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def parse(text: str) -> Any:
    """The one JSON value in `text`; half surrogate pairs, which JSON may escape but no text may hold, become ``?``.

    Raises:
        JsonFault: if it is malformed, has a key twice in one object, is nested more than `MOST_LEVELS` deep, or has a
            whole number of more than 4,300 digits.
    """
    try:
        value, end = _DECODER.raw_decode(text, _past_blanks(text, 0))
    except JSONDecodeError as error:
        raise JsonFault(f"malformed JSON: {error.msg}: character {error.pos + 1}") from None
    except (_RepeatedKey, RecursionError, ValueError) as error:
        raise _refused(error) from None
    rest = _past_blanks(text, end)
    if rest != len(text):
        raise JsonFault(f"malformed JSON: more follows the value: character {rest + 1}")
    return _checked(value, text, 0, len(text))


def loads(text: str) -> Any:
    """As `json.loads`, for JSON that stands in texts of rows and stays as it is there: only half surrogate pairs
    become ``?``."""
    return _whole_texts(json.loads(text), text, 0, len(text))


def is_json(text: str) -> bool:
    """Whether a text is a JSON object or list."""
    if not text.lstrip().startswith(("{", "[")):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def list_items(read: Callable[[int], bytes]) -> Iterator[tuple[int, Any]]:
    """Line (from 1) and value of every item of the JSON list that a stream of bytes holds.

    In memory are one item and what was read with it. A well-formed item that `parse` would refuse is given as the
    `JsonFault` that says why; those after it follow.

    Raises:
        JsonFault: with the line, if the stream is no list, is cut short, is malformed or is not UTF-8.
    """
    text = _Window(read)
    found = text.peek()
    if found != "[":
        raise _no_list(text, found)
    text.skip(1)
    if text.peek() == "]":
        text.skip(1)
    else:
        yield from _items(text)
    if text.peek():
        raise JsonFault("malformed JSON: more follows the list", text.line)


def _items(text: _Window) -> Iterator[tuple[int, Any]]:
    while True:
        text.peek()
        line = text.line
        yield line, text.value()
        sign = text.peek()
        if sign not in {",", "]"}:
            what = "the list is cut short" if not sign else f"expected ',' or ']' after an item, found {sign!r}"
            raise JsonFault(f"malformed JSON: {what}", text.line)
        text.skip(1)
        if sign == "]":
            return
        if text.peek() == "]":
            raise JsonFault("malformed JSON: a comma before the end of the list", text.line)


def _no_list(text: _Window, found: str) -> JsonFault:
    if not found:
        return JsonFault("holds no rows: there is nothing in it")
    value = text.value()
    if isinstance(value, JsonFault):
        value = {}  # a fault inside the only object: what counts here is that it is none but an object
    if text.peek():
        return JsonFault(
            "more follows the first JSON value; if it has a record a line, name the file .jsonl", text.line
        )
    return JsonFault(f"expected a JSON list of records, found {kind_in_words(value)}")


class _Window:
    """The part of a text between what was used and what was read."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text = ""
        self._place = 0
        self._bytes = 0
        self._ended = False
        self.line = 1

    def peek(self) -> str:
        """The next character that is no blank, which stays; empty at the end."""
        while True:
            place = _past_blanks(self._text, self._place)
            self._advance(place)
            if place < len(self._text):
                return self._text[place]
            if self._ended:
                return ""
            self._more(_CHUNK)

    def skip(self, count: int) -> None:
        self._advance(self._place + count)

    def value(self) -> Any:
        """The next value, or the `JsonFault` of a whole one that cannot be used."""
        size = _CHUNK
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._place)
            except JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - _TAIL
                if self._ended or not cut:
                    line = self.line + self._text.count("\n", self._place, error.pos)
                    raise JsonFault(f"malformed JSON: {error.msg}", line) from None
            except (_RepeatedKey, RecursionError, ValueError) as error:
                return self._unusable(error)
            else:
                if end < len(self._text) or self._ended:  # else a number may go on
                    value = _checked_or_fault(value, self._text, self._place, end)
                    self._advance(end)
                    return value
            self._more(size)
            size *= 2

    def _unusable(self, error: Exception) -> JsonFault:
        """Passes over the value here, which the strict parser refused."""
        while (end := _end_of_value(self._text, self._place)) is None:
            if self._ended:
                raise JsonFault("malformed JSON: the list is cut short", self.line)
            self._more(_CHUNK)
        fault = _refused(error, self._text[self._place : end])
        self._advance(end)
        return fault

    def _advance(self, place: int) -> None:
        self.line += self._text.count("\n", self._place, place)
        self._place = place

    def _more(self, size: int) -> None:
        data = self._read(size)
        self._ended = not data
        try:
            decoded = self._decoder.decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            line = self.line + self._text.count("\n", self._place) + error.object[: error.start].count(b"\n")
            raise JsonFault(f"not UTF-8: byte 0x{error.object[error.start]:02x}", line) from None
        self._text = self._text[self._place :] + decoded
        self._place = 0


def _end_of_value(text: str, place: int) -> int | None:
    """Where the object or list (told by its brackets) or number that starts at `place` ends; None if it goes on."""
    if text[place] not in "[{":
        end = len(text) - len(text[place:].lstrip(_OF_NUMBERS))
        return end if end < len(text) else None
    depth, quoted, escaped = 0, False, False
    for at in range(place, len(text)):
        sign = text[at]
        if quoted:
            quoted = escaped or sign != '"'
            escaped = sign == "\\" and not escaped
        elif sign == '"':
            quoted = True
        elif sign in "[{":
            depth += 1
        elif sign in "]}":
            depth -= 1
            if not depth:
                return at + 1
    return None


def _past_blanks(text: str, place: int) -> int:
    while place < len(text) and text[place] in _BLANK:
        place += 1
    return place


def _checked_or_fault(value: Any, text: str, start: int, end: int) -> Any:
    try:
        return _checked(value, text, start, end)
    except JsonFault as fault:
        fault.text = text[start:end]
        return fault


def _checked(value: Any, text: str, start: int, end: int) -> Any:
    if text.count("[", start, end) + text.count("{", start, end) > MOST_LEVELS and _levels(value) > MOST_LEVELS:
        raise _refused(RecursionError())
    return _whole_texts(value, text, start, end)


def _whole_texts(value: Any, text: str, start: int, end: int) -> Any:
    escapes = text.find("\\ud", start, end) >= 0 or text.find("\\uD", start, end) >= 0
    return _mended(value) if escapes else value


def _refused(error: Exception, text: str | None = None) -> JsonFault:
    if isinstance(error, RecursionError):
        return JsonFault(f"nested too deep: more than {MOST_LEVELS} levels", text=text)
    if isinstance(error, ValueError):  # of int(), which has a limit
        return JsonFault(f"number too long: more than {sys.get_int_max_str_digits():,} digits", text=text)
    return JsonFault(f"repeated key: {error} stands more than once in an object", text=text)


def _levels(value: Any) -> int:
    deepest, waiting = 0, [(value, 1)]
    while waiting:
        item, level = waiting.pop()
        if isinstance(item, dict | list):
            deepest = max(deepest, level)
            waiting += [(inner, level + 1) for inner in (item.values() if isinstance(item, dict) else item)]
    return deepest


def _mended(value: Any) -> Any:
    if isinstance(value, str):
        return whole(value)
    if isinstance(value, list):
        return [_mended(item) for item in value]
    if isinstance(value, dict):
        return {_mended(key): _mended(item) for key, item in value.items()}
    return value


def kind_in_words(value: Any) -> str:
    """What a JSON value is, for messages."""
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true/false", int: "a number", float: "a number"}
    return kinds.get(type(value), "null")

"""Tokens to text while they come: never half a character, and never the beginning of a stop text."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

_CONTEXT = 6
"""Tokens before the next one that its text may depend on (a leading space, the bytes of one character)."""


class TextStream:
    """The text of one answer, token by token; `text` is what may be shown so far.

    Special tokens are left out. The text in front of a stop text is all that is ever shown. With `whole`, nothing is
    shown before the end, which saves the work (stop texts are looked for all the same).
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = (), *, whole: bool = False) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._lazy = whole and not stops
        self._ids: list[int] = []
        self._settled = 0  # tokens whose text is decided
        self._bounds: deque[int] = deque()  # where tokens with text begin, the newest last; none cuts a character
        self._decoded = ""  # the text of those, stop texts included
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """What can be shown since the last token; empty while a character or a stop text is incomplete."""
        self._ids.append(token)
        if self._lazy:
            return ""
        start = self._bounds[0] if self._bounds else 0
        before, after = self._decode(self._ids[start : self._settled]), self._decode(self._ids[start:])
        if after.endswith("\ufffd"):
            self._leave_out(token)
            return ""
        # Bytes that make no character can turn those before them into such, too, which have been shown by then.
        new = after[len(before) :] if after.startswith(before) else self._decode(self._ids[self._settled :])
        if not new and self._leave_out(token):
            return ""
        if new:
            self._bounds.append(self._settled)
        self._decoded += new
        self._settled = len(self._ids)
        while len(self._bounds) > 1 and self._bounds[1] <= self._settled - _CONTEXT:
            self._bounds.popleft()
        return self._show(self._decoded, hold=True)

    def _leave_out(self, token: int) -> bool:
        """Takes the last token away again if decoding skips it: a long run of such would be read anew for each."""
        if self._decode([token]) or not self._tokenizer.decode([token]):
            return False
        self._ids.pop()
        return True

    def finish(self) -> str:
        """What was held back; to be called once, when no more tokens come."""
        if self.stopped:
            return ""
        whole = self._decode(self._ids)
        return self._show(whole if whole.startswith(self.text) else self._decoded, hold=False)

    def _show(self, decoded: str, *, hold: bool) -> str:
        shown = len(self.text)
        found = [place for place in (decoded.find(stop) for stop in self._stops) if place >= 0]
        if found:
            self.stopped = True
            end = min(found)
        else:
            end = len(decoded) - (max((_overlap(decoded, stop) for stop in self._stops), default=0) if hold else 0)
        new = decoded[shown : max(end, shown)]
        self.text += new
        return new

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)

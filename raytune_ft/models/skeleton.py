"""What a chat template writes around the texts of a conversation, worked out once for each order of roles.

A template is a program, but most only write the texts of the turns, stripped or not. Such a template is run on texts
that record what is done with them; its result for every conversation of the same roles follows without running it
again, and so do the places of the turns. A template that looks into a text (searches, splits, compares it) is found
out by the recording texts and has no skeleton.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raytune_ft.models.templates import compiled, render

_OPEN, _CLOSE, _POISON = "\ue000", "\ue001", "\ue002"
_MARK = re.compile(f"{_OPEN}(\\d+):(l?)(r?){_CLOSE}")
_OPAQUE_FILTERS = frozenset(
    {"trim", "tojson", "default", "d", "string", "safe", "length", "count", "first", "last", "list", "items"}
    | {"selectattr", "rejectattr"}
)
_OPAQUE_METHODS = frozenset({"strip", "lstrip", "rstrip", "get", "items", "keys", "values", "append"})


class LooksInsideError(Exception):
    """A template did something with a text that depends on what the text says."""


class _Opaque(str):
    """A text that can be written, joined, stripped and tested for presence, and nothing else."""

    marked: str

    def __new__(cls, marked: str) -> _Opaque:
        made = super().__new__(cls, _POISON)  # what C code sees that goes round the methods below
        made.marked = marked
        return made

    def __str__(self) -> str:
        return self.marked

    def __bool__(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        if isinstance(other, str) and (isinstance(other, _Opaque) or other):
            raise LooksInsideError
        return False  # it is not empty, and not something else than a text

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        raise LooksInsideError

    def __add__(self, other: str) -> _Opaque:
        return _Opaque(self.marked + str(other))

    def __radd__(self, other: str) -> _Opaque:
        return _Opaque(str(other) + self.marked)

    def lstrip(self, chars: str | None = None) -> _Opaque:
        return _Opaque(_refuse_chars(chars) or re.sub(f"^{_OPEN}(\\d+):l?", f"{_OPEN}\\1:l", self.marked.lstrip()))

    def rstrip(self, chars: str | None = None) -> _Opaque:
        return _Opaque(_refuse_chars(chars) or re.sub(f"r?{_CLOSE}$", f"r{_CLOSE}", self.marked.rstrip()))

    def strip(self, chars: str | None = None) -> _Opaque:
        return self.lstrip(chars).rstrip(chars)


def _refuse_chars(chars: str | None) -> str:
    if chars is not None:
        raise LooksInsideError
    return ""


def _look(*_: Any, **__: Any) -> Any:
    raise LooksInsideError


_COMPARISONS = {"__lt__", "__le__", "__gt__", "__ge__", "__format__"}  # object has these, too
for _name in ((set(dir(str)) - set(dir(object))) | _COMPARISONS | {"__rmod__"}) - set(vars(_Opaque)):
    setattr(_Opaque, _name, _look)


@dataclass(frozen=True)
class Place:
    """A position in a text: `offset` characters into constant piece `piece`."""

    piece: int
    offset: int


@dataclass(frozen=True)
class TurnPlaces:
    """Where an assistant turn starts (behind the generation prompt), which slot its content fills, where it ends."""

    turn: int
    start: Place
    slot: int
    end: Place


@dataclass(frozen=True)
class Skeleton:
    """Constant pieces with slots between them; slot k stands behind piece k and holds a turn's text.

    `slots` has the number of the turn, and whether the text is stripped on the left and on the right.
    """

    pieces: tuple[str, ...]
    slots: tuple[tuple[int, bool, bool], ...]
    turns: tuple[TurnPlaces, ...]

    def fill(self, contents: Sequence[str]) -> tuple[str, list[int]]:
        """The text with `contents` (of all turns) in the slots, and where each piece begins in it."""
        parts, starts, at = [self.pieces[0]], [0], len(self.pieces[0])
        for (turn, left, right), piece in zip(self.slots, self.pieces[1:], strict=True):
            content = contents[turn]
            if left:
                content = content.lstrip()
            if right:
                content = content.rstrip()
            at += len(content)
            starts.append(at)
            at += len(piece)
            parts += (content, piece)
        return "".join(parts), starts


def skeleton_of(
    template: str, roles: Sequence[str], filled: Sequence[bool], special_tokens: Mapping[str, str]
) -> Skeleton | None:
    """The skeleton of conversations with these roles, or None if the template's output depends on what texts say.

    Args:
        template: the Jinja text.
        roles: role of each turn.
        filled: whether the turn's text has more than whitespace in it (else it is empty).
        special_tokens: what the template may name.
    """
    if not _is_traceable(template):
        return None
    turns = [
        {"role": role, "content": _Opaque(f"{_OPEN}{n}:{_CLOSE}") if full else ""}
        for n, (role, full) in enumerate(zip(roles, filled, strict=True))
    ]

    def run(upto: int, prompting: bool) -> str:
        return render(template, turns[:upto], add_generation_prompt=prompting, special_tokens=special_tokens)

    try:
        whole = run(len(turns), False)
        borders = [(n, run(n, True), run(n + 1, False)) for n, role in enumerate(roles) if role == "assistant"]
    except Exception:  # noqa: BLE001 - it looks inside, or refuses: rendering row by row says which
        return None
    if _POISON in whole or not all(whole.startswith(until) for _, *prefixes in borders for until in prefixes):
        return None
    split = _MARK.split(whole)
    marks = zip(split[1::4], split[2::4], split[3::4], strict=True)
    slots = tuple((int(turn), bool(left), bool(right)) for turn, left, right in marks)
    found = []
    for turn, before, until in borders:
        start, end = _place(before), _place(until)
        inside = [k for k, (n, *_) in enumerate(slots) if n == turn and start.piece <= k < end.piece]
        if not inside:
            return None
        found.append(TurnPlaces(turn, start, inside[-1], end))
    return Skeleton(tuple(split[0::4]), slots, tuple(found))


def _place(prefix: str) -> Place:
    pieces = _MARK.split(prefix)[0::4]
    return Place(len(pieces) - 1, len(pieces[-1]))


@functools.lru_cache(maxsize=32)
def _is_traceable(template: str) -> bool:
    """Whether everything that the template does with a text goes through the text's own methods."""
    from jinja2 import nodes

    if any(mark in template for mark in (_OPEN, _CLOSE, _POISON)):
        return False
    tree = compiled(template).environment.parse(template)
    if any(True for _ in tree.find_all((nodes.Macro, nodes.AssignBlock, nodes.FilterBlock))):
        return False  # these turn what they write into plain text that can be looked into afterwards
    printed = {id(found) for output in tree.find_all(nodes.Output) for node in output.nodes for found in _printed(node)}
    calls = (call.node for call in tree.find_all(nodes.Call))
    return (
        all(id(node) in printed for node in tree.find_all(nodes.Concat))
        and all(node.name in _OPAQUE_FILTERS for node in tree.find_all(nodes.Filter))
        and all(not isinstance(node, nodes.Getattr) or node.attr in _OPAQUE_METHODS for node in calls)
    )


def _printed(node: Any) -> Iterator[Any]:
    """The node and those below it whose text is only ever written."""
    from jinja2 import nodes

    yield node
    below: Sequence[Any] = ()
    if isinstance(node, nodes.Concat):
        below = node.nodes
    elif isinstance(node, nodes.Add):
        below = (node.left, node.right)
    elif isinstance(node, nodes.CondExpr):
        below = tuple(branch for branch in (node.expr1, node.expr2) if branch is not None)
    for child in below:
        yield from _printed(child)

"""Feedback records: what people said of a model's answers, one JSON object a line, as serving writes them.

A row has

* what was asked: ``messages`` (a list of turns with ``role`` and ``content``, the last of them the user's) or
  ``prompt`` (text, or such a list);
* ``response``: the answer that was given, as text;
* and at least one judgement:
  ``rating``, ``"up"`` or ``"down"`` (also true/false), or a whole number from 1 (worst) to 5 (best);
  ``correction``, the answer as it should have been;
  ``preferred`` and ``rejected``, two answers of which the first is better.

Any other column (``model``, ``time``, ``comment``, ...) is kept as metadata. One row gives one record, by the
judgement that says most: a correction gives a supervised record with the corrected answer, unless it is the response
itself, which corrects nothing; else a pair gives a preference; else a rating gives a KTO label (up, 4 and 5 are
desirable, down, 1 and 2 are not). What was not used of ``response``, ``rating`` and the pair stays in the metadata.
A row without judgement, or with the rating 3, teaches nothing: it is rejected with that reason, and never stops a run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raytune_ft.data.conversations import Columns, FormatFault, asked, continuation, with_system

JUDGEMENTS = frozenset({"rating", "correction"})
"""Columns of which one beside ``response`` tells a feedback record; so does the pair ``preferred``, ``rejected``."""
_RATINGS: Mapping[Any, bool | None] = {
    "up": True, "thumbs_up": True, "👍": True, "true": True, "5": True, "4": True,
    "down": False, "thumbs_down": False, "👎": False, "false": False, "2": False, "1": False,
    "3": None,
}  # fmt: skip


class NothingToLearnError(FormatFault):
    """A row that is as it should be, but says nothing to train on."""


def is_feedback(columns: set[str]) -> bool:
    """Whether a row with these columns is a feedback record."""
    return {"preferred", "rejected"} <= columns or ("response" in columns and bool(columns & JUDGEMENTS))


def feedback_fields(take: Columns) -> dict[str, Any]:
    """What a feedback row says of a record's fields.

    Raises:
        NothingToLearnError: if there is no judgement, or it is neither good nor bad.
        FormatFault: if a column holds something else than the format wants.
    """
    asking = next((name for name in ("messages", "prompt") if take.see(name) is not None), None)
    if asking is None:
        raise FormatFault("no prompt: feedback needs a column 'messages' or 'prompt'")
    prompt = with_system(take, asked(take, asking))
    if _given(take, "correction") and take.see("correction") != take.see("response"):
        return {"messages": (*prompt, *continuation(take, "correction"))}
    if _given(take, "preferred") and _given(take, "rejected"):
        return {
            "messages": prompt,
            "chosen": continuation(take, "preferred"),
            "rejected": continuation(take, "rejected"),
        }
    label = rating_label(take("rating"))
    if not _given(take, "response"):
        raise FormatFault("no response: a rating needs the answer that was rated, in column 'response'")
    return {"messages": (*prompt, *continuation(take, "response")), "label": label}


def rating_label(rating: Any) -> bool:
    """Whether a rating says that the answer was good.

    Raises:
        NothingToLearnError: if there is no rating, or it is 3 of 5.
        FormatFault: if it is none of the ratings that feedback may have.
    """
    if rating is None or rating == "":
        raise NothingToLearnError("feedback without judgement: neither rating, correction nor a pair")
    if isinstance(rating, float) and rating.is_integer():
        rating = int(rating)
    key = str(rating).strip().lower()
    if key not in _RATINGS:
        raise FormatFault(f"wrong type in 'rating': expected up, down or 1 to 5, found {rating!r:.40}")
    label = _RATINGS[key]
    if label is None:
        raise NothingToLearnError("feedback without judgement: rating 3 of 5 is neither good nor bad")
    return label


def _given(take: Columns, name: str) -> bool:
    return take.see(name) not in (None, "", [], "null")

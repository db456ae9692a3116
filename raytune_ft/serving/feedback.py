"""What comes back: feedback and the request log, appended as JSON lines that ``prepare`` reads as sources.

A replica has files of its own, so that no two processes write to one. A line is written by a single call and is on
the disk before the request is answered; a crash may cut off the last line of a file, and nothing before it.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, Field, field_validator, model_validator

from raytune_ft.core.appending import WholeLines
from raytune_ft.core.grammar import number_of
from raytune_ft.serving.faults import ApiError
from raytune_ft.serving.protocol import ChatMessage

logger = logging.getLogger("raytune_ft")

_LONGEST = 1 << 20
_MIDDLE = 3
"""A rating from 1 to 5 that is neither good nor bad."""


class Feedback(BaseModel, extra="forbid"):
    """The body of ``POST /v1/feedback``: what was asked, what came, and what is to be said of it."""

    messages: list[ChatMessage] = Field(min_length=1)
    response: str | None = Field(None, max_length=_LONGEST)
    rating: Literal["up", "down"] | int | None = None
    correction: str | None = Field(None, max_length=_LONGEST)
    preferred: str | None = Field(None, max_length=_LONGEST)
    rejected: str | None = Field(None, max_length=_LONGEST)
    model: str | None = None
    id: str | None = None
    comment: str | None = None

    @field_validator("rating", mode="before")
    @classmethod
    def _no_truth(cls, rating: Any) -> Any:
        if isinstance(rating, bool):  # Python takes true for the number 1, which is the worst rating
            raise ValueError("must be up, down, or from 1 to 5, not true or false; send up for true and down for false")
        return rating

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.messages[-1].role == "assistant":
            raise ValueError("messages: must end with what was asked, not with an answer")
        if isinstance(self.rating, int) and not 1 <= self.rating <= 5:
            raise ValueError("rating: must be up, down, or from 1 to 5")
        if (self.preferred is None) != (self.rejected is None):
            raise ValueError("preferred, rejected: one is nothing without the other")
        if self.preferred is not None and self.preferred == self.rejected:
            raise ValueError("preferred, rejected: are the same answer; give two that differ")
        if self.correction and self.correction == self.response:
            raise ValueError("correction: is the answer that it corrects; write a better one, or leave it out")
        if self.rating is None and not self.correction and self.preferred is None:
            raise ValueError("a judgement is needed: rating, correction, or preferred and rejected")
        if self.response is None and self.preferred is None:
            raise ValueError("response: the answer that is judged is needed")
        return self

    @property
    def verdict(self) -> Literal["good", "bad", "neither"]:
        """What it says of the answer: by its rating, or bad, if it is only corrected; a pair says it of neither."""
        if self.rating is None:
            return "bad" if self.correction else "neither"
        if isinstance(self.rating, int):
            return "good" if self.rating > _MIDDLE else "bad" if self.rating < _MIDDLE else "neither"
        return "good" if self.rating == "up" else "bad"

    def record(self) -> dict[str, Any]:
        """The line of the feedback file, with turns as the request log has them.

        Raises:
            ApiError: 400, if a text cannot be encoded, or a turn has what requests may not have.
        """
        for place, turn in enumerate(self.messages):
            turn.refuse_unsupported(f"messages.{place}.")
        turns = [turn.to_message() for turn in self.messages]
        said = {
            "messages": [{"role": turn.role, "content": turn.content} for turn in turns],
            **self.model_dump(exclude_none=True, exclude={"messages"}),
        }
        try:
            json.dumps(said, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ApiError(400, "a text must be valid Unicode; a lone surrogate cannot be encoded") from None
        return {**said, "time": timestamp()}


class Journal:
    """An append-only file of JSON lines, begun with its first line."""

    def __init__(self, folder: str | Path, name: str) -> None:
        started = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
        self.path = Path(folder).expanduser().absolute() / f"{name}-{started}-{os.getpid()}.jsonl"
        self._lock, self._telling = threading.Lock(), threading.Lock()
        self._file: int | None = None
        self._whole = WholeLines()
        self._lost = 0

    def append(self, record: Mapping[str, Any]) -> None:
        """Puts a record on the disk; returns when it is there. What could not be written whole leaves nothing behind.

        Raises:
            OSError: if it cannot be written.
        """
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
        with self._lock:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            with self._whole.line(self._file):
                written = os.write(self._file, line)
                while written < len(line):
                    written += os.write(self._file, line[written:])

    def keep(self, record: Mapping[str, Any]) -> bool:
        """As `append`, for what nobody waits for: a line that cannot be written is lost.

        That is told once, until a line is written again, and then how many were lost: a full disk has no room for more.

        Returns:
            Whether it was written.
        """
        try:
            self.append(record)
        except OSError as error:
            with self._telling:
                if not self._lost:
                    logger.warning(
                        "%s: cannot be written (%s): lines are lost until it can. Make room there, or make it writable",
                        self.path,
                        error.strerror,
                    )
                self._lost += 1
            return False
        with self._telling:
            if self._lost:
                logger.warning(
                    "%s: is written again; %s lost", self.path, number_of(self._lost, "line was", "lines were")
                )
            self._lost = 0
        return True

    def close(self) -> None:
        """Closes the file; the next line opens it again."""
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = None


def timestamp() -> str:
    """The time in UTC, ISO 8601, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")

"""The file of votes: one JSON line each, on disk before the judge is told so; no line is ever changed."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from raytune_ft.core.appending import WholeLines
from raytune_ft.core.errors import ArtifactError, ConfigError
from raytune_ft.evaluation.judging import CHOICES, Vote

FOLDER = "judging"
"""Where in a report's folder its judging lies."""
VOTES = "votes.jsonl"


class VotesFile:
    """The votes in a folder, open for more; one process at a time.

    What a killed process left of a last line was never confirmed to anyone, and is cut off when the file is opened.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / VOTES
        self._lock, self._whole = threading.Lock(), WholeLines()
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._file)
            raise ConfigError(f"{self.path}: another `raytune-ft judge` has it open; stop that one first") from None
        try:
            content = self.path.read_bytes()
            self.votes = parse_votes(content.decode(errors="replace"), str(self.path))
            os.ftruncate(self._file, content.rfind(b"\n") + 1)
        except BaseException:
            os.close(self._file)
            raise

    def append(self, vote: Vote) -> None:
        """Writes a vote; when this returns, it outlives a kill and a power cut.

        Raises:
            OSError: if the disk does not take it; the file is then as it was before.
        """
        line = (json.dumps(asdict(vote), ensure_ascii=False) + "\n").encode()
        with self._lock:
            with self._whole.line(self._file):
                if os.write(self._file, line) < len(line):
                    raise OSError("the disk took only a part of it")
            self.votes.append(vote)

    def of_judge(self, judge: str) -> dict[tuple[str, str, str], Vote]:
        """The last vote of a judge on each row and pair of models."""
        with self._lock:
            mine = [vote for vote in self.votes if vote.judge == judge]
        return {(vote.row, vote.model, vote.other): vote for vote in mine}

    def __enter__(self) -> VotesFile:
        return self

    def __exit__(self, *raised: object) -> None:
        os.close(self._file)


def parse_votes(text: str, where: str) -> list[Vote]:
    """The votes in the text of a file; a last line without its end was not confirmed, and does not count.

    Raises:
        ArtifactError: if a line is not a vote, with its number.
    """
    votes = []
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        if line.strip():
            try:
                votes.append(_vote(json.loads(line)))
            except (ValueError, TypeError) as error:
                raise ArtifactError(
                    f"{where}:{number}: is not a vote ({error}); mend the line or delete it, the others stay"
                ) from None
    return votes


def _vote(entry: Mapping[str, Any]) -> Vote:
    vote = Vote(**entry)
    if vote.choice not in CHOICES or not all(isinstance(value, str) for value in asdict(vote).values()):
        raise ValueError(f"expected one of {', '.join(CHOICES)} and texts")
    return vote

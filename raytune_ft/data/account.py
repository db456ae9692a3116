"""The account of rows: each row that came in or was made went out or was rejected, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from raytune_ft.core.errors import RunError
from raytune_ft.core.grammar import number_of
from raytune_ft.data.config import SPLITS

_NOTES = {
    "changed": "rows changed by",
    "redacted": "placeholders put for",
    "undecided": "rows not told by",
    "remarks": "rows used though",
    "unmade": "variants not made:",
    "metadata": "rows whose columns are kept as metadata, and not trained on:",
}
"""Counts of what cleaning did, by name, with the words that they are told by."""


@dataclass
class Account:
    """Rows that came in and were made, and what became of them, by split and by reason.

    `changed` counts rows by the cleaning step that changed a text of theirs (rejected ones, too), `redacted` the
    placeholders by kind, `undecided` rows by the check that could not tell, `remarks` rows that were used though
    something is to be said of them. `made` counts rows that no source had, by cause,
    `unmade` the variants that augmentation could not make. `metadata` counts rows by the columns that their formats do
    not use, which are kept and not trained on.
    """

    rows_in: int
    made: Counter[str] = field(default_factory=Counter)
    splits: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    redacted: Counter[str] = field(default_factory=Counter)
    undecided: Counter[str] = field(default_factory=Counter)
    remarks: Counter[str] = field(default_factory=Counter)
    unmade: Counter[str] = field(default_factory=Counter)
    metadata: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    supervised: Counter[str] = field(default_factory=Counter)
    longest: int = 0
    chats: set[str] = field(default_factory=set)
    conflicting: int = 0
    distances: dict[str, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, rows_in: int, counts: Iterable[Mapping[str, Any]]) -> Account:
        """The account over the counts of all written files.

        Raises:
            RunError: if it does not balance.
        """
        account = cls(rows_in)
        written = 0
        for file in counts:
            written += file["rows"]
            for name in ("formats", "made", *_NOTES):
                getattr(account, name).update(file.get(name, {}))
            if file["folder"] == "rejected":
                account.rejected.update(file["reasons"])
                continue
            account.splits[file["folder"]] += file["rows"]
            account.tokens[file["folder"]] += file.get("tokens", 0)
            account.supervised[file["folder"]] += file.get("supervised", 0)
            account.chats |= {file["chat"]} if "chat" in file else set()
            account.longest = max(account.longest, file.get("longest", 0))
        if len(account.chats) > 1:
            raise RunError("the workers loaded different tokenizers for one model; clear their caches and run again")
        if account.rows_in + account.rows_made != written or written != account.rows_out + account.rows_rejected:
            raise RunError(f"the account does not balance ({account}): rows were lost or doubled; please report this")
        return account

    @property
    def rows_made(self) -> int:
        """Rows that no source had."""
        return self.made.total()

    @property
    def rows_out(self) -> int:
        """Rows in all splits."""
        return self.splits.total()

    @property
    def rows_rejected(self) -> int:
        """Rows in ``rejected/``."""
        return self.rejected.total()

    def __str__(self) -> str:
        return (
            f"{number_of(self.rows_in, 'row')} in + {self.rows_made} made{_listed(self.made)} = "
            f"{self.rows_out} out + {self.rows_rejected} rejected{_listed(self.rejected)}"
        )

    def _notes(self) -> dict[str, Counter[str]]:
        return {name: getattr(self, name) for name in _NOTES}

    def notes(self) -> list[str]:
        """What cleaning did, a line a kind, for people."""
        return [
            f"{_NOTES[name]} " + ", ".join(f"{item} {count}" for item, count in counter.most_common())
            for name, counter in self._notes().items()
            if counter
        ]

    def numbers(self) -> dict[str, Any]:
        """The account as the numbers of a manifest."""
        rows = {f"rows_{split}": self.splits[split] for split in SPLITS}
        tokens = {f"tokens_{split}": self.tokens[split] for split in SPLITS if self.tokens[split]}
        supervised = {f"supervised_tokens_{s}": self.supervised[s] for s in SPLITS if self.supervised[s]}
        return {
            "rows_in": self.rows_in,
            "rows_made": self.rows_made,
            **({"made": dict(self.made.most_common())} if self.made else {}),
            "rows_out": self.rows_out,
            "rows_rejected": self.rows_rejected,
            **rows,
            "rejected": dict(self.rejected.most_common()),
            "formats": dict(self.formats.most_common()),
            **{name: dict(counter.most_common()) for name, counter in self._notes().items() if counter},
            **tokens,
            **supervised,
            **({"tokens_longest": self.longest} if self.longest else {}),
            **({"conflicting_answers": self.conflicting} if self.conflicting else {}),
            **({"distance_from_whole": self.distances} if self.distances else {}),
            **({"chat_fingerprint": min(self.chats)} if self.chats else {}),
        }


def _listed(counter: Counter[str]) -> str:
    items = ", ".join(f"{count} {name}" for name, count in counter.most_common())
    return f" ({items})" if items else ""

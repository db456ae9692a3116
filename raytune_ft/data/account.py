"""The account of rows: each row that came in or was made went out or was rejected, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from raytune_ft.core.errors import RunError
from raytune_ft.data.config import SPLITS


@dataclass
class Account:
    """Rows that came in and were made, and what became of them, by split and by reason."""

    rows_in: int
    rows_made: int = 0
    splits: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    supervised: Counter[str] = field(default_factory=Counter)
    longest: int = 0
    chats: set[str] = field(default_factory=set)

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
            account.formats.update(file.get("formats", {}))
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
    def rows_out(self) -> int:
        """Rows in all splits."""
        return self.splits.total()

    @property
    def rows_rejected(self) -> int:
        """Rows in ``rejected/``."""
        return self.rejected.total()

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.rejected.most_common())
        return (
            f"{self.rows_in} rows in + {self.rows_made} made = {self.rows_out} out + {self.rows_rejected} rejected"
            + (f" ({reasons})" if reasons else "")
        )

    def numbers(self) -> dict[str, Any]:
        """The account as the numbers of a manifest."""
        rows = {f"rows_{split}": self.splits[split] for split in SPLITS}
        tokens = {f"tokens_{split}": self.tokens[split] for split in SPLITS if self.tokens[split]}
        supervised = {f"supervised_tokens_{s}": self.supervised[s] for s in SPLITS if self.supervised[s]}
        return {
            "rows_in": self.rows_in,
            "rows_made": self.rows_made,
            "rows_out": self.rows_out,
            "rows_rejected": self.rows_rejected,
            **rows,
            "rejected": dict(self.rejected.most_common()),
            "formats": dict(self.formats.most_common()),
            **tokens,
            **supervised,
            **({"tokens_longest": self.longest} if self.longest else {}),
            **({"chat_fingerprint": min(self.chats)} if self.chats else {}),
        }

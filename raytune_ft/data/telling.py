"""What is said of a run of `prepare` besides its account: what to look at, and how rows that were left out are had."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from raytune_ft.core.grammar import number_of
from raytune_ft.data.account import Account
from raytune_ft.data.config import SPLITS, DataCollectionConfig
from raytune_ft.data.groups import TESTED_GROUP
from raytune_ft.data.near import NEAR_REASON
from raytune_ft.data.rows import RAW_TEXT, UNANSWERED
from raytune_ft.data.split import departures

logger = logging.getLogger("raytune_ft")

_MANY = 0.1
_REMEDIES = {
    NEAR_REASON: (
        "they are near-duplicates of others; where a template makes rows alike, set near_duplicates: group, or raise "
        "near_duplicate_threshold"
    ),
    TESTED_GROUP: (
        "they begin with the question of a test row, or belong to its conversation (group_by); to learn from them, "
        "take such test rows out"
    ),
    UNANSWERED: "to have a model answer them and learn from rewards (raytune-ft reinforce), set unanswered: keep",
    "too long": "raise max_length, or set over_length to split, truncate_left or truncate_right",
    "tools": "give a chat template that writes tools (template)",
    "tool calls": "give a chat template that writes calls (template)",
}


def remedies(reasons: Iterable[str]) -> str:
    """What to do about the reasons that rows are left out for, where that is known, to be put behind an error."""
    return "".join(f"; {_REMEDIES[name]}" for name in reasons if name in _REMEDIES)


def tell(config: DataCollectionConfig, account: Account) -> None:
    """Logs how the splits differ, contradicting answers, doubtful rows, and what many rows were left out for."""
    judged = [split for split in SPLITS if split != "test" or not config.test_sources]
    whole = "rows of the sources" if config.test_sources else "whole"
    for departure in departures({split: account.splits[split] for split in judged}):
        logger.warning("prepare: %s", departure)
    for split in SPLITS:
        far = ", ".join(f"{field} {distance:.3f}" for field, distance in account.distances.get(split, {}).items())
        if far:
            logger.info("prepare: %s: Jensen–Shannon distance from the %s: %s", split, whole, far)
    if account.conflicting:
        logger.warning(
            "prepare: %s the same prompt as another row, but differently; conflicting_answers: drop leaves them out",
            number_of(account.conflicting, "row answers", "rows answer"),
        )
    for remark, count in account.remarks.items():
        if remark.startswith(RAW_TEXT):
            logger.warning(
                "prepare: %s %s; if one is to be learned from the other, say so with columns (for example "
                "prompt: text, completion: label), else with input_format: text",
                number_of(count, "row is", "rows are"),
                remark,
            )
    for reason, remedy in _REMEDIES.items():
        if account.rejected[reason] > _MANY * account.rows_in:
            share = 100 * account.rejected[reason] / account.rows_in
            logger.warning("prepare: %.0f%% of the rows were left out as %r: %s", share, reason, remedy)

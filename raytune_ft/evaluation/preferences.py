"""Votes as preference records: what most judges preferred is the chosen answer, the other one the rejected."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from raytune_ft.evaluation.judging import Vote
from raytune_ft.evaluation.results import EvaluationResult


def preference_records(result: EvaluationResult, votes: Sequence[Vote]) -> list[dict[str, Any]]:
    """A record for each row and two models that more judges decided one way than the other, as `prepare` reads them.

    Ties, rows that are as often decided one way as the other, and empty chosen answers give none.
    """
    last = {(vote.judge, vote.row, vote.model, vote.other): vote for vote in votes}
    tallies: dict[tuple[str, str, str], Counter[str]] = defaultdict(Counter)
    for vote in last.values():
        tallies[vote.row, vote.model, vote.other][vote.choice] += 1
    voted = {row for row, _, _ in tallies}
    by_label = {
        model.label: {answer.id: answer for answer in model.answers if answer.id in voted} for model in result.models
    }
    records = []
    for (row, model, other), counts in tallies.items():
        if counts["model"] == counts["other"] or any(row not in by_label.get(label, {}) for label in (model, other)):
            continue
        winner, loser = (model, other) if counts["model"] > counts["other"] else (other, model)
        chosen, rejected = by_label[winner][row], by_label[loser][row]
        if not (chosen.answer or "").strip():
            continue
        turns = list(chosen.turns) or [{"role": "user", "content": chosen.prompt}]
        records.append(
            {
                "messages": turns,
                **({"tools": chosen.tools} if chosen.tools is not None else {}),
                "chosen": [{"role": "assistant", "content": chosen.answer}],
                "rejected": [{"role": "assistant", "content": rejected.answer or ""}],
                "chosen_model": winner,
                "rejected_model": loser,
                "votes_for": counts["model" if winner == model else "other"],
                "votes_against": counts["other" if winner == model else "model"],
                "votes_undecided": counts["tie"] + counts["both bad"],
            }
        )
    return records

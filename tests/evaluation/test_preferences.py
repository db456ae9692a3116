from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from raytune_ft.data.formats import detect, to_record
from raytune_ft.evaluation.judging import Vote
from raytune_ft.evaluation.preferences import preference_records

SAID = {"base": ["base 0", "base 1", ""], "tuned": ["tuned 0", "tuned 1", "tuned 2"]}


def vote(judge: str, row: int, choice: str) -> Vote:
    return Vote(judge, f"row{row}", "tuned", "base", choice, "base")


def test_what_most_judges_prefer_is_chosen_and_prepare_reads_it(make_result: Any) -> None:
    votes = [vote("ann", 0, "model"), vote("bob", 0, "model"), vote("eve", 0, "other"), vote("ann", 1, "other")]
    first, second = preference_records(make_result(SAID), votes)
    assert (first["votes_for"], first["votes_against"], first["chosen_model"]) == (2, 1, "tuned")
    kind, _ = detect(first)
    record = to_record(first, kind, source="preferences.jsonl", position=0)
    assert [(m.role, m.content) for m in record.messages] == [("user", "question row0")]
    assert [(m.role, m.content) for m in record.chosen] == [("assistant", "tuned 0")]
    assert [(m.role, m.content) for m in record.rejected] == [("assistant", "base 0")]
    assert second["chosen"][0]["content"] == "base 1"


def test_ties_even_votes_changed_minds_and_empty_winners_give_no_record(make_result: Any) -> None:
    votes = [vote("ann", 0, "tie"), vote("ann", 1, "model"), vote("bob", 1, "other"), vote("ann", 2, "other")]
    assert preference_records(make_result(SAID), votes) == []
    changed = [vote("ann", 0, "model"), vote("ann", 0, "both bad")]
    assert preference_records(make_result(SAID), changed) == []
    assert preference_records(make_result(SAID), [vote("ann", 9, "model")]) == []


def test_tools_and_their_calls_reach_the_record(make_result: Any) -> None:
    calls = json.dumps([{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}])
    tools = json.dumps([{"type": "function", "function": {"name": "f"}}])
    turns = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": calls})
    result = make_result(SAID)
    models = [
        replace(
            model,
            answers=[
                replace(one, turns=(*turns, {"role": "tool", "content": "4"}), tools=tools) for one in model.answers
            ],
        )
        for model in result.models
    ]
    [made] = preference_records(replace(result, models=tuple(models)), [vote("ann", 0, "model")])
    kind, _ = detect(made)
    record = to_record(made, kind, source="preferences.jsonl", position=0)
    assert json.loads(record.tools or "") == json.loads(tools)
    assert json.loads(record.messages[1].tool_calls or "") == json.loads(calls)

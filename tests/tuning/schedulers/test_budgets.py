"""What ends a search before its trials do."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

from raytune_ft.core.storage import Location
from raytune_ft.tuning.schedulers.budgets import TokenBudget, limits

from .stand_in import sweep


def test_a_budget_keeps_for_each_trial_what_takes_it_to_its_first_evaluation(tmp_path: Path) -> None:
    # Of 100 tokens, 10 are kept for b and 10 for c, and a would spend 10 more: it stops at 70.
    budget = TokenBudget(Location.at(tmp_path) / "tokens.json", 100, first=10, trials=3)
    assert [budget("a", {"tokens": spent}) for spent in (10, 60, 70)] == [False, False, True]
    assert (budget("b", {"tokens": 10}), budget("c", {"tokens": 10})) == (True, False)
    assert not budget.stop_all()
    assert budget("c", {"tokens": 20}) and budget.stop_all()


def test_the_budget_of_a_search_keeps_what_its_settings_say_for_each_of_its_trials(tmp_path: Path) -> None:
    stopper = limits(sweep(max_tokens=100), Location.at(tmp_path), 10)  # two trials
    assert stopper is not None
    assert [stopper("a", {"tokens": spent}) for spent in (79, 80)] == [False, True]
    assert not stopper("b", {"tokens": 19}) and stopper("b", {"tokens": 20})


def test_a_budget_that_is_spent_stops_nothing_before_every_trial_was_evaluated(tmp_path: Path) -> None:
    budget = TokenBudget(Location.at(tmp_path) / "tokens.json", 100, first=10, trials=2)
    assert budget("a", {"tokens": 120}) and not budget.stop_all()
    assert budget("b", {"tokens": 10}) and budget.stop_all()


def test_a_budget_remembers_what_trials_spent_that_ended_before_the_driver_did(tmp_path: Path) -> None:
    stopper = limits(sweep(max_tokens=100, max_hours=1), Location.at(tmp_path), 10)
    assert stopper is not None
    first, again = (pickle.loads(pickle.dumps(stopper)) for _ in range(2))  # as Ray Tune keeps it from the start
    assert not first("a", {"tokens": 70}) and not first("b", {"tokens": 10})
    assert not again("b", {"tokens": 20}) and not again.stop_all()
    assert again("b", {"tokens": 30}) and again.stop_all()


def test_hours_are_those_of_all_drivers(tmp_path: Path) -> None:
    def restarted(before: int) -> Any:
        (tmp_path / "seconds.json").write_text(json.dumps(before))
        return limits(sweep(max_hours=1), Location.at(tmp_path), 10)

    assert restarted(3600).stop_all()
    again = restarted(2000)
    assert not again.stop_all() and not again("a", {})
    assert json.loads((tmp_path / "seconds.json").read_text()) > 2000

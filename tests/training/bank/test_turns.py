"""The token budget: who steps together, and in which pieces a step that is too large is computed."""

from __future__ import annotations

from raytune_ft.training.bank.turns import next_group, row_chunks


def test_the_first_in_line_steps_with_those_that_fit() -> None:
    assert next_group({"a": 60, "b": 50, "c": 30, "d": 20}, 100) == ["a", "c"]
    assert next_group({"a": 10, "b": 10}, 100) == ["a", "b"]
    assert next_group({}, 100) == []


def test_a_step_beyond_the_budget_is_made_alone() -> None:
    assert next_group({"large": 500, "b": 1}, 100) == ["large"]


def test_nobody_waits_longer_than_there_are_trials() -> None:
    line = {str(n): 10 + 37 * n % 80 for n in range(9)}
    waited = dict.fromkeys(line, 0)
    for _ in range(60):
        group = next_group(line, 100)
        assert sum(line[name] for name in group) <= 100 or len(group) == 1
        for name in waited:
            waited[name] = 0 if name in group else waited[name] + 1
        assert max(waited.values()) < 9
        for name in group:
            line[name] = line.pop(name)


def test_rows_are_cut_where_the_budget_is_full() -> None:
    assert row_chunks([4, 4, 4], 8) == [range(2), range(2, 3)]
    assert row_chunks([9, 1, 1], 8) == [range(1), range(1, 3)]
    assert row_chunks([3], 8) == [range(1)]

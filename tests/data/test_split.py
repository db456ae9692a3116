from __future__ import annotations

import pyarrow as pa
import pytest

from raytune_ft.core.digest import short_hash
from raytune_ft.data.split import Cuts, Tally, departures, find_cuts, mark_leaks, rank, tally_rows


def rows(groups: list[str], *, test: int = 0, rejected: int = 0, strata: bool = False) -> pa.Table:
    count = len(groups)
    reasons = ["empty answer"] * rejected + [None] * (count - rejected)
    return pa.table(
        {
            "group": groups,
            "stratum": [int(group, 36) % 3 if strata else 0 for group in groups],
            "conflicting": [False] * count,
            "reason": pa.array(reasons, pa.string()),
            "is_test": [False] * (count - test) + [True] * test,
            "file": [0] * (count - test) + [1] * test,
            "position": list(range(count)),
        }
    )


def test_cuts_give_the_wanted_shares_where_ranks_allow_it() -> None:
    ranks = dict.fromkeys(range(0, 200, 2), 1)  # 100 rows, each of another rank
    cuts = find_cuts({0: ranks}, test_split=0.05, validation_split=0.1)
    drawn = [cuts.split_of(0, place) for place in ranks]
    assert (drawn.count("test"), drawn.count("validation"), drawn.count("train")) == (5, 10, 85)


def test_a_cut_falls_on_the_nearer_side_of_a_large_group() -> None:
    ranks = {7: {1: 2, 5: 6, 9: 12}}
    assert find_cuts(ranks, test_split=0.2, validation_split=0.0) == Cuts({7: (5, 5)})
    assert find_cuts(ranks, test_split=0.3, validation_split=0.0) == Cuts({7: (6, 6)})


def test_a_group_that_no_split_has_room_for_is_trained_on_and_keeps_no_other_out() -> None:
    ranks = {0: 60} | dict.fromkeys(range(1, 41), 1)  # of 100 rows the lowest group has 60
    cuts = find_cuts({7: ranks}, test_split=0.1, validation_split=0.1)
    assert cuts == Cuts({7: (11, 21)}, {7: frozenset({0})})
    drawn = [cuts.split_of(7, place) for place in ranks]
    assert (drawn[0], drawn.count("test"), drawn.count("validation")) == ("train", 10, 10)


def test_no_wanted_share_gives_no_rows() -> None:
    cuts = find_cuts({3: {0: 1, 7: 9}}, test_split=0.0, validation_split=0.0)
    assert {cuts.split_of(3, 0), cuts.split_of(3, 7)} == {"train"}
    assert find_cuts({}, test_split=0.1, validation_split=0.1) == Cuts({})


def test_each_stratum_gets_its_share_and_the_small_ones_make_up_for_the_rest() -> None:
    # A tenth: 8 of 80 and 1 of 10; of the four of 5 rows each (at 95, 100, 105 and 110 seen) every second gets one.
    ranks = {1: dict.fromkeys(range(80), 1), 2: dict.fromkeys(range(10), 1)}
    ranks |= {stratum: dict.fromkeys(range(5), 1) for stratum in (3, 4, 5, 6)}
    cuts = find_cuts(ranks, test_split=0.1, validation_split=0.0)
    tested = {s: sum(cuts.split_of(s, place) == "test" for place in places) for s, places in ranks.items()}
    assert tested == {1: 8, 2: 1, 3: 1, 4: 0, 5: 1, 6: 0}


def test_what_a_large_group_takes_too_much_the_next_stratum_gets_less() -> None:
    # Four of 20 rows are wanted; the lowest group of the first stratum has three, so the second gives one.
    cuts = find_cuts({1: {0: 3, 4: 7}, 2: dict.fromkeys(range(10), 1)}, test_split=0.2, validation_split=0.0)
    assert cuts == Cuts({1: (1, 1), 2: (1, 1)})


def test_real_prompts_are_split_within_two_rows_of_the_wanted_shares() -> None:
    groups = [short_hash(str(number)) for number in range(2000)]
    tally = Tally()
    tally.add(tally_rows(rows(groups), seed=3).column("tally")[0].as_py())
    cuts = find_cuts(tally.ranks, test_split=0.1, validation_split=0.1)
    drawn = [cuts.split_of(0, rank(group, 3)) for group in groups]
    assert abs(drawn.count("test") - 200) <= 2
    assert abs(drawn.count("validation") - 200) <= 2
    assert drawn != [cuts.split_of(0, rank(group, 4)) for group in groups]


def test_tallies_of_parts_add_up_to_the_tally_of_the_whole() -> None:
    table = rows(["a", "b", "b", "c"], test=1, rejected=1, strata=True)
    whole, parts = Tally(), Tally()
    whole.add(tally_rows(table, seed=0).column("tally")[0].as_py())
    for start in range(4):
        parts.add(tally_rows(table.slice(start, 1), seed=0).column("tally")[0].as_py())
    assert whole == parts
    assert (whole.usable, whole.given_test, dict(whole.rejected)) == (2, 1, {"empty answer": 1})
    assert whole.extents == {0: 3, 1: 4}
    assert {stratum: counts.total() for stratum, counts in whole.ranks.items()} == {11 % 3: 2}


def test_a_training_row_with_a_prompt_of_the_test_is_rejected() -> None:
    reasons = mark_leaks(rows(["a", "b", "a"], test=1)).column("reason").to_pylist()
    assert reasons == ["prompt is in test_sources", None, None]


@pytest.mark.parametrize(
    ("counts", "warned"),
    [
        ({"train": 80, "validation": 10, "test": 10}, []),
        ({"train": 9, "validation": 1}, []),
        ({"train": 70, "validation": 20, "test": 10}, ["train is 70.0%", "validation is 20.0%"]),
        ({"train": 100, "validation": 0, "test": 0}, ["train is 100.0%", "validation is 0.0%", "test is 0.0%"]),
    ],
)
def test_shares_outside_the_guides_ranges_are_told(counts: dict[str, int], warned: list[str]) -> None:
    assert [text.partition(" of the")[0] for text in departures(counts)] == warned

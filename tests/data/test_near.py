from __future__ import annotations

import itertools

import numpy as np
import pytest

from raytune_ft.data import near
from raytune_ft.data.blocks import LocalBlocks
from raytune_ft.data.groups import sketches
from raytune_ft.data.near import near_edges, near_labels, near_reasons

from .planted import parts_of, planted_texts, settled, shingle_set, similarity


def edges_of(texts: list[str], parts: int = 1, threshold: float = 0.7) -> dict[tuple[int, int], float]:
    blocks = LocalBlocks(parts_of(settled(texts), parts)).map(sketches)
    rows = near_edges(blocks, threshold).table().to_pylist()
    assert len(rows) == len({(row["low"], row["high"]) for row in rows})
    return {(row["low"], row["high"]): row["similarity"] for row in rows}


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.85])
def test_what_is_found_is_what_brute_force_finds(threshold: float) -> None:
    """All pairs of 300 rows, by sets of words in plain Python: each edge is right, and at most 2% are missing."""
    texts = planted_texts(30)
    sets = list(map(shingle_set, texts))
    pairs = itertools.combinations(range(len(texts)), 2)
    alike = {(one, other): similarity(sets[one], sets[other]) for one, other in pairs}
    wanted = {pair: value for pair, value in alike.items() if value >= threshold}
    found = edges_of(texts, threshold=threshold)
    assert found.keys() <= wanted.keys()
    assert all(found[pair] == pytest.approx(wanted[pair], abs=1e-6) for pair in found)
    assert len(found) >= 0.98 * len(wanted)
    assert len(wanted) == {0.5: 150, 0.7: 90, 0.85: 30}[threshold]


def test_planted_similarities_are_what_they_say() -> None:
    sets = list(map(shingle_set, planted_texts(1)))
    found = [similarity(sets[number], sets[number + 5]) for number in range(5)]
    assert found == pytest.approx([67 / 133, 75 / 125, 83 / 117, 89 / 111, 95 / 105])


@pytest.mark.parametrize("parts", [2, 7])
def test_parts_and_shuffles_change_nothing(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [*planted_texts(20), "hi", "Hi", "", "ho"]
    whole = edges_of(texts)
    assert edges_of(texts, parts) == whole != {}
    monkeypatch.setattr(near, "FEW_BYTES", 0)
    assert edges_of(texts, parts) == whole


def test_the_first_of_a_cluster_stays_and_the_others_say_why() -> None:
    words = [f"w{n}" for n in range(44)]  # 40 shingles
    one = " ".join(words)
    two = " ".join([*words[:-1], "x"])  # 39 of 41: 0.95
    three = " ".join([*words[:-2], "y", "x"])  # 38 of 42 with the first (0.90), 38 of 42 with the second
    four = " ".join([*words[2:-2], "y", "x", "z", "z2"])  # 38 of 42 with the third: 0.90; with the first: 36 of 44
    texts = ["nothing like the others at all", one, two, three, four]
    labels = near_labels(near_edges(LocalBlocks([settled(texts)]).map(sketches), 0.85)).table()
    reasons = near_reasons(np.arange(5), labels, ["a.jsonl"], 0, only_tests=False)
    assert reasons == [
        None,
        None,
        "near-duplicate: of a.jsonl:1 (similarity 0.95)",
        "near-duplicate: of a.jsonl:1 (similarity 0.90)",
        "near-duplicate: of a.jsonl:3 (similarity 0.90), which leads to a.jsonl:1",
    ]


def test_rows_of_test_files_stay_and_their_likes_go() -> None:
    texts = ["one two three four five six seven"] * 2 + ["eight nine ten eleven twelve thirteen"] * 2
    columns = {"file": [0, 0, 1, 1], "position": [0, 1, 0, 1], "is_test": [True, True, False, False]}
    texts += [texts[0]]
    columns = {name: [*values, values[-1]] for name, values in columns.items()}
    columns["position"][-1] = 2
    table = settled(texts, **columns)
    ids = np.array([0, 1, 1 << 40, (1 << 40) + 1, (1 << 40) + 2])
    labels = near_labels(near_edges(LocalBlocks([table]).map(sketches), 0.7)).table()
    of_test = "near-duplicate: of t:0 (similarity 1.00)"
    every = near_reasons(ids, labels, ["t", "a"], 1, only_tests=False)
    assert every == [None, None, None, "near-duplicate: of a:0 (similarity 1.00)", of_test]
    assert near_reasons(ids, labels, ["t", "a"], 1, only_tests=True) == [None, None, None, None, of_test]

from __future__ import annotations

import json

import pyarrow as pa
import pytest

from raytune_ft.data import components, near
from raytune_ft.data.blocks import LocalBlocks
from raytune_ft.data.config import DataCollectionConfig
from raytune_ft.data.groups import group_labels, link_rows, with_nodes

from .planted import parts_of, planted_texts, settled


def linked(table: pa.Table, parts: int = 1, tests: int = 0, **settings: object) -> dict[int, dict[str, object]]:
    """The linked rows by file and position, positions of later files after those of earlier ones."""
    config = DataCollectionConfig(sources=("a",), output_path="out", **settings)
    found = link_rows(LocalBlocks(parts_of(table, parts)), config, ["a", "b"], tests).table()
    rows = found.sort_by([("file", "ascending"), ("position", "ascending")]).to_pylist()
    return dict(enumerate(rows))


def alike(words: int = 30) -> list[str]:
    """Three texts, the first two nearly alike."""
    text = " ".join(f"w{n}" for n in range(words))
    return [text, f"{text} more", " ".join(f"v{n}" for n in range(words))]


def test_nodes_of_test_rows_are_smaller_and_places_keep_the_order_of_groups() -> None:
    table = pa.table(
        {"group": ["0000000000000007", "00000000000000ff", "ffffffffffffffff"], "is_test": [False, True, False]}
    )
    table = with_nodes(table)
    assert table.column("place").to_pylist() == [1, 63, 2**62 - 1]
    assert table.column("node").to_pylist() == [2**62 + 1, 63, 2**63 - 1]


def test_near_duplicates_are_dropped_grouped_or_not_looked_for() -> None:
    table = settled(alike())
    dropped = linked(table)
    assert [row["reason"] for row in dropped.values()] == [None, "near-duplicate: of a:0 (similarity 0.96)", None]
    assert [row["cluster"] for row in dropped.values()] == [0, 0, -1]
    grouped = linked(table, near_duplicates="group")
    assert not any(row["reason"] for row in grouped.values())
    assert grouped[0]["group"] == grouped[1]["group"] != grouped[2]["group"]
    assert grouped[2]["group"] == grouped[2]["prompt"]
    assert grouped[0]["prompt"] != grouped[1]["prompt"]
    kept = linked(table, near_duplicates="keep")
    assert all(row["group"] == row["prompt"] and row["reason"] is None for row in kept.values())


def test_rows_of_one_conversation_are_one_group() -> None:
    metadata = [json.dumps(m) for m in ({"conversation_id": 7}, {}, {"conversation_id": 7}, {"thread": "t"})]
    rows = linked(settled(["one", "two", "three", "four"], metadata=metadata))
    assert rows[0]["group"] == rows[2]["group"]
    assert len({row["group"] for row in rows.values()}) == 3
    by_thread = linked(settled(["one", "two", "three", "four"], metadata=metadata), group_by="thread")
    assert len({row["group"] for row in by_thread.values()}) == 4


def test_a_group_has_one_stratum() -> None:
    metadata = ['{"conversation_id": "c"}'] * 3 + ["{}"]
    rows = linked(settled(["one", "two", "three", "four"], metadata=metadata, stratum=[5, 6, 7, 8]))
    strata = [row["stratum"] for row in rows.values()]
    assert len(set(strata[:3])) == 1
    assert strata[0] in {5, 6, 7}
    assert strata[3] == 8


def test_what_is_linked_to_a_test_row_is_rejected() -> None:
    columns = {"file": [0, 1, 1], "position": [0, 0, 1], "is_test": [True, False, False]}
    rows = linked(settled(alike(), **columns), tests=1, near_duplicates="group")
    assert [row["reason"] for row in rows.values()] == [None, "near-duplicate: of a:0 (similarity 0.96)", None]
    metadata = ['{"conversation_id": "c"}', "{}", '{"conversation_id": "c"}']
    rows = linked(settled(["one", "two", "three"], metadata=metadata, **columns), tests=1)
    assert [row["reason"] for row in rows.values()] == [None, None, "group is in test_sources"]


@pytest.mark.parametrize("mode", ["drop", "group"])
def test_parts_and_shuffles_change_nothing(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = planted_texts(10)
    metadata = [json.dumps({"conversation_id": n // 3} if n % 2 else {}) for n in range(len(texts))]
    table = settled(texts, metadata=metadata, stratum=[n % 4 for n in range(len(texts))])
    whole = linked(table, near_duplicates=mode)
    assert linked(table, 6, near_duplicates=mode) == whole
    monkeypatch.setattr(near, "FEW_BYTES", 0)
    monkeypatch.setattr(components, "FEW_EDGES", 0)
    assert linked(table, 6, near_duplicates=mode) == whole
    assert sum(row["reason"] is not None for row in whole.values()) == (30 if mode == "drop" else 0)


def test_labels_are_of_nodes_with_rows_only() -> None:
    links = {"low": [11, 12], "high": [99, 99], "low_stratum": [4, 3], "high_stratum": [-1, -1]}
    rows = group_labels(LocalBlocks([pa.table(links)])).table().to_pylist()
    assert sorted(rows, key=lambda row: row["node"]) == [
        {"node": 11, "root": 11, "stratum": 4},
        {"node": 12, "root": 11, "stratum": 4},
    ]

from __future__ import annotations

from typing import Any

import pytest

from raytune_ft.core.errors import DataError
from raytune_ft.data.config import DataCollectionConfig
from raytune_ft.data.strata import (
    field_values,
    length_buckets,
    named_fields,
    refuse_absent,
    seen_names,
    with_strata,
)

from .planted import settled


def strata(texts: list[str], stratify_by: str | None, **columns: list[object]) -> list[int]:
    rows = with_strata(settled(texts, **columns).drop_columns("stratum"), stratify_by)
    return [row["stratum"] for row in sorted(rows.to_pylist(), key=lambda row: row["position"])]


def test_lengths_are_counted_in_powers_of_two() -> None:
    texts = ["x" * 31, "x" * 32, "", "x" * 2**21]
    table = settled(texts).sort_by("position")
    assert length_buckets(table).tolist() == [4, 5, 4, 19]
    assert strata(texts, "length") == [4, 5, 4, 19]


def test_a_stratum_is_a_length_a_source_or_both() -> None:
    texts = ["x" * 40, "y" * 40, "z" * 200]
    columns = {"source": ["a", "b", "b"], "file": [0, 1, 1]}
    both = strata(texts, "length_and_source", **columns)
    assert len(set(both)) == 3
    source = strata(texts, "source", **columns)
    assert source[0] != source[1] == source[2]
    assert strata(texts, None, **columns) == [0, 0, 0]


def test_a_field_is_read_from_the_metadata() -> None:
    metadata = ['{"topic": "law"}', '{"topic": 3}', "{}", '{"topic": "law", "other": 1}', '{"note": "\\"topic\\""}']
    table = settled(["a", "b", "c", "d", "e"], metadata=metadata).sort_by("position")
    assert field_values(table, "topic") == ["law", "3", "", "law", ""]
    found = strata(["a", "b", "c", "d", "e"], "topic", metadata=metadata)
    assert found[0] == found[3]
    assert found[2] == found[4]
    assert len(set(found)) == 3


def test_a_group_has_the_stratum_of_its_first_usable_row() -> None:
    texts = ["x" * 20, "x" * 200, "x" * 2000]
    columns = {"group": ["00000000000000aa"] * 3, "reason": ["empty answer", None, None]}
    assert strata(texts, "length", **columns) == [7, 7, 7]


def test_a_field_that_tells_all_rows_apart_is_refused() -> None:
    metadata = [f'{{"name": "{n}"}}' for n in range(257)]
    with pytest.raises(DataError, match="stratify_by: 'name' has more than 256 values"):
        strata([str(n) for n in range(257)], "name", metadata=metadata)


def test_a_field_of_a_column_named_metadata_is_one_too() -> None:
    metadata = [
        '{"metadata": {"topic": "law"}}',
        '{"metadata": {"topic": "law"}, "topic": "art"}',
        '{"metadata": "topic"}',
    ]
    assert field_values(settled(["a", "b", "c"], metadata=metadata).sort_by("position"), "topic") == ["law", "art", ""]


def config(**settings: Any) -> DataCollectionConfig:
    return DataCollectionConfig(sources=("a",), output_path="out", **settings)


def seen(settings: DataCollectionConfig, metadata: list[str], notes: list[str | None]) -> list[str]:
    """What `seen_names` says of each row in a table of its own."""
    table = settled([str(n) for n in range(len(metadata))], metadata=metadata, notes=notes).sort_by("position")
    parts = (seen_names(table.slice(n, 1), list(named_fields(settings).values())) for n in range(table.num_rows))
    return [part.column("seen")[0].as_py() for part in parts]


def test_fields_that_no_row_has_are_refused_with_what_was_meant() -> None:
    metadata, notes = ['{"other": 1}', '{"metadata": {"topic": "law"}, "thread": 3}'], [None, None]
    for given, message in [
        ({"stratify_by": "topci"}, "stratify_by: no row has 'topci' in its metadata .*; did you mean topic"),
        ({"group_by": "thraed"}, "group_by: no row has 'thraed' .*among others, metadata, other, thread, topic"),
    ]:
        with pytest.raises(DataError, match=message):
            refuse_absent(seen(config(**given), metadata, notes), config(**given))
    for given in ({"stratify_by": "topic", "group_by": "thread"}, {"stratify_by": "source"}, {}, {"group_by": None}):
        refuse_absent(seen(config(**given), metadata, notes), config(**given))


def test_a_column_to_rename_that_no_row_has_is_refused() -> None:
    given = config(columns={"prompt": "ask", "completion": "asnwer"})
    told = seen(given, ["{}", '{"answer": "A"}', None], ['{"renamed": ["prompt"]}', None, None])
    with pytest.raises(
        DataError, match=r"columns.completion: no row of the sources has a column 'asnwer'; did you mean a"
    ):
        refuse_absent(told, given)
    both = seen(given, ["{}", "{}"], ['{"renamed": ["prompt"]}', '{"renamed": ["completion"]}'])
    refuse_absent(both, given)
    bad = seen(given, ["{}", None], ['{"renamed": ["prompt"]}', '{"renamed": ["completion"]}'])
    refuse_absent(bad, given)  # a row that is no record has the column, too
    refuse_absent(seen(given, [None], [None]), given)  # where nothing is a record, that is what is wrong

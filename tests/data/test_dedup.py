from __future__ import annotations

import pyarrow as pa

from raytune_ft.data.dedup import mark_duplicates


def test_the_first_usable_row_of_a_content_stays() -> None:
    table = pa.table(
        {
            "id": ["x", "x", "y", "x", "z", "z"],
            "reason": pa.array([None, None, None, None, "empty answer", None], pa.string()),
            "source": ["a", "a", "a", "b", "b", "b"],
            "position": [0, 4, 5, 0, 1, 2],
        }
    )
    reasons = mark_duplicates(table).column("reason").to_pylist()
    assert reasons == [None, "duplicate: of a:0", None, "duplicate: of a:0", "empty answer", None]

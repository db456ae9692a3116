"""Loss of answers under a given model: how unlikely a model that knows the language finds each."""

from __future__ import annotations

import functools

import pyarrow as pa

from raytune_ft.core.errors import DataError
from raytune_ft.core.records import RECORD_SCHEMA, table_to_records
from raytune_ft.data.suspects import CONFIRMED
from raytune_ft.models.chat import Encoded, TokenRow, conversation_of
from raytune_ft.models.config import TrainOn
from raytune_ft.models.loading import LoadedModel, load_model
from raytune_ft.models.probe import check_computation
from raytune_ft.models.scoring import sequence_scores

MOST_TOKENS = 4096
"""Longer rows are not judged: one of them could need more memory than a worker has."""

_ROWS_AT_ONCE = 256
_SCHEMA = pa.schema([("id", pa.string()), ("loss", pa.float64())])


def answer_losses(rows: pa.Table, model: str) -> pa.Table:
    """Mean negative log-likelihood (nats) of the last answer's tokens, by `id`, of the rows that can be judged.

    Left out are rows without an answer, over `MOST_TOKENS`, that the model's template refuses, and those whose label a
    person has confirmed.
    """
    loaded = _model(model)
    parts = [_SCHEMA.empty_table()]
    for start in range(0, rows.num_rows, _ROWS_AT_ONCE):
        ids, encoded = _encoded(rows.slice(start, _ROWS_AT_ONCE), loaded)
        scores = sequence_scores(loaded, encoded)
        parts.append(pa.table([ids, [score.nll / score.tokens for score in scores]], schema=_SCHEMA))
    return pa.concat_tables(parts)


def _encoded(rows: pa.Table, loaded: LoadedModel) -> tuple[list[str], list[Encoded]]:
    records = [
        record
        for record in table_to_records(rows.select(RECORD_SCHEMA.names))
        if record.messages and record.messages[-1].role == "assistant" and not record.metadata.get(CONFIRMED)
    ]
    # A malformed call or span is a matter of tokenizing, which names it; here the row is just not judged.
    asked = []
    for record in records:
        try:
            asked.append((record.id, conversation_of(record)))
        except DataError:
            continue
    found = loaded.chat.encode_batch([conversation for _, conversation in asked], TrainOn.LAST_ASSISTANT_TURN)
    kept = [
        (row_id, row)
        for (row_id, _), row in zip(asked, found, strict=True)
        if isinstance(row, TokenRow) and len(row.ids) <= MOST_TOKENS and row.supervised[1:].any()
    ]
    return [row_id for row_id, _ in kept], [Encoded(row.ids.tolist(), row.supervised.tolist()) for _, row in kept]


@functools.lru_cache(maxsize=1)
def _model(reference: str) -> LoadedModel:
    loaded = load_model(reference)
    check_computation(loaded.model)
    return loaded

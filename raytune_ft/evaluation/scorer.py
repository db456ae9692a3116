"""One copy of a model that takes tables of rows and gives tables of answers and likelihoods."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from raytune_ft.core import errors
from raytune_ft.core.cluster import usable_cpus
from raytune_ft.core.errors import DataError, RaytuneError
from raytune_ft.core.records import Message, Record, table_to_records
from raytune_ft.evaluation.config import EvaluationMetric, MeasureConfig
from raytune_ft.models.chat import Chat, Encoded, encode_record

MEASURED_SCHEMA = pa.schema(
    [
        ("position", pa.int64()),
        ("answer", pa.string()),
        ("finish_reason", pa.string()),
        ("answer_tokens", pa.int64()),
        ("nll", pa.float64()),
        ("tokens", pa.int64()),
    ]
)
"""One row a record; `position` says which. What was not asked for is null."""


class ModelScorer:
    """Loads a model once and measures tables of records with it; a Ray actor holds one."""

    def __init__(self, path: str, config: MeasureConfig, threads: int) -> None:
        import torch

        from raytune_ft.models.loading import load_model

        # An actor that holds one CPU starts with one thread.
        torch.set_num_threads(max(1, min(threads, usable_cpus())))
        self.config = config
        self.fault: RaytuneError | None = None
        try:
            self.loaded = load_model(path, precision=config.precision)
        except RaytuneError as error:
            self.fault = error  # raised with the first rows: what an actor's constructor raises reaches nobody whole

    def __call__(self, table: pa.Table) -> pa.Table:
        """A table of `RECORD_SCHEMA` to one of `MEASURED_SCHEMA`.

        Raises:
            ModelError: if the model could not be loaded.
            DataError: if a row does not fit the model.
        """
        if self.fault is not None:
            raise self.fault
        records = table_to_records(table)
        empty = [None] * len(records)
        columns: dict[str, Sequence[Any]] = dict.fromkeys(MEASURED_SCHEMA.names, empty)
        columns["position"] = table["position"].to_pylist()
        if any(metric.needs_answers for metric in self.config.metrics):
            columns |= self._answers(records)
        if EvaluationMetric.PERPLEXITY in self.config.metrics:
            columns |= self._likelihoods(records)
        return pa.table({name: columns[name] for name in MEASURED_SCHEMA.names}, schema=MEASURED_SCHEMA)

    def _answers(self, records: Sequence[Record]) -> dict[str, Sequence[Any]]:
        from raytune_ft.models.generation import generate

        prompts = [self.loaded.chat.prompt_ids(record.prompt) for record in records]
        completions = generate(self.loaded, prompts, self.config.decoding)
        return {
            "answer": [completion.text for completion in completions],
            "finish_reason": [completion.finish_reason for completion in completions],
            "answer_tokens": [len(completion.token_ids) for completion in completions],
        }

    def _likelihoods(self, records: Sequence[Record]) -> dict[str, Sequence[Any]]:
        from raytune_ft.models.scoring import sequence_scores

        rows = [_scored_row(self.loaded.chat, record) for record in records]
        longest = getattr(self.loaded.model.config, "max_position_embeddings", None)
        for record, row in zip(records, rows, strict=True):
            if longest is not None and len(row.input_ids) > longest:
                raise DataError(
                    f"row {record.position + 1} has {len(row.input_ids)} tokens, more than the {longest} that the "
                    "model takes, so it has no perplexity; leave long rows out or split them"
                )
        scores = sequence_scores(self.loaded, rows)
        return {"nll": [score.nll for score in scores], "tokens": [score.tokens for score in scores]}


class ScorerActor:
    """A `ModelScorer` as Ray Data's actors hold it: its faults come back as a row, not as an exception.

    An exception would leave Ray Data in the middle of its work: a wall of its traceback on the screen, and its actors
    holding their CPUs for as long as anything remembers the exception.
    """

    def __init__(self, path: str, config: MeasureConfig, threads: int) -> None:
        self.scorer = ModelScorer(path, config, threads)

    def __call__(self, table: pa.Table) -> pa.Table:
        """As `ModelScorer`, or one row that `fault_in` reads."""
        try:
            return self.scorer(table)
        except RaytuneError as error:
            words = json.dumps([type(error).__name__, str(error)])
            return pa.Table.from_pylist([{"position": FAULT, "answer": words}], schema=MEASURED_SCHEMA)


FAULT = -1
"""Position of a row that holds a fault instead of an answer."""


def fault_in(row: dict[str, Any]) -> RaytuneError | None:
    """The error that a row of `ScorerActor` tells of; None for a measured row."""
    if row["position"] != FAULT:
        return None
    name, message = json.loads(row["answer"])
    return getattr(errors, name)(message)  # type: ignore[no-any-return]


def _scored_row(chat: Chat, record: Record) -> Encoded:
    """Tokens of a record with the last assistant turn, or the reference in its place, supervised."""
    if record.messages and record.messages[-1].role != "assistant" and record.reference is not None:
        record = replace(record, messages=(*record.messages, Message("assistant", record.reference)))
    return encode_record(chat, record)

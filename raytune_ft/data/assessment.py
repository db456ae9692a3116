"""The pass that assesses a dataset: statistics of all rows, the judgement of a sample, and the rows that look wrong.

Only counts, the judgement and the suspects (at most `most_suspects`) leave the blocks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from raytune_ft.data.blocks import Blocks, LocalBlocks
from raytune_ft.data.config_quality import QualityConfig
from raytune_ft.data.judgement import judge_sample
from raytune_ft.data.losses import answer_losses
from raytune_ft.data.quality import Statistics, measure, original_rows, sample, summed
from raytune_ft.data.sketches import Histogram
from raytune_ft.data.suspects import LOSS_BINS, Suspect, costly_answers, loss_histogram, to_correct, worst


@dataclass(frozen=True)
class Means:
    """What an assessment is made with: the task's description and references of models, each where there is one."""

    task: str | None = None
    embedder: str | None = None
    model: str | None = None
    suspect_model: str | None = None


@dataclass(frozen=True)
class Assessment:
    """What was found: `suspects` by row id, the worst first, and `lines` of ``suspects.jsonl`` in the same order."""

    statistics: Statistics
    judgement: Mapping[str, Any]
    suspects: Mapping[str, list[Suspect]]
    lines: list[str]
    losses: tuple[Histogram, float, int] | None

    @property
    def why(self) -> dict[str, str]:
        """What speaks against each suspect row."""
        return {row_id: "; ".join(suspect.why for suspect in found) for row_id, found in self.suspects.items()}

    def to_json(self) -> str:
        """The assessment as text, to travel in a table."""
        losses = self.losses and [self.losses[0].counts.tolist(), *self.losses[1:]]
        suspects = [[row_id, [asdict(suspect) for suspect in found]] for row_id, found in self.suspects.items()]
        return json.dumps([self.statistics.to_json(), dict(self.judgement), suspects, self.lines, losses])

    @classmethod
    def from_json(cls, text: str) -> Assessment:
        """What `to_json` wrote."""
        statistics, judgement, suspects, lines, losses = json.loads(text)
        found = {row_id: [Suspect(**suspect) for suspect in of_row] for row_id, of_row in suspects}
        if losses is not None:
            losses = (_histogram(losses[0]), *losses[1:])
        return cls(Statistics.from_json(statistics), judgement, found, lines, losses)


def assess(rows: Blocks, config: QualityConfig, seed: int, means: Means) -> Assessment:
    """The assessment of settled rows with `folder`; rows of one id must be in one part."""
    rows = rows.kept()
    statistics = summed(rows.map(measure).table().column("statistics").to_pylist())
    share = config.sample_rows / max(statistics.rows, 1)
    settings = {"task": means.task, "embedder": means.embedder, "model": means.model}
    chosen = rows.map(sample, share=share, seed=seed).together()
    judged = chosen.map(judge_sample, config=config, seed=seed, **settings).table().to_pylist()
    judgement: dict[str, Any] = json.loads(judged[0]["judgement"]) if judged else {"rows": 0}
    found = [Suspect(**suspect) for suspect in judgement.pop("suspects", ())]
    losses = None
    if means.suspect_model is not None:
        scored = rows.map(_losses, model=means.suspect_model).kept()
        counts: list[list[int]] = [row["counts"] for row in scored.map(_counted).table().to_pylist()]
        histogram = _histogram([sum(column) for column in zip(*counts, strict=True)])
        losses = (histogram, config.suspect_z, int(histogram.counts.sum()))
        bounds = {"counts": histogram.counts.tolist(), "z": config.suspect_z, "most": config.most_suspects}
        found += [Suspect(**suspect) for suspect in scored.map(_costly, **bounds).table().to_pylist()]
    suspects = worst(found, config.most_suspects)
    assessment = Assessment(statistics, judgement, suspects, [], losses)
    if suspects:
        written = rows.map(_lines, why=assessment.why).table().to_pylist()
        by_id = {line["id"]: line["line"] for line in written}
        assessment.lines.extend(by_id[row_id] for row_id in suspects)
    return assessment


def assess_here(rows: pa.Table, config: QualityConfig, seed: int, means: Means) -> pa.Table:
    """`assess` in this process over one part, as JSON text in column ``assessment``."""
    return pa.table({"assessment": [assess(LocalBlocks([rows]), config, seed, means).to_json()]})


def _losses(rows: pa.Table, model: str) -> pa.Table:
    return answer_losses(original_rows(rows), model)


def _counted(rows: pa.Table) -> pa.Table:
    return pa.table({"counts": [loss_histogram(rows.column("loss").to_numpy()).counts.tolist()]})


def _costly(rows: pa.Table, counts: list[int], z: float, most: int) -> pa.Table:
    ids, losses = rows.column("id").to_pylist(), rows.column("loss").to_pylist()
    found = worst(costly_answers(ids, losses, _histogram(counts), z), most)
    listed = [asdict(suspect) for of_row in found.values() for suspect in of_row]
    schema = pa.schema([("id", pa.string()), ("why", pa.string()), ("score", pa.float64())])
    return pa.Table.from_pylist(listed, schema=schema)


def _lines(rows: pa.Table, why: Mapping[str, str]) -> pa.Table:
    return to_correct(original_rows(rows), why)


def _histogram(counts: list[int]) -> Histogram:
    histogram = Histogram(**LOSS_BINS)
    histogram.counts[: len(counts)] += np.array(counts, np.int64)
    return histogram

"""An evaluation's texts lie on disk: the driver's memory grows by numbers, not by prompts and answers."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from raytune_ft.core import storage
from raytune_ft.core.storage import Location
from raytune_ft.evaluation import statistics
from raytune_ft.evaluation.answered import answers_of, missing_of
from raytune_ft.evaluation.config import EvaluationMetric
from raytune_ft.evaluation.kept import KeptRows
from raytune_ft.evaluation.measurement import compared, measured
from raytune_ft.evaluation.metrics import make_metric
from raytune_ft.evaluation.results import ModelScores, read_answers, write_answers
from raytune_ft.evaluation.rows import check_rows, read_rows
from raytune_ft.evaluation.slices import sliced

WORDS = 400  # 2 kB of text in each of prompt, reference and answer
METRICS = [EvaluationMetric(name) for name in ("exact_match", "f1", "length", "repetition", "perplexity")]


def evaluated(folder: Path, count: int) -> list[ModelScores]:
    """What `evaluate` does with rows once two models have answered them."""
    folder.mkdir()
    file = folder / "test.jsonl"
    with file.open("w") as stream:
        for number in range(count):
            asked = {"role": "user", "content": f"q{number} " + "word " * WORDS}
            answer = {"role": "assistant", "content": f"a{number} " + "term " * WORDS}
            stream.write(json.dumps({"messages": [asked, answer], "metadata": {"kind": number % 3}}) + "\n")
    rows = read_rows(str(file), "test")
    check_rows(rows, needs_answers=True)
    kept = KeptRows(Location.at(folder / "pieces"))
    for label in ("base", "tuned"):
        for start in range(0, count, 50):
            said = [
                {
                    "position": place,
                    "id": rows.records[place].id,
                    "answer": f"a{place} " + "term " * (WORDS // (1 + place % 2)),
                }
                for place in range(start, start + 50)
            ]
            kept.keep(label, "0", [{**row, "nll": 2.0, "tokens": 7, "bytes": 9, "answer_tokens": 5} for row in said])
    metrics = {name: make_metric(name, {}) for name in METRICS}
    models = []
    for label in ("base", "tuned"):
        assert not missing_of(rows.records, kept, label)
        blank = ModelScores(label, label, "0", {}, {}, answers_of(rows.records, kept, label, set()))
        models.append(measured(blank, metrics, seed=0))
        write_answers(folder / f"{label}.jsonl", models[-1].answers)
    compared(models, metrics, seed=0)
    assert sliced(models, metrics, seed=0)
    return models


def test_memory_does_not_grow_with_the_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_CHUNK", 20_000)  # what resampling takes, and hashing, does not grow with rows,
    monkeypatch.setattr(storage, "_CHUNK", 1 << 16)  # but is more than what these few rows are
    evaluated(tmp_path / "warm", 50)  # what libraries keep once
    peaks = []
    for count in (100, 400):
        tracemalloc.start()
        models = evaluated(tmp_path / str(count), count)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert models[1].values["exact_match"] == 0.5
        assert models[1].answers == read_answers(Location.at(tmp_path / str(count) / "tuned.jsonl"))
    texts = 3 * 5 * WORDS  # bytes a row and model
    assert (peaks[1] - peaks[0]) / 300 < texts / 6

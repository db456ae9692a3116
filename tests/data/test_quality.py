from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raytune_ft.core.errors import ConfigError, DataError
from raytune_ft.core.records import Message, Record, records_to_table
from raytune_ft.core.storage import Location
from raytune_ft.data.account import Account
from raytune_ft.data.assessment import Assessment, Means, assess
from raytune_ft.data.blocks import LocalBlocks
from raytune_ft.data.config import DataCollectionConfig
from raytune_ft.data.config_quality import QualityConfig
from raytune_ft.data.findings import advice
from raytune_ft.data.judgement import relevance
from raytune_ft.data.plots import draw
from raytune_ft.data.quality import Statistics, casing, ending, shape
from raytune_ft.data.report import publish, refuse_broken
from raytune_ft.models.embedding import REFERENCE

GOOD, BAD = ["lovely", "great", "superb", "charming", "pleasant"], ["awful", "boring", "dull", "weak", "poor"]


def review(number: int, answer: str | None = None) -> Record:
    words = (GOOD if number % 2 else BAD)[number % 5 :][:2] or GOOD[:1]
    words = [*words, (GOOD if number % 2 else BAD)[(number * 7) % 5]]
    said = answer or ("good" if number % 2 else "bad")
    turns = (Message("user", f"Film {number} was {' and '.join(words)}."), Message("assistant", said))
    return Record(messages=turns, source="reviews", position=number)


def rows_of(records: list[Record]) -> pa.Table:
    table, none = records_to_table(records), pa.nulls(len(records), pa.string())
    folders = pa.array(["test" if n % 10 == 0 else "train" for n in range(len(records))])
    formats = pa.array(["alpaca (columns)"] * len(records))
    for name, column in {"reason": none, "made": none, "folder": folders, "format": formats}.items():
        table = table.append_column(name, column)
    return table


def test_statistics_are_those_counted_by_hand_and_parts_add_up_to_the_whole() -> None:
    said = ["Yes.", "Yes.", "no", '{"a": 1}']
    records = [Record(messages=(Message("user", "red blue"), Message("assistant", s)), source="s") for s in said]
    rows = rows_of(records)
    found = Statistics.of(rows)
    assert (found.rows, found.repeated) == (4, 1)
    assert found.splits == {"test": 1, "train": 3}
    assert found.values["shape"].counts == {"a few words": 3, "JSON with a": 1}
    assert found.values["ending"].counts == {"a full stop": 2, "a letter": 1, "a bracket": 1}
    assert found.labels["answer"].counts == {"Yes.": 2, "no": 1}
    # Words: red, blue four times each, "yes." twice, "no", '{"a":', "1}": 6 of 13 words.
    assert found.distinct(1) == pytest.approx(6 / 13, abs=0.001)
    halves = Statistics.from_json(Statistics.of(rows.slice(0, 2)).to_json())
    halves.update(Statistics.of(rows.slice(2)))
    assert halves.to_json() == found.to_json()


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ('{"b": 1, "a": 2}', ("JSON with a, b", "a bracket", "begins with no letter")),
        (r'{"\ud83d": 1}', ("JSON with ?", "a bracket", "begins with no letter")),
        ("[1, 2]", ("JSON list", "a bracket", "no letters")),
        ("YES SIR", ("a few words", "a letter", "capitals only")),
        ("one\n\ntwo!", ("several paragraphs", "an exclamation mark", "begins with a small letter")),
    ],
)
def test_answers_have_a_shape_an_ending_and_a_casing(answer: str, wanted: tuple[str, str, str]) -> None:
    assert (shape(answer), ending(answer), casing(answer)) == wanted


def test_advice_on_quantity_is_the_guides_table() -> None:
    cases = [
        (499, 1e8),
        (500, 1e8),
        (5_000, 1e8),
        (5_001, 1e8),
        (999, 1e9),
        (2_000, 9e9),
        (1_999, 1e10),
        (1_999, 1e10 + 1),
        (20_000, 1e11),
    ]
    verdicts = [advice(rows, int(parameters))[0] for rows, parameters in cases]
    assert verdicts == ["too few", "few", "ideal", "many", "too few", "ideal", "few", "too few", "ideal"]
    assert advice(10, 10)[1].startswith(
        "10 training rows: below the minimum of 500 to 1,000; the guide's ideal for a small"
    )


def test_relevance_counts_rows_below_the_threshold_and_shows_the_least() -> None:
    found = relevance(np.array([0.5, 0.0, 0.1, -0.2], np.float32), [review(n) for n in range(4)], 0.1)
    assert found["mean"] == pytest.approx(0.1)
    assert found["irrelevant_rate"] == 0.5
    assert [row["id"] for row in found["least"]] == [review(n).id for n in (3, 1, 2, 0)]


def assessed(records: list[Record], parts: int = 1, **settings: Any) -> Assessment:
    rows = rows_of(records)
    size = -(-rows.num_rows // parts)
    return assess(
        LocalBlocks([rows.slice(at, size) for at in range(0, rows.num_rows, size)]),
        QualityConfig(**settings),
        0,
        Means(),
    )


def test_an_assessment_finds_planted_labels_whatever_the_parts_and_travels_as_text() -> None:
    records = [review(n, "bad" if n == 31 else None) for n in range(120)]
    whole = assessed(records)
    assert list(whole.suspects) == [records[31].id]
    assert json.loads(whole.lines[0])["prompt"] == records[31].messages[0].content
    assert assessed(records, parts=4).to_json() == whole.to_json() == Assessment.from_json(whole.to_json()).to_json()


def test_missed_thresholds_end_the_run_all_named_after_the_report_is_written(tmp_path: Path) -> None:
    assessment = assessed([review(n) for n in range(60)])
    account = Account(62)
    account.splits.update({"train": 54, "test": 6})
    account.rejected["duplicate"] = 2
    limits = {"min_rows": 500, "max_duplicate_rate": 0.01, "min_balance": 0.5, "min_relevance": 0.2}
    config = DataCollectionConfig(
        sources=["s"], output_path="o", quality=QualityConfig(**limits), task_description="tell good from bad"
    )
    findings = publish(assessment, account, config, Location.at(tmp_path))
    with pytest.raises(
        DataError, match=r"3 thresholds missed: min_rows: training rows is 54, wanted at least 500"
    ) as e:
        refuse_broken(findings, Location.at(tmp_path))
    assert "max_duplicate_rate: share of duplicates is 0.03226, wanted at most 0.01" in str(e.value)
    assert "min_relevance: mean relevance to the task description could not be measured: there is" in str(e.value)
    written = json.loads((tmp_path / "quality.json").read_text())
    assert written["balance"]["labels"]["answer"]["evenness"] == pytest.approx(1)
    assert "Quality of" in (tmp_path / "quality.html").read_text()
    refuse_broken([finding for finding in findings if not finding.broken], Location.at(tmp_path))


def test_the_page_shows_hostile_text_as_text(tmp_path: Path) -> None:
    records = [review(n, "<script>alert(1)</script>" if n % 2 else None) for n in range(60)]
    account = Account(60)
    account.splits["train"] = 60
    config = DataCollectionConfig(sources=["s"], output_path="o")
    publish(assessed(records), account, config, Location.at(tmp_path))
    assert "<script" not in (tmp_path / "quality.html").read_text()


@pytest.mark.filterwarnings("error")
def test_a_plot_of_signs_that_this_machines_fonts_lack_keeps_them_and_does_not_warn() -> None:
    drawn = draw(
        {
            "balance": {
                "lengths": {"prompt": [1], "answer": [1]},
                "sources": {"values": {}},
                "labels": {"answer": {"values": {"是": 3, "👎": 2}}},
            },
            "consistency": {"shapes": {}},
            "diversity": {},
        }
    )
    assert "是" in drawn[1][0] and "👎" in drawn[1][0]


def test_settings_without_what_they_need_are_refused_and_the_default_embedder_is_the_starter() -> None:
    with pytest.raises(ConfigError, match="min_rows needs the report"):
        QualityConfig(report=False, min_rows=3)
    config = DataCollectionConfig(sources=["s"], output_path="o")
    with pytest.raises(ConfigError, match=r"suspect_model needs the report: set quality.report to true"):
        config.with_overrides(suspect_model="m", quality={"report": False})
    assert config.embedding_model == REFERENCE

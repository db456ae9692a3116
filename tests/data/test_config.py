from __future__ import annotations

from typing import Any

import pytest

from raytune_ft.core.errors import ConfigError
from raytune_ft.data.config import DataCollectionConfig, DatasetFormat


def test_the_guides_block_is_a_valid_config() -> None:
    config = DataCollectionConfig(
        sources=["path/to/your/data.jsonl"],
        output_format=DatasetFormat.JSONL,
        output_path="prepared_dataset",
        shuffle=True,
        validation_split=0.1,
        test_split=0.1,
    )
    assert config.sources == ("path/to/your/data.jsonl",)


def test_given_test_files_leave_nothing_to_draw_for_the_test() -> None:
    config = DataCollectionConfig(sources=["a.jsonl"], output_path="out", test_sources=["b.jsonl"])
    assert config.test_split == 0.0
    assert config.with_overrides(seed=1).test_split == 0.0
    with pytest.raises(ConfigError, match="test_split must be 0 where test_sources are given"):
        DataCollectionConfig(sources=["a.jsonl"], output_path="out", test_sources=["b.jsonl"], test_split=0.1)


def test_splits_that_leave_no_training_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match="less than 1"):
        DataCollectionConfig(sources=["a.jsonl"], output_path="out", validation_split=0.5, test_split=0.5)


def test_where_and_in_which_format_it_is_exported_does_not_change_the_identity() -> None:
    one = DataCollectionConfig(sources=["a.jsonl"], output_path="x")
    other = DataCollectionConfig(sources=["a.jsonl"], output_path="y", output_format=DatasetFormat.CSV)
    assert one.identity() == other.identity()
    assert one.identity() != DataCollectionConfig(sources=["a.jsonl"], output_path="x", seed=1).identity()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source_weights": {"a.jsonl": -1}}, r"source_weights\.a\.jsonl: must be 0 or more \(got -1\)"),
        ({"source_weights": {"a.jsonl": float("nan")}}, r"source_weights\.a\.jsonl: must be a finite number"),
        ({"length_bounds": {"words": [5, 2]}}, r"length_bounds\.words: the least \(5\) is more than the most \(2\)"),
        ({"length_bounds": {"syllables": [1, 2]}}, "length_bounds"),
        ({"redact": ["mail"]}, "redact"),
        ({"columns": {"sytem": "x"}}, r"columns\.sytem: is no standard name; did you mean system\?"),
        ({"columns": {"prompt": "q", "completion": "q"}}, r"columns\.prompt: 'q' is given twice"),
    ],
)
def test_cleaning_that_cannot_be_met_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataCollectionConfig(sources=["a.jsonl"], output_path="out", **settings)


def test_cleaning_settings_read_from_plain_values_and_count_for_the_identity() -> None:
    settings = {"length_bounds": {"answer_words": [1, None]}, "redact": ["email"], "source_weights": {"a.jsonl": 2}}
    config = DataCollectionConfig(sources=["a.jsonl"], output_path="out", **settings)
    assert config.identity()["length_bounds"] == {"answer_words": [1, None]}
    assert config.with_overrides(seed=0) == config
    assert config.identity() != DataCollectionConfig(sources=["a.jsonl"], output_path="out").identity()


def test_columns_may_be_renamed_to_what_a_format_uses_or_rows_are_grouped_by() -> None:
    columns = {"prompt": "ask", "conversation_id": "thread", "topic": "kind", "choices": "options", "market": "land"}
    config = DataCollectionConfig(sources=["a.jsonl"], output_path="out", columns=columns, stratify_by="topic")
    assert config.columns == columns


@pytest.mark.parametrize("name", ["system_prompt", "template", "task_description"])
def test_a_text_counts_for_the_identity_also_where_it_is_shown_masked(name: str) -> None:
    one, other = (
        DataCollectionConfig(sources=["a.jsonl"], output_path="out", **{name: f"See https://a.org/?key={key}"})
        for key in ("one", "other")
    )
    assert one.resolved() == other.resolved()
    assert one.identity() != other.identity()
    plain = DataCollectionConfig(sources=["a.jsonl"], output_path="out", **{name: "See a.org"})
    assert set(plain.identity()) == set(plain.resolved()) - plain.not_identity


@pytest.mark.parametrize(
    ("given", "words", "mended"),
    [
        (
            {"near_duplicates": "keep", "near_duplicate_threshold": 0.9},
            "near_duplicate_threshold: near_duplicates: keep looks for none",
            {"near_duplicates": "group"},
        ),
        ({"on_leak": "reject"}, "on_leak: there are no benchmarks", {"benchmarks": ["b.jsonl"]}),
        (
            {"stratify_by": "topic", "validation_split": 0, "test_split": 0},
            "stratify_by: no rows are split off",
            {"validation_split": 0.1},
        ),
        ({"max_length": 64}, "max_length: no row is tokenized here", {"model_path": "m"}),
        ({"reasoning_format": "{reasoning}{answer}"}, "reasoning_format: no reasoning is", {"reasoning": "mask"}),
        ({"on_reasoning_fault": "reject"}, "on_reasoning_fault: no reasoning is written", {"reasoning": "train"}),
        ({"embedding_model": "e"}, "embedding_model: no meanings are told", {"task_description": "t"}),
        ({"embedding_model": "e"}, "embedding_model: no meanings", {"quality": {"min_cluster_entropy": 0.1}}),
        (
            {"embedding_model": "e"},
            "embedding_model: no meanings",
            {"augmentation": {"ratio": 1, "kinds": ["paraphrase"], "paraphrase_model": "p"}},
        ),
        ({"quality": {"irrelevant_below": 0.2}}, r"quality\.irrelevant_below: .* task_desc", {"task_description": "t"}),
        ({"quality": {"min_relevance": 0.2}}, r"quality\.min_relevance: .* task_desc", {"task_description": "t"}),
        (
            {"quality": {"max_irrelevant_rate": 0.2}},
            r"quality\.max_irrelevant_rate: cannot be measured without task_description",
            {"task_description": "t"},
        ),
        (
            {"quality": {"find_suspects": False, "max_suspect_rate": 0.2}},
            r"quality\.max_suspect_rate: cannot be measured without quality.find_suspects or suspect_model",
            {"suspect_model": "m"},
        ),
        (
            {"quality": {"find_quirks": False, "max_quirk": 0.2}},
            "quality: max_quirk: cannot be measured where find_quirks is false",
            {"quality": {"max_quirk": 0.2}},
        ),
        ({"quality": {"clusters": 5}}, r"quality\.clusters: .* task_description", {"task_description": "t"}),
        ({"quality": {"suspect_z": 4}}, r"quality\.suspect_z: .* suspect_model", {"suspect_model": "m"}),
        (
            {"quality": {"find_suspects": False, "most_suspects": 5}},
            r"quality\.most_suspects: .* suspect_model",
            {"suspect_model": "m"},
        ),
        (
            {"quality": {"find_suspects": False, "suspect_below": 0.2}},
            "quality: suspect_below: .* find_suspects is false",
            {"quality": {"suspect_below": 0.2}},
        ),
        (
            {"quality": {"report": False, "sample_rows": 99}},
            "quality: sample_rows: has no effect without the report",
            {"quality": {"sample_rows": 99}},
        ),
        (
            {"augmentation": {"word_rate": 0.2}},
            r"augmentation: word_rate: no variants are made \(ratio is 0\)",
            {"augmentation": {"ratio": 1, "kinds": ["words"], "word_rate": 0.2}},
        ),
        (
            {"augmentation": {"ratio": 1, "max_overlap": 0.2}},
            r"augmentation: max_overlap: belongs to the kind paraphrase \(kinds: wording, characters\)",
            {"augmentation": {"ratio": 1, "kinds": ["paraphrase"], "paraphrase_model": "p", "max_overlap": 0.2}},
        ),
        (
            {"augmentation": {"ratio": 1, "kinds": ["wording"], "character_rate": 0.2}},
            "augmentation: character_rate: belongs to the kind characters",
            {"augmentation": {"ratio": 1, "character_rate": 0.2}},
        ),
    ],
)
def test_a_setting_without_effect_is_refused(given: dict[str, Any], words: str, mended: dict[str, Any]) -> None:
    common = {"sources": ["a.jsonl"], "output_path": "out"}
    with pytest.raises(ConfigError, match=f"DataCollectionConfig: {words}"):
        DataCollectionConfig(**common, **given)
    assert DataCollectionConfig(**common, **{**given, **mended}).differs(next(iter(given)))


def test_a_task_needs_the_report_that_tells_of_it() -> None:
    with pytest.raises(ConfigError, match="task_description needs the report"):
        DataCollectionConfig(sources=["a"], output_path="out", task_description="t", quality={"report": False})

"""The guide's selection table as a function."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from raytune_ft.cli import app
from raytune_ft.core.errors import ConfigError
from raytune_ft.training.config import FineTuningConfig, FineTuningMethod
from raytune_ft.training.guide import departures_from_guide
from raytune_ft.training.recommend import recommend_method


@pytest.mark.parametrize(
    ("memory_gib", "method"),
    [
        (8, FineTuningMethod.QLORA),
        (11.99, FineTuningMethod.QLORA),
        (12, FineTuningMethod.LORA),
        (24, FineTuningMethod.LORA),
        (24.01, FineTuningMethod.FULL),
    ],
)
def test_memory_decides_as_in_the_guides_table(memory_gib: float, method: FineTuningMethod) -> None:
    assert recommend_method(parameters=1e9, memory_gib=memory_gib).method is method


def test_what_does_not_fit_gives_way_and_says_why() -> None:
    found = recommend_method(parameters=8e9, memory_gib=80)
    assert found.method is FineTuningMethod.LORA
    assert "full would need" in " ".join(found.reasons)


def test_a_model_that_fits_in_no_way_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^1000\.0B weights need"):
        recommend_method(model="1T", memory_gib=80)
    with pytest.raises(ConfigError, match="smaller model"):
        recommend_method(parameters=70e9, memory_gib=12)


def test_rows_are_held_against_the_guides_quantity_table() -> None:
    few = recommend_method(parameters=135e6, memory_gib=8, rows=200)
    assert "few" in few.reasons[-1]
    assert "enough" in recommend_method(parameters=135e6, memory_gib=8, rows=900).reasons[-1]


@pytest.mark.parametrize(
    ("model", "least"),
    [
        ("999999999", "500 to 1000"),
        ("1B", "1000 to 2000"),
        ("10B", "1000 to 2000"),
        ("10000000001", "2000 to 5000"),
    ],
)
def test_a_size_on_a_border_counts_as_in_the_guides_table(model: str, least: str) -> None:
    low = int(least.partition(" ")[0])
    for rows, verdict in ((low - 1, "are few"), (low, "are enough")):
        reason = recommend_method(model=model, memory_gib=80, rows=rows).reasons[-1]
        assert verdict in reason
        assert f"at least {least}" in reason


def test_where_memory_is_short_the_batch_shrinks_and_accumulation_keeps_the_step() -> None:
    found = recommend_method(model="8B", memory_gib=30, goal="slight_domain_adaptation")
    batch, parts = (found.settings[key] for key in ("per_device_train_batch_size", "gradient_accumulation_steps"))
    assert batch < 4
    assert batch * parts == 4
    assert found.memory_gib <= 30


@pytest.mark.parametrize(("model", "memory"), [("135M", 8), ("8B", 40), ("1B", 80), ("70B", 200)])
@pytest.mark.parametrize("goal", ["balanced", "slight_domain_adaptation", "complete_task_change"])
def test_what_is_recommended_lies_in_the_guides_ranges_and_is_valid(model: str, memory: float, goal: str) -> None:
    found = recommend_method(model=model, memory_gib=memory, rows=5000, goal=goal)
    config = FineTuningConfig(model_path="m", output_dir="o", dataset_path="d", **found.settings)
    assert departures_from_guide(config) == []
    assert found.memory_gib <= memory


def test_the_verb_reads_a_models_shape_and_prints_the_table(tiny_model: Path) -> None:
    done = CliRunner().invoke(app, ["recommend", "--model", str(tiny_model), "--memory-gb", "8", "--rows", "100"])
    assert done.exit_code == 0, done.output
    assert "qlora" in done.output
    assert "limited memory" in done.output
    refused = CliRunner().invoke(app, ["recommend", "--model", "1B", "--memory-gb", "8", "--goal", "best"])
    assert refused.exit_code == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "0"}, "model: must be a number above 0"),
        ({"parameters": 0}, "parameters: must be a number above 0"),
        ({"model": "1B", "memory_gib": float("nan")}, r"memory_gib: .*above 0 \(got nan\)"),
        ({"model": "1B", "max_length": 0}, "max_length: must be"),
        ({"model": "1B", "rows": -3}, "rows: must be"),
        ({"model": "1B", "goal": "best"}, r"goal: must be one of balanced, .* \(got 'best'\)"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        recommend_method(**{"memory_gib": 8, **changes})

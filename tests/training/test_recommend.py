"""The guide's selection table as a function."""

from __future__ import annotations

import pytest

from raytune_ft.core.errors import ConfigError
from raytune_ft.training.config import FineTuningMethod
from raytune_ft.training.recommend import memory_needed, recommend_method


@pytest.mark.parametrize(
    ("memory_gib", "method"), [(8, FineTuningMethod.QLORA), (16, FineTuningMethod.LORA), (40, FineTuningMethod.FULL)]
)
def test_memory_decides_as_in_the_guides_table(memory_gib: float, method: FineTuningMethod) -> None:
    assert recommend_method(parameters=1e9, memory_gib=memory_gib).method is method


def test_full_fine_tuning_of_a_billion_weights_needs_the_sum_of_its_parts() -> None:
    # 16 bytes a weight and a quarter on top: 1e9 * 16 * 1.25 = 2e10 bytes.
    assert memory_needed(FineTuningMethod.FULL, 1e9) == pytest.approx(2e10 / 2**30)


def test_what_does_not_fit_gives_way_and_says_why() -> None:
    found = recommend_method(parameters=8e9, memory_gib=80)
    assert found.method is FineTuningMethod.LORA
    assert "full would need" in " ".join(found.reasons)


def test_a_model_that_fits_in_no_way_is_refused() -> None:
    with pytest.raises(ConfigError, match="smaller model"):
        recommend_method(parameters=70e9, memory_gib=12)


def test_rows_are_held_against_the_guides_quantity_table() -> None:
    few = recommend_method(parameters=135e6, memory_gib=8, rows=200)
    assert "few" in few.reasons[-1]
    assert "enough" in recommend_method(parameters=135e6, memory_gib=8, rows=900).reasons[-1]

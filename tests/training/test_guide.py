"""Settings outside the guide's ranges are named with the range and the reason."""

from __future__ import annotations

from raytune_ft.training.config import FineTuningConfig
from raytune_ft.training.guide import departures_from_guide, departures_of_timetable
from raytune_ft.training.schedule import Timetable


def departures(**settings: object) -> list[str]:
    return departures_from_guide(FineTuningConfig(model_path="m", output_dir="o", dataset_path="d", **settings))


def test_the_defaults_are_inside() -> None:
    assert departures() == []


def test_the_guides_learning_rate_is_low_for_lora_and_right_for_full_fine_tuning() -> None:
    (found,) = departures(learning_rate=2e-5)
    assert found.startswith("learning_rate is 2e-05; typical are 0.0001 to 0.0005")
    assert "meant for full fine-tuning" in found
    assert departures(learning_rate=2e-5, method="full") == []
    assert "0.0002; typical are 1e-05 to 5e-05" in departures(learning_rate=2e-4, method="full")[0]


def test_each_value_outside_has_a_line() -> None:
    found = departures(lora_r=64, lora_alpha=128, lora_dropout=0.3, weight_decay=0, per_device_train_batch_size=16)
    assert [line.split()[0] for line in found] == [
        "per_device_train_batch_size",
        "weight_decay",
        "lora_r",
        "lora_alpha",
        "lora_dropout",
    ]


def test_what_another_setting_overrides_is_not_judged() -> None:
    assert departures(num_train_epochs=20, max_steps=5, warmup_ratio=0.5, warmup_steps=2) == []


def test_qlora_is_told_of_nf4_and_double_quantization() -> None:
    found = departures(method="qlora", bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=False)
    assert ["nf4" in found[0], "double" in found[1]] == [True, True]


def test_a_warmup_that_takes_the_whole_run_is_told_with_the_rate_it_ends_at() -> None:
    def told(rows: int, **settings: object) -> list[str]:
        config = FineTuningConfig(model_path="m", output_dir="o", dataset_path="d", **settings)
        return departures_of_timetable(config, Timetable.of(config, rows, has_validation=False))

    (words,) = told(18, warmup_steps=100, max_steps=20)
    assert words.startswith("the warmup takes 100 steps and the run has 20: its learning rate ends at 19% of")
    assert "warmup_steps: 2" in words
    (words,) = told(4, num_train_epochs=1)
    assert "ends at 0% of learning_rate (0.0002), so that nothing is learned; set warmup_steps: 0" in words
    assert told(18, max_steps=20) == told(18, max_steps=20, warmup_steps=19) == []

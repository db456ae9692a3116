"""Settings that decide nothing are told where a run begins."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from raytune_ft.core.draft import begin
from raytune_ft.core.errors import ConfigError
from raytune_ft.core.manifest import ArtifactKind
from raytune_ft.core.storage import Location
from raytune_ft.data.tokenize import tokenizer_parent
from raytune_ft.training.config import DistillationConfig, FineTuningConfig
from raytune_ft.training.config_alignment import PreferenceConfig, ReinforcementConfig, RewardConfig
from raytune_ft.training.inputs import splits_of
from raytune_ft.training.recommend import recommend_method
from raytune_ft.training.without_effect import DECIDING, idle_beside, without_effect

from ..rows import token_files  # noqa: TID252 - tests are no installed package

WHERE = {"model_path": "model", "dataset_path": "rows.jsonl", "output_dir": "out"}
TAUGHT = {**WHERE, "teacher_path": "t"}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"method": "full", "lora_r": 64, "lora_alpha": 128}, r"lora_r belongs .*lora_alpha belongs .*\(got full\)"),
        (
            {"method": "prefix_tuning", "lora_target_modules": "all-linear"},
            "lora_target_modules belongs",
        ),
        ({"num_virtual_tokens": 5}, r"num_virtual_tokens belongs to method prefix_tuning or .*\(got lora\)"),
        ({"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type belongs to a base of 4 bits"),
        ({"eval_strategy": "no", "eval_generation_rows": 3}, "eval_generation_rows needs evaluations"),
        ({"eval_strategy": "no", "per_device_eval_batch_size": 8}, "per_device_eval_batch_size needs evaluations"),
        ({"eval_generation_metric": "bleu"}, r"eval_generation_metric measures answers, and none are .*_rows 0\)"),
        ({"max_steps": 4, "num_train_epochs": 2}, "num_train_epochs is overridden by max_steps"),
        ({"warmup_steps": 0, "warmup_ratio": 0.2}, "warmup_ratio is overridden by warmup_steps"),
        ({"eval_steps": 7}, "eval_steps belongs to eval_strategy steps"),
        ({"save_steps": 7}, "save_steps belongs to save_strategy steps"),
        ({"logging_strategy": "epoch", "logging_steps": 7}, "logging_steps belongs to logging_strategy steps"),
        ({"save_strategy": "no", "save_total_limit": 7}, "save_total_limit needs checkpoints"),
        (
            {"eval_strategy": "no", "metric_for_best_model": "eval_perplexity"},
            "metric_for_best_model needs eval",
        ),
    ],
)
def test_a_setting_that_decides_nothing_is_found(given: dict[str, Any], words: str) -> None:
    idle = without_effect(FineTuningConfig(**WHERE, **given))
    assert re.search(words, "; ".join(f"{name} {why}" for name, why in idle.items()))


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"method": "full"},
        {"lora_r": 64, "lora_target_modules": "all-linear"},
        {"method": "qlora", "bnb_4bit_quant_type": "fp4", "lora_r": 4},
        {"method": "qlora", "bits": 4, "bnb_4bit_use_double_quant": False},
        {"method": "prompt_tuning", "num_virtual_tokens": 5},
        {"eval_generation_rows": 3, "eval_generation_metric": "bleu"},
        {"eval_strategy": "steps", "eval_steps": 7, "save_strategy": "steps", "save_steps": 7, "logging_steps": 7},
        {"max_steps": 4, "warmup_steps": 2, "per_device_eval_batch_size": 8, "save_total_limit": 7},
    ],
)
def test_settings_that_decide_something_pass_and_stay(given: dict[str, Any]) -> None:
    assert not without_effect(FineTuningConfig(**WHERE, **given))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (DistillationConfig(**TAUGHT, hard_loss_weight=1, temperature=3), ["temperature", "teacher_path"]),
        (DistillationConfig(**TAUGHT, hard_loss_weight=1), ["teacher_path"]),
        (DistillationConfig(**{**TAUGHT, "model_path": ""}, student_layers=1, hard_loss_weight=1), []),
        (DistillationConfig(**WHERE, teacher_path="t", temperature=3), []),
        (PreferenceConfig(**WHERE, eval_generation_metric="bleu"), ["eval_generation_metric"]),
        (PreferenceConfig(**WHERE, eval_strategy="no", per_device_eval_batch_size=8), []),
        (RewardConfig(**WHERE, eval_strategy="no", per_device_eval_batch_size=8), ["per_device_eval_batch_size"]),
        (RewardConfig(**WHERE, eval_generation_metric="bleu"), ["eval_generation_metric"]),
        (ReinforcementConfig(**WHERE, reward_metric="bleu", eval_strategy="no"), []),
    ],
)
def test_every_kind_of_training_tells_its_own(config: FineTuningConfig, words: list[str]) -> None:
    assert list(without_effect(config)) == words


def test_what_leaves_others_without_effect_is_known() -> None:
    class Seen(dict):
        def __getitem__(self, key: str) -> Any:
            looked_at.add(key)
            return super().__getitem__(key)

        def get(self, key: str, default: Any = None) -> Any:
            looked_at.add(key)
            return super().get(key, default)

    looked_at: set[str] = set()
    idle_beside(Seen(dict(DistillationConfig(**WHERE, teacher_path="t"))))
    assert looked_at == set(DECIDING)


@pytest.mark.parametrize("memory_gib", [8, 16, 80])
def test_what_is_recommended_passes(memory_gib: float) -> None:
    found = recommend_method(memory_gib=memory_gib, model="1B").settings
    assert not without_effect(FineTuningConfig(**WHERE, **found))


@pytest.mark.parametrize("name", ["learning_rate", "num_train_epochs", "lora_alpha", "max_grad_norm", "weight_decay"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_numbers_are_finite(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"{name}: must be a finite number"):
        FineTuningConfig(**WHERE, **{name: value})


def test_an_adapter_of_no_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match="lora_target_modules: must name at least one linear layer"):
        FineTuningConfig(**WHERE, lora_target_modules=[])


def test_a_length_that_a_prepared_dataset_has_no_rows_of_is_told(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"max_length": 256, "model_path": str(tiny_model)}
    parents = [tokenizer_parent(str(tiny_model))]
    with begin(tmp_path / "data", ArtifactKind.DATASET, settings=settings, parents=parents) as draft:
        (draft.folder / "train").mkdir()
        [file] = token_files(tiny_model, tmp_path, train=4, validation=0)["train"]
        shutil.copy(file, draft.folder / "train/00000.parquet")
        draft.numbers |= {"chat_fingerprint": "f", "tokens_longest": 30}
    common = {"model_path": str(tiny_model), "dataset_path": str(tmp_path / "data"), "output_dir": "out"}

    def told(**changes: int) -> list[str]:
        caplog.clear()
        splits_of(FineTuningConfig(**common, **changes), Location.at(tmp_path / "tokens"))
        return caplog.messages

    assert told(max_length=2048) == [
        f"max_length 2048 is set and changes nothing: {tmp_path}/data was prepared with max_length 256; prepare it "
        "with more"
    ]
    assert told() == told(max_length=256) == told(max_length=128) == []
    (tmp_path / "tokens").mkdir()
    assert told(max_length=2048) == [], "where rows were tokenized anew, for another model, they may be longer"

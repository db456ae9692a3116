"""Liger's kernels, where there is no GPU: they are left alone, and refused to who insists."""

from __future__ import annotations

from pathlib import Path

import pytest

from raytune_ft.core.errors import ConfigError, ModelError
from raytune_ft.models.kernels import use_liger
from raytune_ft.models.loading import load_model
from raytune_ft.training.config import FineTuningConfig


def test_a_model_on_a_cpu_keeps_transformers_own(tiny_model: Path) -> None:
    model = load_model(str(tiny_model), device="cpu").model
    before = type(model.model.norm).forward
    assert not use_liger(model, "cpu", wanted=None)
    assert not use_liger(model, "cpu", wanted=False)
    assert model.model.norm.forward.__func__ is before


def test_who_insists_on_a_cpu_is_told_why_not(tiny_model: Path) -> None:
    model = load_model(str(tiny_model), device="cpu").model
    with pytest.raises(ModelError, match="use_liger_kernel: Liger's kernels run on GPUs, and the model is on cpu"):
        use_liger(model, "cpu", wanted=True)


def test_settings_that_want_them_without_a_gpu_contradict_themselves() -> None:
    with pytest.raises(ConfigError, match="use_liger_kernel"):
        FineTuningConfig(model_path="m", dataset_path="d", output_dir="o", use_liger_kernel=True, use_gpu=False)

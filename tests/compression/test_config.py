"""What compression settings accept, and what they say about the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from raytune_ft.compression.config import (
    PruningConfig,
    PruningJob,
    PruningMethod,
    QuantizationConfig,
    QuantizationJob,
    QuantizationMethod,
)
from raytune_ft.core.config import load_config
from raytune_ft.core.errors import ConfigError


def test_the_guides_quantization_settings_are_accepted():
    config = QuantizationConfig(method=QuantizationMethod.BITSANDBYTES, bits=4)
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("nf4", True)


@pytest.mark.parametrize("bits", [0, 2, 3, 16])
def test_other_bits_than_4_and_8_are_refused(bits: int):
    with pytest.raises(ConfigError, match=r"bits: must be one of 4 or 8 \(got"):
        QuantizationConfig(bits=bits)


def test_the_guides_pruning_settings_are_accepted():
    assert PruningConfig(method=PruningMethod.MAGNITUDE, target_sparsity=0.3).target_sparsity == 0.3


@pytest.mark.parametrize("sparsity", [-0.1, 0.0, 1.0, 1.5])
def test_a_sparsity_outside_0_and_1_is_refused(sparsity: float):
    with pytest.raises(ConfigError, match="target_sparsity: must be"):
        PruningConfig(target_sparsity=sparsity)


def test_the_sparsity_of_a_structured_pattern_follows_from_it():
    assert PruningConfig(method=PruningMethod.STRUCTURED).target_sparsity == 0.5
    assert PruningConfig(method=PruningMethod.STRUCTURED, pattern="1:4").target_sparsity == 0.75


def test_a_sparsity_that_contradicts_the_pattern_is_refused():
    with pytest.raises(ConfigError, match=r"the pattern 2:4 zeroes 0\.5 of the weights \(got 0\.3\)"):
        PruningConfig(method=PruningMethod.STRUCTURED, target_sparsity=0.3)


@pytest.mark.parametrize("pattern", ["4:2", "2:2", "0:4", "2/4", "2:0"])
def test_a_pattern_that_is_none_is_refused(pattern: str):
    with pytest.raises(ConfigError, match="pattern: expected N:M"):
        PruningConfig(method=PruningMethod.STRUCTURED, pattern=pattern)


def test_jobs_load_from_yaml(tmp_path: Path):
    (tmp_path / "quantize.yaml").write_text("model_path: tuned\noutput_dir: small\nbits: 8\n")
    job = load_config(QuantizationJob, tmp_path / "quantize.yaml", ["llm_int8_threshold=0"])
    assert (job.model_path, job.output_dir, job.bits, job.llm_int8_threshold) == ("tuned", "small", 8, 0.0)
    (tmp_path / "prune.yaml").write_text("model_path: tuned\noutput_dir: sparse\nmethod: structured\n")
    assert load_config(PruningJob, tmp_path / "prune.yaml").target_sparsity == 0.5


def test_where_a_model_lies_does_not_make_another_run():
    one = QuantizationJob(model_path="a", output_dir="b")
    assert one.identity() == QuantizationJob(model_path="c", output_dir="d").identity()
    assert one.identity() != QuantizationJob(model_path="a", output_dir="b", bits=8).identity()


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (PruningConfig, {"method": "structured", "scope": "global"}, "scope: structured compares weights of one"),
        (
            PruningConfig,
            {"method": "wanda", "calibration_path": "x", "scope": "global"},
            "scope: wanda .*use magnitude",
        ),
        (PruningConfig, {"calibration_rows": 5}, "calibration_rows: magnitude looks at no rows"),
        (QuantizationConfig, {"bits": 8, "bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type: is of 4-bit weights"),
        (QuantizationConfig, {"bits": 4, "llm_int8_threshold": 0}, "llm_int8_threshold: is of 8-bit weights"),
        (QuantizationConfig, {"calibration_tokens": 5}, "calibration_tokens: bitsandbytes looks at no rows"),
        (
            QuantizationConfig,
            {"method": "compressed_tensors", "calibration_path": "x", "bnb_4bit_compute_dtype": "fp32"},
            "bnb_4bit_compute_dtype: is of bitsandbytes' weights",
        ),
    ],
)
def test_settings_that_would_change_nothing_are_refused(make: type, settings: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        make(**settings)


def test_resolved_settings_make_the_same_ones_again():
    for config in (PruningConfig(method="structured"), QuantizationConfig(bits=8, llm_int8_threshold=0)):
        assert type(config)(**config.model_dump()) == config

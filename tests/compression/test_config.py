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

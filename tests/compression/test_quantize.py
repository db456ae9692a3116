"""Quantized folders, loaded back by plain transformers; bounds are several times what was measured."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from raytune_ft.compression.config import PruningConfig, QuantizationConfig
from raytune_ft.compression.prune import write_pruned
from raytune_ft.compression.quantize import _say_what_stays, warn_of_few, write_quantized
from raytune_ft.compression.source import refuse_quantized
from raytune_ft.core.errors import ConfigError, ModelError
from raytune_ft.models.config import Precision

# The tiny model's 14 linear layers hold 73,728 weights; its embeddings, head and norms the other 49,472, in fp32.
LINEAR, KEPT = 73_728, 49_472


@pytest.mark.parametrize(
    ("config", "top1", "kl", "bits"),
    [
        (QuantizationConfig(), 0.8, 1e-3, 4),
        (QuantizationConfig(bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=False), 0.7, 2e-3, 4),
        (QuantizationConfig(bits=8), 0.95, 1e-5, 8),
    ],
)
def test_a_quantized_folder_loads_with_plain_transformers_and_answers_alike(
    tiny_model: Path, tmp_path: Path, config: QuantizationConfig, top1: float, kl: float, bits: int
):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = write_quantized(str(tiny_model), tmp_path, config)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    source = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert getattr(model, f"is_loaded_in_{bits}bit")
    assert torch.equal(model.lm_head.weight, source.lm_head.weight), "the head stays as it was"
    assert torch.equal(model.model.embed_tokens.weight, source.model.embed_tokens.weight)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == (tiny_model / "chat_template.jinja").read_text()
    assert (made.layers_quantized, made.weights_quantized, made.weights_kept) == (14, LINEAR, KEPT)
    assert made.agreement.top1 > top1
    assert 0 < made.agreement.kl < kl
    ids = torch.tensor([[3, 40, 80, 120]])
    with torch.no_grad():
        assert (model(ids).logits - source(ids).logits).abs().max() < 0.2 * source(ids).logits.abs().max()


def test_sizes_are_those_of_the_weights(tiny_model: Path, tmp_path: Path):
    made = write_quantized(str(tiny_model), tmp_path, QuantizationConfig(bits=8))
    assert made.bytes_before == 4 * (LINEAR + KEPT)
    assert made.bytes_after == (tmp_path / "model.safetensors").stat().st_size
    # 1 byte a weight, 4 bytes a row's scale and each kept weight; the header of the file adds a few kB.
    assert LINEAR + 4 * KEPT < made.bytes_after < LINEAR + 4 * KEPT + 12_000


def test_nothing_is_pickled(tiny_model: Path, tmp_path: Path):
    write_quantized(str(tiny_model), tmp_path, QuantizationConfig())
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".jinja", ".safetensors"}


def test_the_compute_precision_is_written_down(tiny_model: Path, tmp_path: Path):
    write_quantized(str(tiny_model), tmp_path, QuantizationConfig(bnb_4bit_compute_dtype=Precision.BF16))
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert settings["bnb_4bit_compute_dtype"] == "bfloat16"
    assert settings["llm_int8_skip_modules"] == ["lm_head"]


def test_a_quantized_source_is_refused_by_name(tiny_model: Path, tmp_path: Path):
    write_quantized(str(tiny_model), tmp_path, QuantizationConfig())
    with pytest.raises(ModelError, match=r"is quantized already \(bitsandbytes, 4 bits nf4\)"):
        refuse_quantized(str(tmp_path))


def test_an_adapter_is_merged_before_it_is_quantized(tiny_model: Path, tmp_path: Path):
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    adapted.save_pretrained(tmp_path / "adapter")
    write_quantized(str(tmp_path / "adapter"), tmp_path / "small", QuantizationConfig(bits=8))
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    bare = AutoModelForCausalLM.from_pretrained(tiny_model)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "adapter").eval()
    ids = torch.tensor([[3, 40, 80, 120, 7, 9]])
    with torch.no_grad():
        to_adapted = (small(ids).logits - adapted(ids).logits).abs().max()
        to_bare = (small(ids).logits - bare(ids).logits).abs().max()
    assert to_adapted < to_bare / 10
    assert not (tmp_path / "small" / "adapter_config.json").exists()


def test_an_adapter_that_cannot_merge_is_refused_by_name(tiny_model: Path, tmp_path: Path):
    from peft import PrefixTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    prefix = PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    get_peft_model(base, prefix).save_pretrained(tmp_path / "prefix")
    with pytest.raises(ModelError, match="PREFIX_TUNING"):
        write_quantized(str(tmp_path / "prefix"), tmp_path / "small", QuantizationConfig())


def test_damaged_weights_are_a_model_error(tiny_model: Path, tmp_path: Path):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ModelError, match="cannot be loaded"):
        write_quantized(str(broken), tmp_path / "small", QuantizationConfig())


@pytest.mark.soak
@pytest.mark.parametrize(("bits", "top1", "kl"), [(8, 0.9, 1e-3), (4, 0.6, 2e-2)])
def test_compressed_tensors_are_made_in_an_environment_of_their_own(
    tiny_model: Path, tmp_path: Path, bits: int, top1: float, kl: float
):
    rows = [{"text": f"row {number}: the price of {number} crates is {7 * number}"} for number in range(1, 33)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = QuantizationConfig(
        method="compressed_tensors", bits=bits, calibration_path=str(tmp_path / "rows.jsonl"), calibration_rows=16
    )
    made = write_quantized(str(tiny_model), tmp_path / "out", config)
    written = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert written["quant_method"] == "compressed-tensors"
    assert written["ignore"] == ["lm_head"]
    assert (made.layers_quantized, made.weights_quantized, made.weights_kept) == (14, LINEAR, KEPT)
    assert made.bytes_after < 0.6 * made.bytes_before
    assert made.calibration_tokens > 100
    assert made.agreement.top1 > top1
    assert 0 < made.agreement.kl < kl


def test_fewer_tokens_to_calibrate_with_than_a_layer_has_inputs_are_told(
    tiny_model: Path, caplog: pytest.LogCaptureFixture
):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    widest = model.config.intermediate_size
    with caplog.at_level(logging.WARNING, logger="raytune_ft"):
        warn_of_few(widest, model)
        assert not caplog.text
        warn_of_few(widest - 1, model)
    assert f"{widest - 1} tokens to calibrate with are fewer than the {widest} inputs" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "compressed_tensors"}, "calibration_path: compressed_tensors rounds weights by what rows show"),
        ({"calibration_path": "x"}, "calibration_path: bitsandbytes looks at weights alone"),
    ],
)
def test_calibration_is_asked_for_where_it_is_used_and_refused_elsewhere(settings: dict[str, str], message: str):
    with pytest.raises(ConfigError, match=message):
        QuantizationConfig(**settings)


def test_a_reward_model_is_refused_before_anything_is_written(tiny_model: Path, tmp_path: Path):
    source = tmp_path / "scorer"
    AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1).save_pretrained(source)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(source)
    with pytest.raises(ModelError, match="is a reward model"):
        write_quantized(str(source), tmp_path / "out", QuantizationConfig())
    with pytest.raises(ModelError, match="is a reward model"):
        write_pruned(str(source), tmp_path / "out", PruningConfig())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("bits", "layer"), [(4, "self_attn.q_a_proj"), (8, "self_attn.kv_b_proj")])
def test_a_layer_that_bitsandbytes_cannot_compute_is_named_and_nothing_is_left(
    tiny_model: Path, tmp_path: Path, bits: int, layer: str
):
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    source, target = Path(shutil.copytree(tiny_model, tmp_path / "source")), tmp_path / "target"
    config = DeepseekV3Config(
        **{"vocab_size": 400, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "n_group": 1},
        **{"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16},
        **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "first_k_dense_replace": 1},
    )
    DeepseekV3ForCausalLM(config).save_pretrained(source)
    target.mkdir()
    with pytest.raises(ModelError, match=rf"cannot compute the quantized layer model.layers.0.{layer}.*nothing was"):
        write_quantized(str(source), target, QuantizationConfig(bits=bits))
    assert not list(target.iterdir())


def test_layers_of_a_class_that_bitsandbytes_does_not_convert_are_told(tiny_model: Path, tmp_path: Path, caplog):
    from transformers import FalconConfig, FalconForCausalLM

    source = Path(shutil.copytree(tiny_model, tmp_path / "falcon"))
    config = FalconConfig(vocab_size=400, hidden_size=64, num_hidden_layers=1, num_attention_heads=4)
    FalconForCausalLM(config).save_pretrained(source)
    with pytest.raises(ModelError, match=r"converts none of its 4 linear layers.*FalconLinear"):
        write_quantized(str(source), tmp_path, QuantizationConfig())

    class Other(torch.nn.Linear):
        pass

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.model.layers[0].self_attn.q_proj.__class__ = Other
    converted = [m for m in model.model.modules() if type(m) is torch.nn.Linear]
    with caplog.at_level(logging.WARNING, logger="raytune_ft"):
        _say_what_stays("x", model, converted)
    assert "the class Other: 1 of 14 linear layers keep their precision" in caplog.text

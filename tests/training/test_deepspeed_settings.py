"""A user's DeepSpeed JSON is taken as far as it says what the settings say; each contradiction is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raytune_ft.core.errors import ConfigError
from raytune_ft.training.deepspeed_parser import refuse_unparsable
from raytune_ft.training.deepspeed_settings import (
    contradictions,
    deepspeed_settings,
    read_deepspeed_json,
    refuse_other_run,
)

AUTO = {  # as transformers' documentation has it
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": "auto", "total_num_steps": "auto"}},
    "zero_optimization": {"stage": "auto", "reduce_bucket_size": "auto", "contiguous_gradients": True},
    "wall_clock_breakdown": False,
}


def test_auto_values_are_filled_in_and_other_settings_kept(settings) -> None:
    config = settings(deepspeed_config=AUTO, gradient_accumulation_steps=3, max_grad_norm=0.5)
    assert deepspeed_settings(config, "bf16") == {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True, "check_grad_overflow": False},
        "fp16": {"enabled": False},
        "zero_optimization": {"stage": 2, "overlap_comm": False, "contiguous_gradients": True},
        "zero_allow_untested_optimizer": True,
        "wall_clock_breakdown": False,
        "steps_per_print": 10**9,
    }


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"train_batch_size": 16}, "train_batch_size is 16 there, and .*(8 x 2 x 2).* makes it 32"),
        ({"train_micro_batch_size_per_gpu": 4}, "is 4 there, and per_device_train_batch_size makes it 8"),
        ({"gradient_accumulation_steps": 1}, "is 1 there, and gradient_accumulation_steps makes it 2"),
        ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5 there, and max_grad_norm makes it 1.0"),
        ({"zero_optimization": {"stage": 3}}, "stage is 3 there, and zero_stage makes it 2"),
        ({"bf16": {"enabled": True}}, r"bf16.enabled is true there, and precision \(fp32\) makes it false"),
        ({"fp16": {"enabled": True}}, r"fp16.enabled is true there, and precision \(fp32\) makes it false"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            r'offload_optimizer.device is "cpu" there, and offload \(none\) makes it "none"',
        ),
        (
            {"zero_optimization": {"offload_param": {"device": "nvme"}}},
            r'offload_param.device is "nvme" there, and offload \(none\) makes it "none"',
        ),
        ({"optimizer": {"type": "Lamb"}}, 'optimizer.type is "Lamb" there, and the optimizer here is AdamW'),
        ({"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}}, 'optimizer.type is "Adam" there'),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 1e-5}}},
            "lr is 1e-05 there, and learning_rate makes it 0.01",
        ),
        ({"optimizer": {"params": {"betas": [0.9, 0.99]}}}, r"betas is \[0.9, 0.99\] there, and .* \[0.9, 0.999\]"),
        ({"scheduler": {"type": "WarmupLR"}}, r'"WarmupLR" there, and lr_scheduler_type \(linear\) .*"WarmupDecayLR"'),
        ({"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 9}}}, "is 9 there, and max_steps .* 6"),
        ({"pipeline": {"stages": 2}}, "pipeline is not taken: workers hold equal models"),
        ({"zero_optimization": {"mics_shard_size": 2}}, "mics_shard_size is not taken"),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size is not taken: workers share batches"),
        ({"zero_optimization": {"cpu_offload": True}}, "cpu_offload is not taken: .*write offload_optimizer"),
        ({"zero_optimization": True}, "zero_optimization is true there, and a block of settings is wanted"),
        ({"zero_optimisation": {"stage": 3}}, r"no such setting here \(did you mean zero_optimization\?\)"),
        ({"bf16": True}, "bf16 is true there, and a block of settings is wanted"),
        ({"bfloat16": {"enabled": True}}, "bfloat16 is not taken: .*write bf16"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast is not taken: precision decides"),
        ({"data_types": {"grad_accum_dtype": "fp16"}}, "data_types is not taken: precision decides"),
        ({"gradient_allreduce_op": "sum"}, 'gradient_allreduce_op is "sum" there'),
        ({"optimizer": {"params": {"amsgrad": True}}}, "amsgrad is true there, and the optimizer here, AdamW, .*false"),
        ({"optimizer": {"params": {"bias_correction": False}}}, "bias_correction is false there"),
        ({"optimizer": {"params": {"momentum": 0.9}}}, "optimizer.params.momentum is not taken"),
        ({"optimizer": {"params": {"lr": "1e-2"}}}, r'lr is "1e-2" there, and a number is wanted \(0.01, by learning_'),
        ({"scheduler": {"params": {"warmup_type": "log"}}}, 'warmup_type is "log" there, .* makes it "linear"'),
        ({"scheduler": {"params": {"cos_min_ratio": 0.3}}}, "cos_min_ratio is 0.3 there, .* makes it 0"),
        ({"scheduler": {"params": {"warmup_min_ratio": 0.5}}}, "warmup_min_ratio is 0.5 there, .* makes it 0"),
    ],
)
def test_each_contradiction_names_both_values(given: dict, words: str, settings) -> None:
    common = {"num_workers": 2, "gradient_accumulation_steps": 2, "precision": "fp32", "max_steps": 6}
    with pytest.raises(ConfigError, match=words):
        settings(**common, deepspeed_config=given)


def test_equal_values_do_not_contradict(settings) -> None:
    given = {
        "train_batch_size": 8,
        "gradient_clipping": 1,
        "zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}},
        "bf16": {"enabled": True},
        "optimizer": {"type": "Adam", "params": {"lr": 0.01, "betas": [0.9, 0.999]}},
        "scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 3}},
    }
    more = {"lr_scheduler_type": "cosine", "warmup_steps": 3, "precision": "bf16"}
    config = settings(zero_stage=3, offload="all", deepspeed_config=given, **more)
    assert contradictions(config, given) == []
    made = deepspeed_settings(config, "bf16")["zero_optimization"]
    assert made["offload_param"] == made["offload_optimizer"] == {"device": "cpu"}


def test_a_file_is_read_or_named(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(AUTO))
    assert read_deepspeed_json(str(path)) == AUTO
    path.write_text("{")
    with pytest.raises(ConfigError, match=r"ds.json cannot be read as JSON"):
        read_deepspeed_json(str(path))
    path.write_text("[1]")
    with pytest.raises(ConfigError, match="holds no JSON object"):
        read_deepspeed_json(str(path))
    with pytest.raises(ConfigError, match=r"missing.json cannot be read.*no such file"):
        read_deepspeed_json(str(tmp_path / "missing.json"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"bf16": {"enabled": True}}, r"bf16.enabled is true there, and precision \(auto, here fp32\) makes it false"),
        ({"fp16": {"enabled": True}}, "fp16.enabled is true there"),
        ({"scheduler": {"params": {"warmup_num_steps": 500}}}, "warmup_num_steps is 500 there, and the warmup .* 2"),
        (
            {"scheduler": {"params": {"total_num_steps": 500}}},
            "total_num_steps is 500 there, and .*steps.* it 20",
        ),
    ],
)
def test_what_only_the_run_decides_is_compared_then(given: dict, words: str, settings) -> None:
    if "scheduler" in given:
        given["scheduler"]["type"] = "WarmupDecayLR"
    config = settings(deepspeed_config=given)
    with pytest.raises(ConfigError, match=words):
        refuse_other_run(config, "fp32", total=20, warmup=2)
    agreed = {"scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 2, "total_num_steps": 20}}}
    refuse_other_run(settings(deepspeed_config={**agreed, "bf16": {"enabled": True}}), "bf16", total=20, warmup=2)


@pytest.mark.parametrize(
    "given",
    [
        {"amp": {"enabled": False}},
        {"elasticity": {}},
        {"sequence_parallel_size": 1, "zero_optimization": {"zero_hpz_partition_size": 1}},
        {"optimizer": {"type": "AdamW", "params": None}},
        {"optimizer": {"type": "AdamW", "params": "auto"}},
        {"scheduler": {"type": "WarmupDecayLR", "params": None}},
        {"optimizer": {"type": "auto"}, "scheduler": {"type": "auto"}},
        {"optimizer": "auto", "scheduler": "auto", "bf16": "auto", "zero_optimization": "auto"},
    ],
)
def test_blocks_that_say_nothing_contradict_nothing(given: dict, settings) -> None:
    config = settings(deepspeed_config=given)
    refuse_other_run(config, "fp32", total=20, warmup=2)
    assert deepspeed_settings(config, "fp32")["fp16"] == {"enabled": False}
    refuse_unparsable(config)
    with pytest.raises(ConfigError, match="amp is not taken"):
        settings(deepspeed_config={"amp": {"enabled": True}})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"zero_optimization": {"stage3_max_live_parameter": 1}}, "DeepSpeed refuses it .*stage3_max_live_parameter"),
        ({"sparse_attention": {"mode": "fixed"}}, "DeepSpeed refuses it .*[Ss]parse"),
    ],
)
def test_what_deepspeeds_own_parser_refuses_is_the_users_mistake(given: dict, words: str, settings) -> None:
    refuse_unparsable(settings(deepspeed_config=AUTO))
    with pytest.raises(ConfigError, match=words):
        refuse_unparsable(settings(deepspeed_config=given))

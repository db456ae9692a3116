"""Every complete code block of the fine-tuning guide that this project answers to, run on a tiny model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, orders: Path) -> Path:
    """A working folder with the guide's relative paths."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "path/to/your").mkdir(parents=True)
    os.link(orders, tmp_path / "path/to/your/data.jsonl")
    return tmp_path


def test_the_guides_code_runs_from_records_to_a_pruned_model(ray_cluster, folder: Path, tiny_model: Path) -> None:
    collect()
    train(str(tiny_model))
    evaluate()
    compare(str(tiny_model))
    shrink()


def collect() -> None:
    from raytune_ft import DataCollectionConfig, DataCollector, DatasetFormat

    config = DataCollectionConfig(
        sources=["path/to/your/data.jsonl"],
        output_format=DatasetFormat.JSONL,
        output_path="prepared_dataset",
        shuffle=True,
        validation_split=0.1,
        test_split=0.1,
    )
    collector = DataCollector(config)
    dataset = collector.prepare()
    exported = Path(collector.export(dataset))
    lines = [json.loads(line) for file in exported.rglob("*.jsonl") for line in file.open()]
    assert len(lines) == sum(len(dataset[split]) for split in dataset) == 24


def train(model: str) -> None:
    from raytune_ft import FineTuner, FineTuningConfig, FineTuningMethod

    config = FineTuningConfig(
        model_path=model,
        output_dir="fine_tuned_model",
        method=FineTuningMethod.LORA,
        # Dataset parameters
        dataset_path="prepared_dataset",
        # Training parameters
        num_train_epochs=3,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        learning_rate=2e-5,
        weight_decay=0.01,
        warmup_steps=100,
        # LoRA parameters
        lora_r=8,
        lora_alpha=16,
        lora_dropout=0.05,
        lora_target_modules=["q_proj", "v_proj"],
        # Early stopping
        early_stopping_patience=3,
    )
    assert FineTuner(config).train().numbers["best_eval_loss"] > 0
    fragments = {**config.model_dump(), "save_strategy": "steps", "save_steps": 500}
    assert FineTuningConfig(**fragments).save_steps == 500


def evaluate() -> None:
    from raytune_ft import EvaluationConfig, EvaluationMetric, ModelEvaluator

    config = EvaluationConfig(
        model_path="fine_tuned_model",
        dataset_path="prepared_dataset",
        metrics=[EvaluationMetric.PERPLEXITY, EvaluationMetric.ACCURACY],
        output_dir="evaluation_results",
    )
    evaluator = ModelEvaluator(config)
    results = evaluator.evaluate()
    assert results.values["perplexity"] > 1
    files = evaluator.visualize_results()
    assert files
    assert all(Path(file).stat().st_size > 0 for file in files)


def compare(base: str) -> None:
    from raytune_ft import compare_models, generate_evaluation_report

    results = compare_models(
        model_paths=[base, "fine_tuned_model"],
        dataset_path="prepared_dataset",
        metrics=["perplexity", "accuracy"],
        output_dir="comparison_results",
    )
    generate_evaluation_report(results, "comparison_report.md")
    assert "erplexity" in Path("comparison_report.md").read_text()


def shrink() -> None:
    from transformers import AutoModelForCausalLM

    from raytune_ft import (
        PruningConfig,
        PruningMethod,
        QuantizationConfig,
        QuantizationMethod,
        prune_model,
        quantize_model,
    )

    quantized_model_path = quantize_model(
        model_path="fine_tuned_model",
        output_dir="quantized_model",
        config=QuantizationConfig(method=QuantizationMethod.BITSANDBYTES, bits=4),
    )
    pruned_model_path = prune_model(
        model_path="fine_tuned_model",
        output_dir="pruned_model",
        config=PruningConfig(method=PruningMethod.MAGNITUDE, target_sparsity=0.3),
    )
    for path in (quantized_model_path, pruned_model_path):
        AutoModelForCausalLM.from_pretrained(path)
    weights = AutoModelForCausalLM.from_pretrained(pruned_model_path).model.layers[0].mlp.up_proj.weight
    assert float((weights == 0).float().mean()) == pytest.approx(0.3, abs=0.01)

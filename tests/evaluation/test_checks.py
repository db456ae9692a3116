"""What a report looks at beside its metrics, on real models and Ray."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from raytune_ft.core.draft import begin
from raytune_ft.core.errors import ConfigError, DataError
from raytune_ft.core.manifest import ArtifactKind, Parent
from raytune_ft.evaluation import run
from raytune_ft.evaluation.config import ComparisonConfig, EvaluationConfig
from raytune_ft.evaluation.results import read_result

ROWS = [
    {"messages": [{"role": "user", "content": f"order {n} red"}, {"role": "assistant", "content": f"answer {n}"}]}
    for n in range(6)
]


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def test_file(tmp_path: Path) -> Path:
    path = tmp_path / "test.jsonl"
    path.write_text(lines(ROWS))
    return path


@pytest.fixture
def trained(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model, with a manifest that says it was trained on two of the test rows, and without a chat template."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(lines([ROWS[2], ROWS[4]]))
    parent = Parent(role="dataset", where=str(tmp_path / "data"), digest="d")
    with begin(tmp_path / "trained", ArtifactKind.MODEL, settings={}, parents=[parent]) as draft:
        for file in tiny_model.iterdir():
            if file.name != "chat_template.jinja":
                shutil.copy(file, draft.folder / file.name)
    return tmp_path / "trained"


@pytest.mark.ray
def test_rows_that_a_model_was_trained_on_stop_the_report_unless_that_is_allowed(
    ray_cluster: object, trained: Path, test_file: Path
) -> None:
    config = EvaluationConfig(
        model_path=str(trained),
        dataset_path=str(test_file),
        metrics=("perplexity",),
        output_dir=str(test_file.parent / "report"),
    )
    with pytest.raises(DataError, match=r"^2 of 6 rows are in what model was trained on \(2 as the same row\): row 3 "):
        run.evaluate(config)
    result = read_result(run.evaluate(config.with_overrides(allow_leak=True)))
    assert result.checks["leakage"]["model"]["rows"] == 2
    assert [note.split()[0] for note in result.notes] == ["model", "Leak:"]
    assert "has no chat template" in result.notes[0]
    assert "2 of 6 rows are in what model was trained on" in (test_file.parent / "report" / "report.md").read_text()


@pytest.mark.ray
@pytest.mark.soak
def test_general_abilities_are_compared_with_the_base(
    ray_cluster: object, tiny_model: Path, test_file: Path, tmp_path: Path
) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    settings = LoraConfig(r=8, target_modules=["q_proj", "down_proj", "up_proj"], init_lora_weights=False)
    get_peft_model(base, settings).save_pretrained(tmp_path / "adapter")
    config = EvaluationConfig(
        model_path=str(tmp_path / "adapter"),
        base_model_path=str(tiny_model),
        dataset_path=str(test_file),
        metrics=("perplexity",),
        output_dir=str(tmp_path / "report"),
        forgetting={"max_rows": 3, "max_perplexity_rise": 0.0},
    )
    result = read_result(run.evaluate(config))
    found = result.checks["forgetting"]["models"]
    assert set(found) == {"base", "tuned"}
    assert all(model["questions"] == model["passages"] == 3 for model in found.values())
    assert found["base"]["perplexity"] != found["tuned"]["perplexity"]
    risen = found["tuned"]["perplexity"] > found["base"]["perplexity"]
    assert any("passages of general text" in note for note in result.notes) == risen
    assert not (tmp_path / "report" / "pieces").exists()


def test_forgetting_needs_a_base_to_compare_with(tiny_model: Path, test_file: Path) -> None:
    config = EvaluationConfig(
        model_path=str(tiny_model), dataset_path=str(test_file), metrics=("perplexity",), forgetting={}
    )
    with pytest.raises(ConfigError, match="compares with the base, which is not known here"):
        run.evaluate(config)


@pytest.mark.ray
@pytest.mark.real
@pytest.mark.soak
def test_production_is_compared_with_the_test_set(
    ray_cluster: object, tiny_model: Path, test_file: Path, tmp_path: Path
) -> None:
    asked = ["How do I cook rice?", "Write a poem about the sea.", "What is the weather like?"] * 4
    (tmp_path / "feedback.jsonl").write_text(
        lines([{"prompt": text, "response": "x", "rating": "up"} for text in asked])
    )
    config = EvaluationConfig(
        model_path=str(tiny_model),
        dataset_path=str(test_file),
        metrics=("perplexity",),
        output_dir=str(tmp_path / "report"),
        production_path=str(tmp_path / "feedback.jsonl"),
    )
    result = read_result(run.evaluate(config))
    assert result.checks["production"]["p_value"] < 0.05
    assert result.notes[0].startswith("What production asks differs from what the test set asks")


@pytest.mark.ray
def test_the_served_model_and_the_folder_give_the_same_scores(
    ray_cluster: object, tiny_model: Path, test_file: Path, tmp_path: Path
) -> None:
    from raytune_ft import ModelServer, ServingConfig

    with ModelServer(ServingConfig(model_path=str(tiny_model), port=0, precision="fp32")) as server:
        config = ComparisonConfig(
            model_paths=(str(tiny_model), server.url),
            dataset_path=str(test_file),
            metrics=("exact_match", "f1", "rouge", "chrf", "perplexity"),
            endpoint={"tokenizer": str(tiny_model)},
            output_dir=str(tmp_path / "report"),
            decoding={"max_new_tokens": 12},
            precision="fp32",
            num_actors=1,
            slice_by=(),
        )
        result = read_result(run.compare(config))
    local, served = result.models
    assert [answer.answer for answer in served.answers] == [answer.answer for answer in local.answers]
    assert served.values == pytest.approx(local.values, rel=1e-5)
    assert served.values["perplexity"] > 1

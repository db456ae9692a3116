"""The whole circle on a tiny model: every step for real, and nothing done twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raytune_ft.core.artifacts import open_artifact
from raytune_ft.core.errors import RunError
from raytune_ft.core.records import Message, Record
from raytune_ft.evaluation.results import read_result
from raytune_ft.pipeline.config import PipelineConfig
from raytune_ft.pipeline.run import Pipeline, _ask
from raytune_ft.serving.config import ServingConfig
from raytune_ft.serving.keys import hashed


def test_an_endpoint_that_does_not_answer_ends_the_run_in_words() -> None:
    record = Record(messages=(Message(role="user", content="hello"), Message(role="assistant", content="hi")))
    with pytest.raises(RunError, match="serve: the endpoint did not answer the held-out request: Connection error"):
        _ask("http://127.0.0.1:9/v1", ServingConfig(model_path="m"), record, "key")


@pytest.mark.ray
def test_the_circle_closes_and_a_second_run_redoes_nothing(
    ray_cluster, tiny_model: Path, orders: Path, tmp_path: Path
) -> None:
    preferred = tmp_path / "preferred.jsonl"
    pairs = [{"prompt": f"order {n} red", "chosen": f"yes {n}", "rejected": "no"} for n in range(8)]
    preferred.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    config = PipelineConfig(
        storage_path=str(tmp_path / "runs"),
        model_path=str(tiny_model),
        prepare={"sources": [str(orders)], "validation_split": 0.15, "test_split": 0.15},
        tune={
            "space": {"learning_rate": [1e-4, 1e-2]},
            "grace_steps": 2,
            "training": {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2},
        },
        train={"num_workers": 2, "max_steps": 6, "lora_target_modules": "all-linear"},
        align={"dataset_path": str(preferred), "max_steps": 2, "eval_strategy": "no"},
        evaluate={"metrics": ["exact_match", "perplexity"], "decoding": {"max_new_tokens": 8}},
        quantize={"bits": 8},
        serve={"port": 0, "max_new_tokens": 64, "api_keys": [hashed("known to others only")]},
    )
    artifact = Pipeline(config).run()
    page = (tmp_path / "runs/pipeline/report.html").read_text()
    exchange = json.loads((tmp_path / "runs/endpoint/exchange.json").read_text())
    assert exchange["usage"]["completion_tokens"] > 0
    assert exchange["expected"] in [json.loads(line)["messages"][1]["content"] for line in orders.open()]
    assert artifact.numbers["Best settings"] == {"learning_rate": 1e-2}
    assert page.count("data:image/svg+xml") >= 5
    evaluated = json.loads((tmp_path / "runs/evaluation/manifest.json").read_text())["parents"]
    assert str(tmp_path / "runs/aligned") in [parent["where"] for parent in evaluated]
    assert "<script" not in page

    manifests = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/manifest.json")}
    assert len(manifests) == 8
    assert Pipeline(config).run().digest == artifact.digest
    assert {path: path.stat().st_mtime_ns for path in manifests} == manifests


@pytest.mark.ray
def test_a_further_round_learns_from_feedback_and_goes_on_only_through_the_gate(
    ray_cluster, tiny_model: Path, orders: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in orders.open()]
    old, test = tmp_path / "old.jsonl", tmp_path / "test.jsonl"
    old.write_text("".join(json.dumps(row) + "\n" for row in rows[:16]))
    test.write_text("".join(json.dumps(row) + "\n" for row in rows[16:]))
    feedback = tmp_path / "feedback"
    feedback.mkdir()
    said = [
        {"messages": [{"role": "user", "content": f"order {n} blue"}], "response": "no", "correction": f"yes {n}"}
        for n in range(100, 104)
    ]
    (feedback / "replica.jsonl").write_text("".join(json.dumps(row) + "\n" for row in said))

    def settings(name: str, sources: list[str], train: dict[str, object], **more: object) -> PipelineConfig:
        return PipelineConfig(
            storage_path=str(tmp_path / name),
            model_path=str(tiny_model),
            prepare={"sources": sources, "test_sources": [str(test)], "test_split": 0.0, "validation_split": 0.1},
            train={"lora_target_modules": "all-linear", "eval_strategy": "no", "warmup_steps": 0, **train},
            evaluate={"metrics": ["perplexity"]},
            prune={"target_sparsity": 0.3},
            **more,
        )

    Pipeline(settings("one", [str(old)], {"max_steps": 6, "learning_rate": 1e-2}, gate={})).run()
    first = json.loads((tmp_path / "one/pipeline/summary.json").read_text())
    assert first["Promoted"] is True and (tmp_path / "one/pruned/manifest.json").exists()

    shut = settings("one", [str(old)], {"max_steps": 6, "learning_rate": 1e-2}, gate={"confidence": 0.999999})
    pruned = (tmp_path / "one/pruned/manifest.json").stat().st_mtime_ns
    with pytest.raises(RunError, match="the new model goes no further"):
        Pipeline(shut).run()
    assert json.loads((tmp_path / "one/pipeline/summary.json").read_text())["Promoted"] is False
    more = {"gate": {"max_drop": 1.0}, "quantize": {"bits": 8}}
    Pipeline(settings("one", [str(old)], {"max_steps": 6, "learning_rate": 1e-2}, **more)).run()
    summary = json.loads((tmp_path / "one/pipeline/summary.json").read_text())
    assert summary["Promoted"] is True and "quantize" in summary["Seconds"]
    assert (tmp_path / "one/pruned/manifest.json").stat().st_mtime_ns == pruned

    both, before = [str(old), str(feedback)], str(tmp_path / "one/tuned")
    ruined = {"adapter_path": before, "max_steps": 3, "learning_rate": 1.0, "lr_scheduler_type": "constant"}
    worse = settings("two", both, ruined, previous_path=before, gate={"max_drop": 1.0})
    with pytest.raises(RunError, match="the new model goes no further: failed: Perplexity: not shown that tuned is at"):
        Pipeline(worse).run()
    kept = json.loads((tmp_path / "two/pipeline/summary.json").read_text())
    assert kept["Promoted"] is False and kept["Gate"].startswith("failed")
    assert not (tmp_path / "two/pruned").exists()
    dataset = json.loads((tmp_path / "two/dataset/manifest.json").read_text())
    assert dataset["numbers"]["rows_train"] + dataset["numbers"]["rows_validation"] == 20
    result = read_result(open_artifact(str(tmp_path / "two/evaluation")))
    assert [model.label for model in result.models] == ["base", "previous", "tuned"]

"""lm-eval's own client of completion endpoints, unchanged, against an endpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

lm_eval = pytest.importorskip("lm_eval")

ROWS = [
    ("The capital of France is", ["Paris", "fox", "green"]),
    ("0 1 2", ["3", "red"]),
    ("red blue", ["green", "yes"]),
]


def test_lm_eval_gets_the_log_likelihoods_of_the_bare_model(endpoint: Any, tmp_path: Path):
    from lm_eval.tasks import TaskManager

    rows = [json.dumps({"question": question, "choices": choices}) for question, choices in ROWS]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    task = {
        "task": "local_choices",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    found = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": "tiny",
            "base_url": f"{endpoint.root}/v1/completions",
            "tokenizer": endpoint.service.config.model_path,
            "num_concurrent": 4,
            "max_retries": 1,
        },
        tasks=[task],
        task_manager=TaskManager(),
        log_samples=True,
    )
    loaded = endpoint.service.engine.loaded
    for sample in found["samples"]["local_choices"]:
        for (logprob, greedy), choice in zip(sample["filtered_resps"], sample["doc"]["choices"], strict=True):
            context = loaded.tokenizer(sample["doc"]["question"])["input_ids"]
            whole = loaded.tokenizer(f"{sample['doc']['question']} {choice}")["input_ids"]
            with torch.no_grad():
                scores = torch.log_softmax(loaded.model(torch.tensor([whole])).logits[0], -1)
            places = range(len(context) - 1, len(whole) - 1)
            wanted = sum(float(scores[place, whole[place + 1]]) for place in places)
            assert logprob == pytest.approx(wanted, abs=1e-3)
            assert greedy == all(int(scores[place].argmax()) == whole[place + 1] for place in places)

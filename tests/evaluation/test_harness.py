"""lm-eval's tasks on a local model: its own numbers, and one clear message where something is missing."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from raytune_ft.core.errors import ConfigError, DataError, MissingDependencyError, RunError
from raytune_ft.evaluation.config import HarnessConfig
from raytune_ft.evaluation.config_inference import EndpointConfig
from raytune_ft.evaluation.harness import _key_of, numbers_of, require_harness, run_harness
from raytune_ft.evaluation.workload import Target
from raytune_ft.models.config import Precision

installed = pytest.mark.skipif(find_spec("lm_eval") is None, reason="the extra lm-eval is not installed")

TASK = """task: house_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - metric: acc
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with a task of our own: six questions with two choices each."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"question": f"order {n}", "choices": ["red", "blue city"], "label": n % 2} for n in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "house_choice.yaml").write_text(TASK.format(data=folder / "rows.jsonl"))
    return folder


def test_numbers_are_kept_under_lm_evals_own_names() -> None:
    results = {"task": {"alias": "task", "acc,none": 0.5, "acc_stderr,none": "N/A", "sample_len": 6, "sampled": True}}
    assert numbers_of(results) == {"task": {"acc,none": 0.5, "sample_len": 6.0}}


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="the extra lm-eval is installed")
def test_without_the_extra_the_message_says_what_to_install() -> None:
    with pytest.raises(MissingDependencyError, match=r'pip install "raytune-ft\[lm-eval\]"'):
        require_harness(HarnessConfig(tasks=("gsm8k",)))


@installed
def test_a_task_of_ones_own_gives_the_accuracy_of_plain_likelihoods(tiny_model: Path, tasks: Path) -> None:
    import torch

    from raytune_ft.models.loading import load_model

    config = HarnessConfig(tasks=("house_choice",), include_path=str(tasks))
    require_harness(config)
    found = run_harness(Target("m", str(tiny_model)), config, Precision.FP32, EndpointConfig())
    loaded = load_model(str(tiny_model), precision=Precision.FP32)
    right = 0
    for number in range(6):
        scores = []
        for choice in ("red", "blue city"):
            before = len(loaded.tokenizer(f"order {number}")["input_ids"])
            ids = torch.tensor([loaded.tokenizer(f"order {number} {choice}")["input_ids"]])
            with torch.no_grad():
                losses = torch.log_softmax(loaded.model(ids).logits[0, before - 1 : -1].float(), -1)
            scores.append(float(losses.gather(1, ids[0, before:, None]).sum()))
        right += max(range(2), key=scores.__getitem__) == number % 2
    assert found["house_choice"]["acc,none"] == pytest.approx(right / 6)


@installed
def test_an_unknown_task_is_said(tasks: Path) -> None:
    with pytest.raises(ConfigError, match="lm-eval has no task no_such_task, nor in"):
        require_harness(HarnessConfig(tasks=("no_such_task",), include_path=str(tasks)))


@installed
def test_data_that_is_not_here_is_said_with_where_it_belongs(
    tiny_model: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tasks / "rows.jsonl").unlink()
    config = HarnessConfig(tasks=("house_choice",), include_path=str(tasks))
    with pytest.raises(DataError, match="the data of house_choice is not on this machine and cannot be fetched"):
        run_harness(Target("m", str(tiny_model)), config, Precision.FP32, EndpointConfig())


GENERATING = """task: house_words
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{question | upper}}}}"
generation_kwargs:
  until: ["\\n"]
metric_list:
  - metric: exact_match
"""


@installed
def test_an_endpoint_generates_for_a_task(tasks: Path, server: Any) -> None:
    (tasks / "house_words.yaml").write_text(GENERATING.format(data=tasks / "rows.jsonl"))
    server.behaviour = lambda text, times: (200, server.completion(text.upper() if text != "order 3" else "no"))
    config = HarnessConfig(tasks=("house_words",), include_path=str(tasks))
    found = run_harness(Target("m", server.url), config, Precision.FP32, EndpointConfig(max_retries=1))
    assert found["house_words"]["exact_match,none"] == pytest.approx(5 / 6)


@installed
def test_answers_that_lm_eval_cannot_read_are_no_wrong_answers(tasks: Path, server: Any) -> None:
    (tasks / "house_words.yaml").write_text(GENERATING.format(data=tasks / "rows.jsonl"))

    def answer(text: str, times: int) -> tuple[int, object]:
        found = server.completion(text.upper())
        if text in {"order 1", "order 4"}:
            del found["choices"][0]["index"]
        return 200, found

    server.behaviour = answer
    config = HarnessConfig(tasks=("house_words",), include_path=str(tasks))
    with pytest.raises(RunError, match=r"lm-eval could not read 2 of the endpoint's answers .*'index'"):
        run_harness(Target("m", server.url), config, Precision.FP32, EndpointConfig(max_retries=1))


def test_lm_eval_finds_the_endpoints_key_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "another's")
    monkeypatch.setenv("MY_KEY", "its own")
    with pytest.raises(ZeroDivisionError), _key_of(EndpointConfig(api_key_variable="MY_KEY")):
        assert os.environ["OPENAI_API_KEY"] == "its own"
        raise ZeroDivisionError
    assert os.environ["OPENAI_API_KEY"] == "another's"
    with _key_of(EndpointConfig(api_key_variable="NOT_SET")):
        assert os.environ["OPENAI_API_KEY"] == "none"
    monkeypatch.delenv("OPENAI_API_KEY")
    with _key_of(EndpointConfig(api_key_variable="MY_KEY")):
        assert os.environ["OPENAI_API_KEY"] == "its own"
    assert "OPENAI_API_KEY" not in os.environ

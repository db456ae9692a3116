"""The whole evaluation on a tiny model, with real Ray."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from raytune_ft.core.artifacts import open_artifact
from raytune_ft.core.draft import begin
from raytune_ft.core.errors import ArtifactError, ConfigError, DataError, ModelError, RunError
from raytune_ft.core.manifest import ArtifactKind
from raytune_ft.evaluation import run
from raytune_ft.evaluation.config import ComparisonConfig, EvaluationConfig, EvaluationMetric
from raytune_ft.evaluation.results import read_result
from raytune_ft.evaluation.run import ModelEvaluator, compare_models, generate_evaluation_report
from raytune_ft.models.config import DecodingConfig

ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"order {n} red, quick fox {'jumps ' * (n % 5)}"},
            {"role": "assistant", "content": json.dumps({"colour": "red", "quantity": n})},
        ]
    }
    for n in range(9)
]


@pytest.fixture
def test_file(tmp_path: Path) -> Path:
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture(scope="session")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that changes what the tiny model says."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    settings = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    folder = tmp_path_factory.mktemp("model") / "adapter"
    get_peft_model(base, settings).save_pretrained(folder)
    return folder


def settings(tiny_model: Path, test_file: Path, **changes: object) -> EvaluationConfig:
    return EvaluationConfig(
        **{
            "model_path": str(tiny_model),
            "dataset_path": str(test_file),
            "metrics": ["perplexity", "field_f1", "exact_match"],
            "output_dir": str(test_file.parent / "report"),
            "decoding": {"max_new_tokens": 6},
            **changes,
        }
    )


@pytest.mark.ray
def test_an_adapter_is_evaluated_beside_its_base(
    ray_cluster: object, tiny_model: Path, adapter: Path, test_file: Path
) -> None:
    config = settings(tiny_model, test_file, model_path=str(adapter), base_model_path=str(tiny_model))
    evaluator = ModelEvaluator(config)
    result = evaluator.evaluate()
    assert [model.label for model in result.models] == ["base", "tuned"]
    for model in result.models:
        assert len(model.answers) == 9
        assert [answer.reference for answer in model.answers] == [row["messages"][1]["content"] for row in ROWS]
        nll, tokens = sum(a.nll for a in model.answers), sum(a.tokens for a in model.answers)
        assert model.values["perplexity"] == pytest.approx(math.exp(nll / tokens))
    assert result["base"].values["perplexity"] != result["tuned"].values["perplexity"]
    assert len(result.comparisons) == 3
    artifact = open_artifact(config.output_dir, ArtifactKind.REPORT)
    assert {parent.role for parent in artifact.manifest.parents} == {"base", "tuned", "dataset"}
    assert artifact.numbers["rows"] == 9
    assert artifact.numbers["tuned"]["perplexity"] == result.values["perplexity"]
    assert {"results.json", "report.md", "report.html", "answers/base.jsonl"} <= set(artifact.manifest.files)
    drawn = evaluator.visualize_results()
    assert {Path(path).name for path in drawn} >= {"metrics.svg", "metrics.png", "perplexity.svg", "lengths.png"}
    assert all(Path(path).read_bytes().startswith((b"<?xml", b"\x89PNG")) for path in drawn)


@pytest.mark.ray
def test_any_number_of_actors_gives_the_same_answers(
    ray_cluster: object, tiny_model: Path, adapter: Path, test_file: Path
) -> None:
    folder = test_file.parent
    two = compare_models(
        model_paths=[str(tiny_model), str(adapter)],
        dataset_path=str(test_file),
        metrics=["perplexity", "accuracy"],
        output_dir=str(folder / "comparison"),
        decoding=DecodingConfig(max_new_tokens=6),
        num_actors=2,
    )
    assert [model.label for model in two.models] == ["tiny", "adapter"]
    one = ModelEvaluator(settings(tiny_model, test_file, metrics=["perplexity", "accuracy"], num_actors=1)).evaluate()
    for first, second in zip(one.model.answers, two["tiny"].answers, strict=True):
        assert (first.id, first.answer, first.finish_reason) == (second.id, second.answer, second.finish_reason)
        assert first.nll == pytest.approx(second.nll, rel=1e-5)
    path = generate_evaluation_report(two, str(folder / "comparison_report.md"))
    assert Path(path).read_text().startswith("# Comparison of tiny and adapter")


@pytest.mark.ray
def test_an_endpoint_that_fails_stops_the_report_and_the_next_attempt_asks_only_for_what_is_missing(
    ray_cluster: object, tiny_model: Path, test_file: Path, server: Any
) -> None:
    def flaky(text: str, times: int) -> tuple[int, object]:
        return (200, "<html>") if server.down and text.startswith("order 3") else (200, server.completion(text))

    server.down, server.behaviour = True, flaky
    folder = test_file.parent / "report"
    config = ComparisonConfig(
        model_paths=(str(tiny_model), server.url),
        dataset_path=str(test_file),
        metrics=("accuracy",),
        output_dir=str(folder),
        decoding=DecodingConfig(max_new_tokens=4),
        endpoint={"max_retries": 1, "backoff_s": 0.01},
    )
    with pytest.raises(RunError, match=r"1 of 9 rows has no answer of v1; the first is row 4: answered with"):
        run.compare(config)
    # What is kept of the first attempt is taken as it is: a changed word in it comes out in the report.
    for piece in (folder / "pieces" / "answered" / "tiny").rglob("*.jsonl"):
        lines = [json.loads(line) for line in piece.read_text().splitlines()]
        piece.write_text("".join(json.dumps({**row, "answer": "kept"}) + "\n" for row in lines))
    server.down, before = False, sum(server.asked.values())
    result = read_result(run.compare(config))
    assert {answer.answer for answer in result["tiny"].answers} == {"kept"}
    assert [answer.answer for answer in result["v1"].answers] == [row["messages"][0]["content"] for row in ROWS]
    assert sum(server.asked.values()) == before + 1
    assert not (folder / "pieces").exists()
    assert [failure.error for failure in open_artifact(folder).manifest.failures] == ["RunError"]
    assert run.compare(config.with_overrides(num_actors=1)).location.uri == str(folder)  # found finished


@pytest.mark.ray
def test_rows_without_an_answer_may_be_left_out_and_are_told(ray_cluster: object, test_file: Path, server: Any) -> None:
    server.behaviour = lambda text, times: (400 if text.startswith("order 3") else 200, server.completion("x"))
    config = EvaluationConfig(
        model_path=f"{server.url}#tiny",
        dataset_path=str(test_file),
        metrics=("accuracy",),
        output_dir=str(test_file.parent / "report"),
        max_unanswered=1,
    )
    result = read_result(run.evaluate(config))
    assert (result.dataset["rows"], result.dataset["unanswered"], len(result.model.answers)) == (8, 1, 8)
    assert result.notes[0].startswith("1 row has no answer of model, left out of every value; the first is")


def test_likelihoods_are_not_asked_of_an_endpoint(test_file: Path) -> None:
    with pytest.raises(ConfigError, match="perplexity need likelihoods of given texts, and an endpoint"):
        run.evaluate(settings(test_file, test_file, model_path="http://127.0.0.1:9/v1"))


@pytest.mark.ray
@pytest.mark.soak
def test_a_killed_actor_is_replaced_and_its_kept_rows_are_not_computed_again(
    ray_cluster: object, tiny_model: Path, test_file: Path
) -> None:
    import threading

    import ray
    from ray.util.state import list_actors

    rows = [{**row, "messages": [{"role": "user", "content": f"{n} fox"}, row["messages"][1]]}
            for n, row in enumerate(ROWS * 60)]  # fmt: skip
    test_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = settings(tiny_model, test_file, metrics=["accuracy"], decoding={"max_new_tokens": 300}, num_actors=1)
    found: list[object] = []
    work = threading.Thread(target=lambda: found.append(run.evaluate(config)))
    work.start()
    pieces = test_file.parent / "report" / "pieces"
    deadline = time.monotonic() + 120
    while not list(pieces.rglob("*.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.05)
    kept = {path: path.stat().st_mtime_ns for path in pieces.rglob("*.jsonl")}
    actors = list_actors(ray.get_runtime_context().gcs_address, filters=[("state", "=", "ALIVE")])
    [actor] = [one for one in actors if "ModelActor" in one.class_name]
    os.kill(actor.pid, signal.SIGKILL)
    while work.is_alive():
        assert all(path.stat().st_mtime_ns == when for path, when in kept.items() if path.exists())
        work.join(0.5)
    assert len(found) == 1
    assert len(read_result(found[0]).model.answers) == len(rows)


@pytest.mark.ray
def test_what_a_worker_refuses_reaches_the_user_as_it_was_said(
    ray_cluster: object, tiny_model: Path, test_file: Path
) -> None:
    row = {"messages": [{"role": "user", "content": "fox " * 600}, {"role": "assistant", "content": "x"}]}
    test_file.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"^1 of 1 row has no answer of model; .* its prompt has \d+ tokens") as kept:
        run.evaluate(settings(tiny_model, test_file, metrics=["accuracy"]))
    import ray

    # The fault is still held here, and the actors that it came from hold no CPU any more.
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU") != 2.0 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert ray.available_resources()["CPU"] == 2.0
    assert kept.value is not None


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"metrics": ["rouge", "bleu"], "dataset_path": "nowhere.jsonl"}, DataError, "no such dataset"),
        ({"split": "train"}, ConfigError, r"split: .*test.jsonl is a single file, .*\(got 'train'\)"),
        ({"model_path": "{folder}"}, ModelError, "is not a model"),
        ({"model_path": "{folder}/nothing"}, ModelError, "no such model folder"),
    ],
)
def test_a_mistake_is_said_before_anything_is_written(
    tiny_model: Path, test_file: Path, changes: dict[str, object], kind: type[Exception], message: str
) -> None:
    folder = str(test_file.parent)
    given = {key: value.format(folder=folder) if isinstance(value, str) else value for key, value in changes.items()}
    with pytest.raises(kind, match=message):
        run.evaluate(settings(tiny_model, test_file, **given))
    assert [path.name for path in test_file.parent.iterdir()] == ["test.jsonl"]


def test_a_metric_that_does_not_fit_is_refused_before_a_model_is_loaded(tiny_model: Path, test_file: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}]
    test_file.write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(DataError, match="field_f1: does not fit this data"):
        run.evaluate(settings(tiny_model, test_file))


def test_a_folder_that_holds_something_else_is_left_alone(tiny_model: Path, test_file: Path) -> None:
    folder = test_file.parent / "report"
    with begin(folder, ArtifactKind.DATASET, settings={}):
        pass
    with pytest.raises(ArtifactError, match="Nothing was overwritten"):
        run.evaluate(settings(tiny_model, test_file))


def test_a_model_is_not_compared_with_itself() -> None:
    with pytest.raises(ConfigError, match="names m twice"):
        compare_models(["m", "m"], "d", ["perplexity"])


def test_one_model_or_metric_in_the_place_of_a_list_is_no_list_of_its_letters() -> None:
    with pytest.raises(ConfigError) as models:
        compare_models("http://h/v1#m", "d", ["perplexity"])
    assert str(models.value) == "ComparisonConfig: model_paths: must be a list (got 'http://h/v1#m')"
    with pytest.raises(ConfigError) as metrics:
        compare_models(["a", "b"], "d", "exact_match")
    assert str(metrics.value) == "ComparisonConfig: metrics: must be a list (got 'exact_match')"
    with pytest.raises(ConfigError, match=r"^ComparisonConfig: model_paths: must be a list \(got PosixPath\('m'\)\)$"):
        compare_models(Path("m"), "d", (EvaluationMetric.PERPLEXITY,))

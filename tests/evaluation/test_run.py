"""The whole evaluation on a tiny model, with real Ray."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest

from raytune_ft.core.artifacts import open_artifact
from raytune_ft.core.draft import begin
from raytune_ft.core.errors import ArtifactError, ConfigError, DataError, ModelError, RunError
from raytune_ft.core.manifest import ArtifactKind
from raytune_ft.evaluation import run
from raytune_ft.evaluation.config import EvaluationConfig
from raytune_ft.evaluation.results import Answer
from raytune_ft.evaluation.rows import EvaluationRows
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


def test_finished_work_is_found_and_a_second_attempt_keeps_the_answers_of_the_first(
    tiny_model: Path, adapter: Path, test_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[str] = []

    def failing_once(config: EvaluationConfig, label: str, path: str, rows: EvaluationRows) -> tuple[Answer, ...]:
        computed.append(label)
        if computed == ["base", "tuned"]:
            raise RunError("the node went away")
        return tuple(
            Answer(record.id, "?", record.answer, nll=2.0 + len(computed), tokens=1) for record in rows.records
        )

    monkeypatch.setattr(run, "_answers", failing_once)
    config = settings(
        tiny_model, test_file, metrics=["perplexity"], model_path=str(adapter), base_model_path=str(tiny_model)
    )
    with pytest.raises(RunError, match="the node went away"):
        run.evaluate(config)
    artifact = run.evaluate(config)
    assert computed == ["base", "tuned", "tuned"]
    assert [failure.message for failure in artifact.manifest.failures] == ["the node went away"]
    assert artifact.numbers["base"]["perplexity"] == pytest.approx(math.exp(3))
    assert run.evaluate(config.with_overrides(num_actors=1)).digest == artifact.digest
    assert len(computed) == 3


@pytest.mark.ray
def test_what_a_worker_refuses_reaches_the_user_as_it_was_said(
    ray_cluster: object, tiny_model: Path, test_file: Path
) -> None:
    test_file.write_text(json.dumps({"text": "fox " * 600}) + "\n")
    with pytest.raises(DataError, match=r"^row 1 has \d+ tokens, more than the 512") as kept:
        run.evaluate(settings(tiny_model, test_file, metrics=["perplexity"]))
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

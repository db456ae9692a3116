from __future__ import annotations

from pathlib import Path

import pytest

from raytune_ft.core.config import load_config
from raytune_ft.core.errors import ConfigError
from raytune_ft.evaluation.config import ComparisonConfig, EvaluationConfig, EvaluationMetric


def evaluation(**changes: object) -> EvaluationConfig:
    return EvaluationConfig(**{"model_path": "m", "dataset_path": "d", "metrics": ["perplexity"], **changes})


def test_metrics_are_taken_by_name_or_member_and_once() -> None:
    config = evaluation(metrics=["perplexity", EvaluationMetric.ACCURACY, "perplexity"])
    assert config.metrics == (EvaluationMetric.PERPLEXITY, EvaluationMetric.ACCURACY)


@pytest.mark.parametrize(
    ("name", "near"), [("rogue", "rouge"), ("Exact_Match", "exact_match"), ("perplexty", "perple")]
)
def test_an_unknown_metric_names_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"metrics.1: there is no such metric; did you mean {near}"):
        evaluation(metrics=["bleu", name])


def test_a_metric_like_no_other_lists_the_known(tmp_path: Path) -> None:
    path = tmp_path / "evaluate.yaml"
    path.write_text("model_path: m\ndataset_path: d\nmetrics: [zzz]\n")
    with pytest.raises(ConfigError, match=r"evaluate.yaml: metrics.0: there is no such metric; known: perplexity, .*"):
        load_config(EvaluationConfig, path)


def test_a_list_of_faulty_items_is_not_called_too_short() -> None:
    with pytest.raises(ConfigError) as found:
        evaluation(metrics=["rougeL"])
    assert str(found.value) == (
        "EvaluationConfig: metrics.0: there is no such metric; did you mean rouge? (got 'rougeL')"
    )
    with pytest.raises(ConfigError) as found:
        ComparisonConfig(model_paths=[""], dataset_path="d", metrics=["bleu"])
    assert [line.split(": ", 1)[1] for line in str(found.value).splitlines()] == [
        "model_paths.0: must not be empty (got '')",
        "model_paths: must have at least 2 items (got [''])",
    ]


def test_no_metric_is_refused() -> None:
    with pytest.raises(ConfigError, match="metrics: must have at least 1"):
        evaluation(metrics=[])


def test_a_tokenizer_of_bleu_without_bleu_is_refused() -> None:
    with pytest.raises(ConfigError, match="bleu_tokenizer: has no effect without the metric bleu"):
        evaluation(bleu_tokenizer="char")
    assert evaluation(metrics=["bleu"], bleu_tokenizer="char").bleu_tokenizer == "char"


def test_a_base_comes_first_and_makes_the_model_the_tuned_one() -> None:
    assert evaluation().models == {"model": "m"}
    assert list(evaluation(base_model_path="b").models.items()) == [("base", "b"), ("tuned", "m")]


def test_how_many_actors_compute_does_not_make_another_evaluation() -> None:
    assert evaluation(num_actors=1).identity() == evaluation(num_actors=2, output_dir="x").identity()
    assert evaluation(seed=1).identity() != evaluation(seed=2).identity()


def test_compared_models_are_labelled_by_what_tells_them_apart() -> None:
    settings = {"dataset_path": "d", "metrics": ["bleu"]}
    assert list(ComparisonConfig(model_paths=["runs/a", "runs/b/"], **settings).models) == ["a", "b"]
    assert list(ComparisonConfig(model_paths=["one/model", "two/model"], **settings).models) == [
        "one/model",
        "two/model",
    ]
    with pytest.raises(ConfigError, match="names runs/a twice"):
        ComparisonConfig(model_paths=["runs/a", "runs/a"], **settings)

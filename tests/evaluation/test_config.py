from __future__ import annotations

from pathlib import Path

import pytest

from raytune_ft.core.config import load_config
from raytune_ft.core.errors import ConfigError
from raytune_ft.evaluation.config import ComparisonConfig, EvaluationConfig, EvaluationMetric
from raytune_ft.evaluation.config_inference import BatchGenerationConfig, EndpointConfig


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


SERVED = "http://host:8000/v1"
BY_TOKENIZER = {"model_path": SERVED, "endpoint": {"tokenizer": "t"}}


@pytest.mark.parametrize(
    ("given", "words", "mended"),
    [
        ({"bleu_tokenizer": "char"}, "without the metric bleu; add that", {"metrics": ["bleu"]}),
        ({"extraction": "gsm8k"}, "without the metric accuracy or exact_match", {"metrics": ["accuracy", "bleu"]}),
        ({"extraction": "gsm8k"}, "without the metric accuracy or exact_match", {"metrics": ["exact_match"]}),
        ({"json_schema": "schema.json"}, "without the metric json_schema", {"metrics": ["json_schema"]}),
        ({"custom_functions": {"f": "m:f"}}, "without the metric custom", {"metrics": ["custom"]}),
        ({"production_embedder": "e"}, "without production_path", {"production_path": "feedback"}),
        ({"decoding": {"max_new_tokens": 9}}, "no answers are generated for perplexity", {"metrics": ["bleu"]}),
        (
            {"metrics": ["bleu"], "decoding": {"top_p": 0.5}},
            "at temperature 0",
            {"decoding": {"top_p": 0.5, "temperature": 1}},
        ),
        (
            {"metrics": ["bleu"], "decoding": {"seed": 1}},
            "at temperature 0",
            {"decoding": {"seed": 1, "temperature": 1}},
        ),
        ({"endpoint": {"timeout_s": 9}}, "no model is given as the URL", {"base_model_path": SERVED}),
        ({**BY_TOKENIZER, "metrics": ["bleu"]}, "where no likelihoods", {"metrics": ["bleu", "perplexity"]}),
        ({**BY_TOKENIZER, "precision": "bf16"}, "an endpoint computes as it was", {"base_model_path": "b"}),
        ({**BY_TOKENIZER, "allow_leak": True}, "is not known", {"base_model_path": "b"}),
        ({**BY_TOKENIZER, "near_duplicate": 0.9}, "is not known", {"previous_model_path": "b"}),
        (
            {**BY_TOKENIZER, "harness": {"tasks": ["t"], "batch_size": 2}},
            "an endpoint computes as it was",
            {"base_model_path": "b"},
        ),
        *(
            ({**BY_TOKENIZER, "forgetting": {name: value}}, "only the shipped questions", {"base_model_path": "b"})
            for name, value in {"text_path": "t", "max_perplexity_rise": 0.5}.items()
        ),
        (
            {"harness": {"tasks": ["t"], "endpoint_tokenizer": "t"}},
            "no model is given as the URL",
            {"previous_model_path": SERVED},
        ),
    ],
)
def test_a_setting_without_effect_is_refused(given: dict, words: str, mended: dict) -> None:
    with pytest.raises(ConfigError, match=rf"EvaluationConfig: (\S+): has no effect.*{words}") as refused:
        evaluation(**given)
    name = str(refused.value).split(": ")[1].partition(".")[0]
    assert name in given
    assert evaluation(**{**given, **mended}).differs(name)


def test_a_wait_before_retries_that_nobody_makes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"backoff_s: nothing is asked again \(max_retries is 0\)"):
        EndpointConfig(max_retries=0, backoff_s=2)
    assert EndpointConfig(max_retries=1, backoff_s=2).backoff_s == 2


def test_answers_of_an_endpoint_are_judged_in_the_precision_that_is_set() -> None:
    judged = {"metrics": ["reward"], "reward_model_path": "r"}
    assert evaluation(model_path=SERVED, precision="bf16", **judged).precision == "bf16"


def test_a_base_is_named_or_left_out() -> None:
    with pytest.raises(ConfigError, match=r"compare_with_base: false, and base_model_path names a base .*\(b\)"):
        evaluation(base_model_path="b", compare_with_base=False)


def test_a_comparison_refuses_what_would_change_nothing_too() -> None:
    models = {"model_paths": ["a", "b"], "dataset_path": "d", "metrics": ["bleu"]}
    with pytest.raises(ConfigError, match=r"endpoint\.concurrency: has no effect"):
        ComparisonConfig(**models, endpoint={"concurrency": 2})
    assert ComparisonConfig(**{**models, "model_paths": ["a", SERVED]}, endpoint={"concurrency": 2})


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"decoding": {"top_p": 0.5}}, "decoding.top_p"),
        ({"endpoint": {"timeout_s": 9}}, "endpoint.timeout_s"),
        ({"model_path": SERVED, "endpoint": {"tokenizer": "t"}}, "endpoint.tokenizer"),
        ({"model_path": SERVED, "precision": "bf16"}, "precision"),
    ],
)
def test_batch_generation_refuses_what_would_change_nothing(given: dict, name: str) -> None:
    with pytest.raises(ConfigError, match=f"BatchGenerationConfig: {name}: has no effect"):
        BatchGenerationConfig(**{"model_path": "m", "dataset_path": "d", **given})


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

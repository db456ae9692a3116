"""One file of settings becomes every step's own, with the joints filled in."""

from __future__ import annotations

from pathlib import Path

import pytest

from raytune_ft.core.config import Config
from raytune_ft.core.errors import ConfigError, DataError
from raytune_ft.core.storage import Location
from raytune_ft.data.config import DataCollectionConfig
from raytune_ft.evaluation.config import EvaluationConfig
from raytune_ft.pipeline.config import FOLDERS, GateConfig, PipelineConfig
from raytune_ft.pipeline.sources import placed
from raytune_ft.serving.config import ServingConfig
from raytune_ft.training.config import FineTuningConfig
from raytune_ft.training.without_effect import without_effect
from raytune_ft.tuning.config import SweepConfig

SETTINGS = {
    "storage_path": "/runs/a",
    "model_path": "m",
    "prepare": {"sources": ["a.jsonl"]},
    "tune": {"space": {"lora_r": [4, 8]}, "training": {"max_steps": 4}},
    "train": {"learning_rate": 0.001, "num_workers": 2},
    "evaluate": {"metrics": ["perplexity"]},
    "quantize": {},
    "serve": {},
}


def test_what_one_step_makes_is_what_the_next_one_takes() -> None:
    config = PipelineConfig(**SETTINGS)
    assert config.prepare.output_path == "/runs/a/dataset"
    assert config.train.dataset_path == config.prepare.output_path
    assert config.evaluate is not None and config.evaluate.model_path == config.train.output_dir == "/runs/a/tuned"
    assert config.evaluate.base_model_path == "m"
    assert config.quantize is not None and config.quantize.model_path == config.train.output_dir
    assert config.serve is not None and config.serve.model_path == config.quantize.output_dir


def test_preferences_are_learned_from_where_training_ended_and_the_rest_takes_the_result() -> None:
    changes = {
        "align": {"dataset_path": "p.jsonl"},
        "prune": {"target_sparsity": 0.3},
        "ladder": {"metrics": ["rouge"]},
    }
    config = PipelineConfig(**{**SETTINGS, **changes, "train": {"lora_r": 16, "lora_target_modules": "all-linear"}})
    assert config.align is not None and config.evaluate is not None and config.ladder is not None
    assert (config.align.model_path, config.align.adapter_path) == ("m", "/runs/a/tuned")
    assert (config.align.lora_r, config.align.lora_target_modules) == (16, "all-linear")
    assert config.align.output_dir == config.evaluate.model_path == config.ladder.model_paths[0] == "/runs/a/aligned"
    assert config.prune is not None and config.prune.model_path == "/runs/a/aligned"
    whole = PipelineConfig(
        **{
            **SETTINGS,
            "tune": {"space": {"learning_rate": [1e-5, 1e-4]}, "training": {"max_steps": 4}},
            "align": {"dataset_path": "p", "method": "full"},
            "train": {"method": "full"},
        }
    )
    assert whole.align is not None
    assert (whole.align.model_path, whole.align.adapter_path) == ("/runs/a/tuned", None)
    with pytest.raises(ConfigError, match=r"tune\.objective: the search is for the settings of train \(got align\)"):
        PipelineConfig(**{**SETTINGS, "tune": {"objective": "align", "space": {"lora_r": [4, 8]}}})
    with pytest.raises(ConfigError, match=r"align\.dataset_path: is required"):
        PipelineConfig(**SETTINGS, align={})
    with pytest.raises(ConfigError, match=r"align: .*no reference"):
        PipelineConfig(
            **{**SETTINGS, "tune": None, "align": {"dataset_path": "p"}, "train": {"method": "prefix_tuning"}}
        )


def test_a_further_round_is_compared_with_the_model_in_use_and_has_a_gate() -> None:
    config = PipelineConfig(**SETTINGS, previous_path="/runs/before/tuned")
    assert config.evaluate is not None
    assert config.evaluate.models == {"base": "m", "previous": "/runs/before/tuned", "tuned": "/runs/a/tuned"}
    assert config.gate_settings == GateConfig(max_drop=0.0)
    assert PipelineConfig(**SETTINGS).gate_settings is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluate": None, "gate": {}}, "gate, previous_path: models are compared by their evaluation"),
        ({"evaluate": None, "previous_path": "x"}, "name evaluate, too"),
        ({"gate": {"metric": "rouge"}}, r"gate.metric: rouge is not among evaluate.metrics \(perplexity\)"),
        ({"gate": {"max_drop": -1}}, "max_drop"),
        ({"gate": {"drop": 1}}, "drop"),
    ],
)
def test_a_gate_without_figures_is_refused(changes, message) -> None:
    with pytest.raises(ConfigError, match=message):
        PipelineConfig(**{**SETTINGS, **changes})


@pytest.mark.parametrize(
    ("own", "shape"), [({}, (1, 6)), ({"gradient_accumulation_steps": 2}, (1, 2)), ({"num_workers": 2}, (2, 3))]
)
def test_trials_have_the_global_batch_of_the_training_unless_told_otherwise(
    own: dict[str, int], shape: tuple[int, int]
) -> None:
    changed = {"train": {**SETTINGS["train"], "gradient_accumulation_steps": 3}}  # type: ignore[dict-item]
    config = PipelineConfig(**{**SETTINGS, **changed, "tune": {"space": {"lora_r": [4, 8]}, "training": own}})
    assert config.tune is not None
    trial = config.tune.training
    assert (trial.num_workers, trial.gradient_accumulation_steps) == shape


def test_what_is_pruned_is_healed_quantized_measured_and_served() -> None:
    config = PipelineConfig(
        **{**SETTINGS, "prune": {}, "heal": {"max_steps": 4}, "ladder": {"metrics": ["perplexity"]}}
    )
    assert config.prune is not None and config.prune.model_path == "/runs/a/tuned"
    assert config.heal is not None and (config.heal.model_path, config.heal.method) == ("/runs/a/pruned", "full")
    assert (config.heal.dataset_path, config.heal.output_dir) == ("/runs/a/dataset", "/runs/a/healed")
    assert config.quantize is not None and config.quantize.model_path == "/runs/a/healed"
    assert config.ladder is not None
    assert config.ladder.model_paths == tuple(f"/runs/a/{n}" for n in ("tuned", "pruned", "healed", "quantized"))
    assert config.serve is not None and config.serve.model_path == "/runs/a/quantized"
    bare = {key: value for key, value in SETTINGS.items() if key != "quantize"}
    served = PipelineConfig(**{**bare, "prune": {}}).serve
    assert served is not None and served.model_path == "/runs/a/pruned"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heal": {"max_steps": 4}}, "heal: trains what prune made"),
        ({"ladder": {"metrics": ["perplexity"]}, "quantize": None}, "ladder: there is no smaller version"),
    ],
)
def test_steps_that_need_another_one_say_so(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PipelineConfig(**{**SETTINGS, **changes})


def test_trials_differ_from_training_only_where_the_search_says() -> None:
    config = PipelineConfig(**SETTINGS)
    assert config.tune is not None
    assert (config.tune.training.learning_rate, config.tune.training.max_steps) == (0.001, 4)
    assert (config.tune.training.num_workers, config.train.num_workers) == (1, 2)


@pytest.mark.parametrize("own", [5, "x", ["x"]])
def test_training_settings_of_trials_that_are_none_are_refused_by_name(own: object) -> None:
    with pytest.raises(ConfigError, match=r"tune\.training: must be a mapping of settings"):
        PipelineConfig(**{**SETTINGS, "tune": {"space": {"lora_r": [4, 8]}, "training": own}})


def test_trials_may_be_given_their_settings_as_an_object() -> None:
    own = FineTuningConfig(model_path="other", dataset_path="other", output_dir="other", max_steps=4)
    config = PipelineConfig(**{**SETTINGS, "tune": {"space": {"lora_r": [4, 8]}, "training": own}})
    assert config.tune is not None
    trial = config.tune.training
    assert (trial.max_steps, trial.learning_rate, trial.model_path) == (4, 0.001, "m")
    assert (trial.dataset_path, trial.output_dir) == ("/runs/a/dataset", "/runs/a/sweep/trials")


def test_a_search_whose_best_settings_would_mean_something_else_in_the_training_is_refused() -> None:
    population = {"scheduler": "pbt", "space": {"learning_rate": [1e-4, 1e-3]}}
    with pytest.raises(ConfigError, match=r"tune\.scheduler: under pbt settings change on the way"):
        PipelineConfig(**{**SETTINGS, "tune": population})
    batches: dict[str, object] = {"space": {"gradient_accumulation_steps": [1, 2]}}
    with pytest.raises(ConfigError, match=r"gradient_accumulation_steps: the same number .*num_workers: 2"):
        PipelineConfig(**{**SETTINGS, "tune": batches})
    assert PipelineConfig(**{**SETTINGS, "tune": {**batches, "training": {"num_workers": 2}}}).tune is not None
    assert PipelineConfig(**{**SETTINGS, "tune": batches, "train": {}}).tune is not None


def test_without_quantization_the_tuned_model_is_served() -> None:
    config = PipelineConfig(**{key: value for key, value in SETTINGS.items() if key != "quantize"})
    assert config.serve is not None and config.serve.model_path == "/runs/a/tuned"


def test_a_misspelt_key_deep_inside_says_where_and_what_was_meant() -> None:
    with pytest.raises(ConfigError, match=r"train.lerning_rate: there is no such setting; did you mean learning_rate"):
        PipelineConfig(**{**SETTINGS, "train": {"lerning_rate": 1}})


def test_shipped_data_is_placed_on_the_runs_storage(tmp_path: Path) -> None:
    where = placed("quickstart:orders.jsonl", Location.at(tmp_path))
    assert Path(where).parent == tmp_path / "sources"
    assert Path(where).read_text().count("\n") > 400
    assert placed("mine.jsonl", Location.at(tmp_path)) == "mine.jsonl"
    with pytest.raises(DataError, match=r"did you mean quickstart:orders.jsonl"):
        placed("quickstart:order.jsonl", Location.at(tmp_path))


def test_trials_leave_out_what_only_the_training_on_workers_has_a_use_for() -> None:
    train = {
        **SETTINGS["train"],  # type: ignore[dict-item]
        **{"offload": "optimizer", "cpus_per_worker": 0.5, "resume_from_checkpoint": "elsewhere/step-00000010"},
        **{"zero_stage": 1, "save_strategy": "steps", "save_steps": 7, "logging_steps": 3},
        "deepspeed_config": {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}},
    }
    config = PipelineConfig(**{**SETTINGS, "train": train})
    assert config.tune is not None and config.train.offload == "optimizer"
    trial = config.tune.training
    assert (trial.offload, trial.cpus_per_worker, trial.deepspeed_config) == ("none", None, None)
    assert (trial.resume_from_checkpoint, trial.zero_stage) == ("auto", 2)
    assert (trial.save_strategy, trial.save_steps, trial.logging_steps) == ("epoch", 500, 10)


EVERYTHING = {
    **SETTINGS,
    "tune": {"space": {"lora_r": [4, 8]}},
    "align": {"dataset_path": "pairs"},
    **{"prune": {}, "heal": {}, "ladder": {"metrics": ["perplexity"]}},
}


@pytest.mark.parametrize(
    ("step", "given"),
    [
        *((step, {"model_path": "other"}) for step in ("prepare", "train", "evaluate", "prune", "heal", "quantize")),
        *((step, {"output_dir": "other"}) for step in ("tune", "train", "align", "evaluate", "heal", "quantize")),
        *((step, {"dataset_path": "other"}) for step in ("train", "evaluate", "heal", "ladder")),
        *(("evaluate", {name: "other"}) for name in ("base_model_path", "previous_model_path")),
        *(("align", {name: "other"}) for name in ("model_path", "adapter_path")),
        ("prepare", {"output_path": "other"}),
        ("serve", {"model_path": "other"}),
        ("ladder", {"model_paths": ["a", "b"]}),
        ("tune", {"training": {"dataset_path": "other"}}),
    ],
)
def test_what_follows_from_the_pipeline_cannot_be_given_otherwise(step: str, given: dict) -> None:
    [name] = given if "training" not in given else ["training.dataset_path"]
    with pytest.raises(ConfigError, match=rf"PipelineConfig: {step}\.{name}: follows from the pipeline.*; leave it"):
        PipelineConfig(**{**EVERYTHING, step: {**EVERYTHING[step], **given}})


HERE = {"model_path": "m", "dataset_path": "/runs/a/dataset"}


@pytest.mark.parametrize(
    ("step", "given", "name"),
    [
        ("prepare", DataCollectionConfig(sources=["a.jsonl"], output_path="other"), "output_path"),
        ("train", FineTuningConfig(**HERE, output_dir="other"), "output_dir"),
        ("train", FineTuningConfig(**{**HERE, "dataset_path": "other"}, output_dir="/runs/a/tuned"), "dataset_path"),
        ("evaluate", EvaluationConfig(**HERE, metrics=["bleu"]), "model_path"),
        ("serve", ServingConfig(model_path="other"), "model_path"),
        ("tune", SweepConfig(output_dir="o", training=HERE, space={"lora_r": [4, 8]}), "output_dir"),
        (
            "tune",
            SweepConfig(output_dir="/runs/a/sweep", training={**HERE, "model_path": "other"}, space={"lora_r": [4, 8]}),
            "training.model_path",
        ),
    ],
)
def test_what_follows_from_the_pipeline_cannot_be_given_otherwise_in_an_object(
    step: str, given: Config, name: str
) -> None:
    with pytest.raises(ConfigError, match=rf"PipelineConfig: {step}\.{name}: follows from the pipeline, and is "):
        PipelineConfig(**{**EVERYTHING, step: given})


def test_settings_of_a_step_may_be_an_object_and_say_the_same_as_a_mapping() -> None:
    whole = PipelineConfig(**EVERYTHING)
    own = {"learning_rate": 0.01, "lora_r": 16}
    mapped = PipelineConfig(**{**EVERYTHING, "train": own, "heal": {"max_steps": 4}})
    train = FineTuningConfig(**HERE, output_dir="/runs/a/tuned", **own)
    heal = FineTuningConfig(
        model_path="/runs/a/pruned", dataset_path="/runs/a/dataset", output_dir="/runs/a/healed", max_steps=4
    )
    assert PipelineConfig(**{**EVERYTHING, "train": train, "heal": heal}) == mapped
    assert mapped.tune.training.lora_r == mapped.align.lora_r == 16 and mapped.heal.method == "full"
    objects = {step: getattr(whole, step) for step in EVERYTHING if step in FOLDERS}
    assert PipelineConfig(**{**EVERYTHING, **objects}) == whole
    copy = EvaluationConfig(model_path="/runs/a/aligned", dataset_path="/runs/a/dataset", metrics=["perplexity"])
    found = PipelineConfig(**{**EVERYTHING, "evaluate": copy.with_overrides(seed=1)}).evaluate
    assert (found.seed, found.output_dir) == (1, "/runs/a/evaluation")


def test_what_follows_may_be_said_as_it_is_and_follows_anew() -> None:
    config = PipelineConfig(**EVERYTHING)
    assert PipelineConfig(**config.model_dump()) == config
    assert config.train.output_dir == "/runs/a/tuned"
    moved = config.with_overrides(storage_path="/runs/b", model_path="n")
    assert moved == PipelineConfig(**{**EVERYTHING, "storage_path": "/runs/b", "model_path": "n"}).with_overrides()
    assert (moved.heal.model_path, moved.tune.training.model_path) == ("/runs/b/pruned", "n")


def test_further_training_of_an_adapter_keeps_its_shape() -> None:
    with pytest.raises(ConfigError, match=r"align\.lora_r: the adapter keeps the shape that it was"):
        PipelineConfig(**{**EVERYTHING, "align": {"dataset_path": "pairs", "lora_r": 64}})
    same = {"train": {"lora_r": 64}, "align": {"dataset_path": "pairs", "lora_r": 64}}
    assert PipelineConfig(**{**EVERYTHING, **same}).align.lora_r == 64


def test_trials_take_nothing_over_that_their_own_settings_leave_without_effect() -> None:
    train = {"num_train_epochs": 2, "eval_strategy": "steps", "eval_steps": 50, "lora_r": 32}
    tune = {"space": {"learning_rate": [1e-4, 1e-3]}, "training": {"max_steps": 4, "eval_strategy": "epoch"}}
    found = PipelineConfig(**{**SETTINGS, "train": train, "tune": tune}).tune.training
    assert not without_effect(found)
    assert (found.max_steps, found.eval_strategy, found.lora_r) == (4, "epoch", 32)
    own = {**tune, "training": {**tune["training"], "eval_steps": 5}}
    said = PipelineConfig(**{**SETTINGS, "train": train, "tune": own}).tune.training
    assert list(without_effect(said)) == ["eval_steps"]

"""What later steps would refuse is told before the first one, and nothing that is finished is given up for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from raytune_ft.core.artifacts import Artifact
from raytune_ft.core.cluster import Cluster
from raytune_ft.core.draft import begin
from raytune_ft.core.errors import ArtifactError, ClusterError, ConfigError, DataError, UserError
from raytune_ft.core.manifest import ArtifactKind
from raytune_ft.core.placement import Node
from raytune_ft.core.records import Message, Record, records_to_table
from raytune_ft.pipeline.config import FOLDERS, PipelineConfig
from raytune_ft.pipeline.preflight import refuse_early, refuse_misfits, refuse_unfit


@pytest.fixture
def settings(tiny_model: Path, orders: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "storage_path": str(tmp_path / "runs"),
        "model_path": str(tiny_model),
        "prepare": {"sources": [str(orders)]},
        "train": {"max_steps": 2},
        "evaluate": {"metrics": ["perplexity"]},
        "quantize": {"bits": 8},
        "serve": {},
    }


def named(config: PipelineConfig) -> list[str]:
    return [name for name in FOLDERS if getattr(config, name) is not None]


def look_ahead(settings: dict[str, Any], **changes: Any) -> None:
    config = PipelineConfig(**{**settings, **changes})
    refuse_early(config, named(config))


def finish(config: PipelineConfig, name: str, **parents: Artifact) -> Artifact:
    kinds = {"tune": ArtifactKind.SWEEP, "evaluate": ArtifactKind.REPORT}
    draft = begin(
        config.storage / FOLDERS[name],
        kinds.get(name, ArtifactKind.MODEL),
        settings={},
        identity=getattr(config, name).identity(),
        parents=[parent.as_parent(role) for role, parent in parents.items()],
    )
    with draft:
        draft.write_json("content.json", {"step": name})
        draft.numbers["best_settings"] = {"lora_r": 8}
    return draft.artifact


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"deepspeed_config": "no.json"}}, r"train: deepspeed_config: no\.json cannot be read"),
        ({"train": {"adapter_path": "runs/no"}}, "train: adapter_path: runs/no: there is no such adapter folder"),
        ({"train": {"adapter_path": "./runs/no"}}, "train: .*runs/no: there is no such model folder"),
        ({"train": {"resume_from_checkpoint": "no"}}, "train: .*no: there is no such folder; resume_from_checkpoint"),
        ({"align": {"dataset_path": "no.jsonl"}}, r"align: .*no\.jsonl: there is no such file or folder"),
        ({"previous_path": "runs/no/tuned"}, "evaluate: .*runs/no/tuned: there is no such model folder"),
        (
            {"evaluate": {"metrics": ["json_schema"], "json_schema": "no.json"}},
            r"evaluate: .*no\.json",
        ),
        (
            {"evaluate": {"metrics": ["custom"], "custom_functions": {"a": "no_such_package:f"}}},
            "evaluate: custom_functions.a: 'no_such_package:f' cannot be imported",
        ),
        (
            {"evaluate": {"metrics": ["perplexity"], "forgetting": {"text_path": "no.txt"}}},
            r"evaluate: forgetting\.text_path: .*no\.txt: there is no such file",
        ),
        (
            {"evaluate": {"metrics": ["perplexity"], "production_path": "no"}},
            "evaluate: production_path: .*no: there is no such file or folder",
        ),
        ({"evaluate": {"metrics": ["reward"], "reward_model_path": "./no"}}, "evaluate: .*no: there is no such model"),
        ({"prune": {"method": "wanda", "calibration_path": "no.jsonl"}}, "prune: calibration_path: .*no.jsonl"),
        ({"prune": {"method": "structured", "pattern": "5:7"}}, "prune: .*: its input of 64 is not a multiple of 7"),
        ({"serve": {"adapters": {"a": "./no"}}}, "serve: .*no: there is no such model folder"),
        ({"serve": {"engine": "vllm"}}, "serve: engine: vllm does not load bitsandbytes weights"),
        ({"serve": {"engine": "vllm"}, "quantize": None}, "serve: engine: vllm serves no adapter as a model"),
        (
            {"ladder": {"metrics": ["perplexity"], "limits": {"max_drop": {"rouge": 0.1}}}},
            "ladder: limits.max_drop: rouge is not measured",
        ),
    ],
)
def test_what_a_later_step_would_refuse_is_refused_before_the_first(settings, changes, message) -> None:
    look_ahead(settings)
    with pytest.raises(UserError, match=message) as refused:
        look_ahead(settings, **changes)
    assert refused.value.exit_code == 2


def test_what_steps_of_the_pipeline_make_for_each_other_need_not_be_there(settings, tmp_path: Path) -> None:
    own = str(tmp_path / "runs" / "dataset")
    look_ahead(settings, prune={"method": "wanda", "calibration_path": own}, align={"dataset_path": own})


PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
RATED = {"prompt": "q", "completion": "a", "label": True}


def test_rows_that_align_cannot_learn_from_are_refused_before_the_first_step(settings, orders, tmp_path: Path) -> None:
    for name, row in (("pairs", PAIR), ("rated", RATED)):
        (tmp_path / f"{name}.jsonl").write_text("{not JSON}\n" + json.dumps(row) + "\n")
    pairs, rated = str(tmp_path / "pairs.jsonl"), str(tmp_path / "rated.jsonl")
    look_ahead(settings, align={"dataset_path": pairs})
    look_ahead(settings, align={"dataset_path": rated, "loss_type": "kto"})
    with pytest.raises(DataError, match=r"^align: rated.jsonl: row 2 is not a pair of a chosen and a .* loss_type dpo"):
        look_ahead(settings, align={"dataset_path": rated})
    with pytest.raises(DataError, match=r"^align: pairs.jsonl: row 2 is not an answer with a label .* loss_type kto"):
        look_ahead(settings, align={"dataset_path": pairs, "loss_type": "kto"})
    with pytest.raises(DataError, match=r"^align: .*: row 1 is not a pair"):
        look_ahead(settings, align={"dataset_path": str(orders)})


def prepared(folder: Path, records: list[Record]) -> str:
    draft = begin(folder, ArtifactKind.DATASET, settings={})
    with draft:
        (draft.folder / "train").mkdir()
        pq.write_table(records_to_table(records), draft.folder / "train/00000.parquet")
    return str(folder)


def test_a_dataset_that_align_cannot_learn_from_is_refused_before_the_first_step(settings, tmp_path: Path) -> None:
    one, two = (Message("assistant", text) for text in "ab")
    asked = (Message("user", "q"),)
    pair, rated = Record(asked, chosen=(one,), rejected=(two,)), Record((*asked, one), label=False)
    pairs, mixed = prepared(tmp_path / "pairs", [pair, pair]), prepared(tmp_path / "mixed", [pair, rated])
    look_ahead(settings, align={"dataset_path": pairs})
    with pytest.raises(DataError, match=r"align: .*mixed: 1 of 2 rows is no preference"):
        look_ahead(settings, align={"dataset_path": mixed})
    with pytest.raises(DataError, match=r"align: .*mixed: 1 of 2 rows is not rated"):
        look_ahead(settings, align={"dataset_path": mixed, "loss_type": "kto"})
    own = prepared(tmp_path / "runs/dataset", [pair, rated])
    config = PipelineConfig(**{**settings, "evaluate": None, "align": {"dataset_path": own}})
    with pytest.raises(DataError, match=r"align: .*dataset: 1 of 2 rows is no preference"):
        refuse_unfit(config, named(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prepare": {"sources": ["a"], "test_split": 0}}, "evaluate.split: wants rows of the test split"),
        ({"prepare": {"sources": ["a"], "test_split": 0}, "evaluate": None}, "serve: wants rows of the test split"),
        (
            {
                "prepare": {"sources": ["a"], "validation_split": 0},
                "evaluate": {"metrics": ["rouge"], "split": "validation"},
            },
            "evaluate.split: wants rows of the validation split",
        ),
        ({"train": {"method": "prompt_tuning"}}, "quantize: train.method prompt_tuning adds virtual tokens"),
    ],
)
def test_steps_that_could_not_follow_each_other_are_no_pipeline(settings, changes, message) -> None:
    with pytest.raises(ConfigError, match=message):
        PipelineConfig(**{**settings, **changes})
    given = {"sources": ["a"], "test_sources": ["b"]}
    assert PipelineConfig(**{**settings, "prepare": given}).prepare.test_split == 0


def test_finished_work_with_other_settings_is_told_before_the_first_step(settings) -> None:
    config = PipelineConfig(**settings)
    trained = finish(config, "train")
    finish(config, "evaluate", tuned=trained)
    look_ahead(settings)
    with pytest.raises(ArtifactError, match=r"evaluation: holds a finished report, made with other settings: metrics"):
        look_ahead(settings, evaluate={"metrics": ["perplexity", "rouge"]})
    (config.storage / "endpoint" / "notes.txt").write(b"mine")
    with pytest.raises(ArtifactError, match=r"endpoint: holds something else \(notes.txt\)"):
        look_ahead(settings)


def test_a_finished_training_is_held_to_the_best_settings_of_the_search(settings, tmp_path: Path) -> None:
    searched = {**settings, "tune": {"space": {"lora_r": [4, 8]}}}
    base = finish(PipelineConfig(**{**settings, "storage_path": str(tmp_path / "elsewhere")}), "train")
    found = PipelineConfig(**{**searched, "train": {"max_steps": 2, "lora_r": 8}})
    finish(found, "tune")
    finish(found, "train", model=base)
    look_ahead(searched)
    with pytest.raises(
        ArtifactError, match=r"tuned: holds a finished model, made with other settings: max_steps: 2 -> 3"
    ):
        look_ahead(searched, train={"max_steps": 3}, tune={**searched["tune"], "training": {"max_steps": 2}})


def test_a_setting_without_effect_does_not_count_for_work_that_is_there(settings) -> None:
    trials = {"max_steps": 2, "num_train_epochs": 2}  # as earlier versions took over from the training
    searched = {**settings, "tune": {"space": {"learning_rate": [1e-4, 1e-3]}, "training": trials}}
    config = PipelineConfig(**searched)
    finish(config, "tune")
    look_ahead(searched, tune={**searched["tune"], "training": {"max_steps": 2}})
    with pytest.raises(ArtifactError, match=r"sweep: holds a finished sweep.*: training\.max_steps: 2 -> 3\."):
        look_ahead(searched, tune={**searched["tune"], "training": {"max_steps": 3}})
    bare = {**settings, "storage_path": str(config.storage / "bare"), "train": {**trials, "lora_r": 8}}
    finish(PipelineConfig(**bare), "train")
    look_ahead(bare, train={"max_steps": 2, "lora_r": 8})


def test_finished_steps_that_another_one_now_comes_before_are_all_named(settings) -> None:
    config = PipelineConfig(**settings)
    trained = finish(config, "train")
    finish(config, "evaluate", tuned=trained)
    finish(config, "quantize", model=trained)
    look_ahead(settings)
    with pytest.raises(ArtifactError, match=r"quantized: was not made of \S+/pruned, .* Delete \S+/quantized and run"):
        look_ahead(settings, prune={})
    with pytest.raises(ArtifactError, match=r"Delete \S+/tuned, \S+/evaluation, \S+/quantized and run"):
        look_ahead(settings, tune={"space": {"lora_r": [4, 8]}})
    (config.storage / "tuned").delete()
    finish(config, "train", dataset=trained)  # of the same content
    look_ahead(settings)
    (config.storage / "tuned").delete()
    with pytest.raises(ArtifactError, match=r"evaluation: was not made of \S+/tuned, .* Delete \S+/evaluation, \S+/qu"):
        look_ahead(settings)


def test_processes_that_the_cluster_has_no_room_for_are_refused_before_the_first_step(settings) -> None:
    cluster = Cluster("x", "started", (Node(cpus=2),))
    for changes, message in (
        ({"train": {"num_workers": 3}}, "Resource plan of train: 3 train worker"),
        ({"serve": {"num_replicas": 3}}, "Resource plan of serve .*: 3 replica"),
    ):
        config = PipelineConfig(**{**settings, **changes})
        with pytest.raises(ClusterError, match=message):
            refuse_misfits(config, named(config), cluster)


def test_metrics_that_do_not_fit_the_test_rows_are_refused_once_these_are_there(settings, tmp_path: Path) -> None:
    config = PipelineConfig(**{**settings, "evaluate": {"metrics": ["accuracy"], "slice_by": ["nothing"]}})
    folder = Path(config.storage.path) / "dataset"
    folder.mkdir(parents=True)
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    (folder / "test.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    with pytest.raises(UserError, match="evaluate: slice_by"):
        refuse_unfit(config, named(config))
    (folder / "test.jsonl").write_text(json.dumps({"messages": messages[:1]}) + "\n")
    with pytest.raises(DataError, match=r"evaluate: .*1 of 1 rows .* have no reference"):
        refuse_unfit(config, named(config))

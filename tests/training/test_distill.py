"""Distillation against torch's own arithmetic, and on real Ray Train workers."""

from __future__ import annotations

import math
from itertools import islice
from pathlib import Path

import pytest
import torch

from raytune_ft.core.errors import ConfigError, ModelError
from raytune_ft.core.storage import Location
from raytune_ft.models.collate import pack
from raytune_ft.models.config import Precision
from raytune_ft.models.loading import load_model
from raytune_ft.training.batches import TokenRows
from raytune_ft.training.config import DistillationConfig
from raytune_ft.training.distill import DistillationLoss, kept_layers, refuse_other_tokens, soft_loss, write_student
from raytune_ft.training.engine import LocalLearner, make_trainee
from raytune_ft.training.schedule import Timetable


@pytest.fixture
def student(tiny_model: Path, tmp_path: Path) -> str:
    """One of the teacher's two layers."""
    write_student(str(tiny_model), Location.at(tmp_path / "student"), 1)
    return str(tmp_path / "student")


def distillation(tiny_model: Path, tmp_path: Path, **changes: object) -> DistillationConfig:
    common = {"teacher_path": str(tiny_model), "output_dir": str(tmp_path / "out"), "dataset_path": "given as splits"}
    return DistillationConfig(**{**common, "learning_rate": 1e-2, "logging_steps": 1, **changes})


def test_soft_loss_of_two_tokens_by_hand() -> None:
    # At T = 2 the logits 2 ln 3, 0 give 3/4 and 1/4, equal logits 1/2 and 1/2:
    # T^2 * KL = 4 * (3/4 ln(3/2) + 1/4 ln(1/2)).
    teacher = torch.tensor([[2 * torch.log(torch.tensor(3.0)), 0.0]])
    by_hand = 4 * (0.75 * torch.log(torch.tensor(1.5)) + 0.25 * torch.log(torch.tensor(0.5)))
    assert float(soft_loss(torch.zeros(1, 2), teacher, 2.0)) == pytest.approx(float(by_hand), abs=1e-6)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_the_mixed_loss_equals_whole_logits_of_padded_rows(weight, tiny_model, student, splits, tmp_path) -> None:
    config = distillation(tiny_model, tmp_path, model_path=student, hard_loss_weight=weight, temperature=1.5)
    trainee = make_trainee(config, "cpu")
    data = TokenRows(splits["train"], str(tmp_path / "cache"))
    rows = [data[number] for number in islice(range(len(data)), 5)]
    ours = trainee.loss(pack(rows))

    teacher, pupil = (
        load_model(str(path), precision=Precision.FP32, device="cpu").model for path in (tiny_model, student)
    )
    theirs = torch.zeros(())
    for row in rows:
        ids, kept = torch.tensor([row.input_ids]), torch.tensor(row.supervised)[1:]
        taught, said = (m(ids).logits[0, :-1][kept] / 1.5 for m in (teacher, pupil))
        p = taught.softmax(-1)
        soft = (p * (taught.log_softmax(-1) - said.log_softmax(-1))).sum() * 1.5**2
        hard = torch.nn.functional.cross_entropy(said * 1.5, ids[0, 1:][kept], reduction="sum")
        theirs = theirs + weight * hard + (1 - weight) * soft
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    hard_only = trainee.model.eval() and trainee.loss.eval()(pack(rows)).item()
    assert hard_only == pytest.approx(make_trainee_loss(student, rows), rel=1e-5)


def make_trainee_loss(path: str, rows) -> float:
    model = load_model(path, precision=Precision.FP32, device="cpu").model
    total = 0.0
    for row in rows:
        labels = [token if kept else -100 for token, kept in zip(row.input_ids, row.supervised, strict=True)]
        ids = torch.tensor([row.input_ids])
        count = sum(label != -100 for label in labels[1:])
        total += model(ids, labels=torch.tensor([labels])).loss.item() * count
    return total


def test_an_evaluation_is_the_usual_loss_without_the_teacher(tiny_model, student, splits, tmp_path) -> None:
    config = distillation(tiny_model, tmp_path, model_path=student, hard_loss_weight=0.3)
    trainee = make_trainee(config, "cpu")
    data = TokenRows(splits["validation"], str(tmp_path / "cache"))
    rows = [data[number] for number in range(len(data))]
    timetable = Timetable(1, 1, 0, None, None, 1)
    evaluated = LocalLearner(trainee, config, timetable, "cpu", lambda: [pack(rows)]).evaluate()
    mean = make_trainee_loss(student, rows) / len(pack(rows).targets)
    assert evaluated["eval_loss"] == pytest.approx(mean, rel=1e-5)
    assert evaluated["eval_perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)


def test_a_batch_without_targets_still_has_a_gradient(tiny_model, student, splits, tmp_path) -> None:
    trainee = make_trainee(distillation(tiny_model, tmp_path, model_path=student), "cpu")
    row = TokenRows(splits["train"], str(tmp_path / "cache"))[0]
    loss = trainee.loss(pack([row]).without_targets())
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.abs().max() for p in trainee.trainable().values())


def test_the_teacher_is_no_part_of_the_student(tiny_model, student, tmp_path) -> None:
    loss = make_trainee(distillation(tiny_model, tmp_path, model_path=student), "cpu").loss
    assert isinstance(loss, DistillationLoss)
    assert {name.partition(".")[0] for name, _ in loss.named_parameters()} == {"model"}
    assert sum(1 for name, _ in loss.named_parameters() if name.endswith("q_proj.weight")) == 1


def test_a_teacher_without_a_share_is_not_loaded(tiny_model, student, tmp_path) -> None:
    config = distillation(tiny_model, tmp_path, model_path=student, hard_loss_weight=1)
    trainee = make_trainee(config.with_overrides(teacher_path=str(tmp_path / "nowhere")), "cpu")
    assert not isinstance(trainee.loss, DistillationLoss)


def test_layers_are_kept_evenly() -> None:
    assert kept_layers(30, 4) == [0, 10, 19, 29]
    assert kept_layers(6, 1) == [0]
    with pytest.raises(ModelError, match=r"student_layers: must be below the teacher's 6 layers \(got 6\)"):
        kept_layers(6, 6)


def test_a_student_of_other_tokens_is_refused(tiny_model, tmp_path) -> None:
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(tiny_model)
    other.add_tokens(["<new>"])
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "other/config.json").write_text((tiny_model / "config.json").read_text())
    with pytest.raises(ModelError, match="its tokens are not those of the teacher"):
        refuse_other_tokens(str(tiny_model), str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "give either model_path"),
        ({"model_path": "x", "student_layers": 1}, "give either model_path"),
        ({"student_layers": 1, "method": "lora"}, "method full"),
    ],
)
def test_settings_that_contradict_are_refused(changes, message, tmp_path) -> None:
    with pytest.raises(ConfigError, match=message):
        DistillationConfig(
            **{"teacher_path": "t", "output_dir": "o", "dataset_path": "d", **changes},
        )


@pytest.mark.ray
def test_a_student_comes_nearer_to_its_teacher(ray_cluster, tiny_model, orders, tmp_path) -> None:
    import json

    from raytune_ft import distill_model
    from raytune_ft.core.artifacts import open_artifact

    teacher = load_model(str(tiny_model), precision=Precision.FP32, device="cpu")
    teacher.model.model.norm.weight.data *= 20  # random weights say nothing clearly; louder, they are worth following
    teacher.model.save_pretrained(tmp_path / "teacher")
    teacher.tokenizer.save_pretrained(tmp_path / "teacher")
    settings = {"dataset_path": str(orders), "student_layers": 1, "max_steps": 12, "hard_loss_weight": 0.0}
    config = distillation(
        tiny_model,
        tmp_path,
        **settings,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        num_workers=2,
        eval_strategy="no",
    )
    where = distill_model(str(tmp_path / "teacher"), str(tmp_path / "pupil"), config)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "pupil/history.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.7 * losses[0]
    artifact = open_artifact(where)
    assert {parent.role for parent in artifact.manifest.parents} == {"teacher", "dataset"}
    assert load_model(where).model.config.num_hidden_layers == 1
    assert not (tmp_path / "pupil/student").exists()

"""Learning from liked and disliked answers: the loss by hand and by whole logits, in other layouts, and as a verb."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from raytune_ft.core.errors import ConfigError, DataError, StoppedError
from raytune_ft.core.storage import Location
from raytune_ft.models.attention import attention
from raytune_ft.models.config import Precision
from raytune_ft.models.loading import load_model
from raytune_ft.training.config_alignment import PreferenceConfig
from raytune_ft.training.engine import LocalLearner, make_trainee
from raytune_ft.training.micro_batches import divided
from raytune_ft.training.pairs import refuse_unrated
from raytune_ft.training.peers import Peers
from raytune_ft.training.ratings import RatedLearner, RatedRows, RatedTerms, rated_loss
from raytune_ft.training.reference import set_reference
from raytune_ft.training.schedule import Timetable
from raytune_ft.training.session import Seat, train_in_process

from ..rows import rated_files  # noqa: TID252 - tests are no installed package
from .test_preference import history, padded_log_probabilities
from .test_ranks import on_ranks, run


@pytest.fixture
def rated(tiny_model: Path, tmp_path: Path) -> dict[str, list[str]]:
    """18 training answers and 6 validation answers."""
    return rated_files(tiny_model, tmp_path, train=18, validation=6)


@pytest.fixture
def kto(tiny_model: Path, tmp_path: Path):
    def make(**changes: object) -> PreferenceConfig:
        common = {
            **{"model_path": str(tiny_model), "output_dir": str(tmp_path / "out"), "dataset_path": "given as splits"},
            **{"num_train_epochs": 2, "learning_rate": 1e-3, "lora_target_modules": "all-linear", "report_to": []},
            **{"per_device_train_batch_size": 8, "per_device_eval_batch_size": 2, "warmup_steps": 0},
            **{"loss_type": "kto", "beta": 0.3},
        }
        return PreferenceConfig(**{**common, **changes})

    return make


def test_the_loss_of_answers_by_hand(kto) -> None:
    # beta 0.3, 10 ln(3)/3 nats above the point: a value of sigmoid(ln 3) = 3/4 if liked, of 1/4 if disliked.
    ratios = torch.full((2,), 10 * math.log(3) / 3 + 1.0)
    liked = torch.tensor([True, False])
    config = kto(desirable_weight=2.0, undesirable_weight=4.0)
    assert rated_loss(ratios, liked, RatedTerms.of(config).at(1.0)).tolist() == pytest.approx(
        [2 * 0.25, 4 * 0.75], abs=1e-6
    )


def test_prompts_stand_before_their_own_answer_and_before_that_of_the_next_row(tmp_path: Path) -> None:
    path = tmp_path / "rated.parquet"
    columns = {
        "input_ids": [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10, 11]],
        "supervised": [[False, True, False, True, True], [False, True], [False, False, True, False]],
        "label": [True, False, None],
    }
    pq.write_table(pa.table(columns), path)
    data = RatedRows([str(path)], str(tmp_path / "cache"))
    batch = data.packed([0, 2])
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 8, 9, 10, 11]]
    assert batch.targets.tolist() == [4, 5, 10]  # of the first row only the last answer
    assert batch.others.input_ids.tolist() == [[1, 2, 3, 7, 8, 9, 4, 5]]
    assert batch.others.targets.tolist() == [7, 4, 5]
    assert (batch.liked.tolist(), batch.items) == ([True, True], 2)
    data.reference = np.arange(6, dtype=np.float32).reshape(3, 2)
    parts = divided([data.packed([2, 1, 0])], 2)
    assert [part.reference.tolist() for part in parts] == [[[4, 5]], [[2, 3], [0, 1]]]
    assert [part.others.rows for part in parts] == [1, 2]
    assert [part.liked.tolist() for part in parts] == [[True], [False, True]]


def test_loss_and_point_equal_whole_logits_of_padded_rows(kto, rated, tiny_model, tmp_path: Path) -> None:
    config = kto(undesirable_weight=1.5)
    trainee = make_trainee(config, "cpu")
    data = RatedRows(rated["train"], str(tmp_path / "cache"))
    set_reference(data, range(len(data)), trainee.loss, Peers(), None)
    generator = torch.Generator().manual_seed(3)
    for parameter in trainee.trainable().values():  # away from its reference
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    numbers = [3, 11, 0, 7, 17]
    batch = data.packed(numbers)
    learner = RatedLearner(
        LocalLearner(trainee, config, Timetable(1, 1, 0, None, None, 1), "cpu", lambda: [batch]),
        trainee.loss,
        Peers(),
        lambda: divided([batch], 2),
    )
    found = learner.evaluate()

    def padded(model, answers: list[int]):
        rows = []
        for prompt, answer in zip(numbers, answers, strict=True):
            asked, said = data[prompt], data[answer]
            first, start = asked.supervised.index(True), said.supervised.index(True)
            kept = [False] * first + said.supervised[start:]
            rows.append((asked.input_ids[:first] + said.input_ids[start:], kept))
        return padded_log_probabilities(model, rows)[0]

    base = load_model(str(tiny_model), precision=Precision.FP32, device="cpu").model
    after = [(number + 1) % 18 for number in numbers]
    with torch.no_grad(), attention(trainee.model, "sdpa"):
        ratios, apart = ((padded(trainee.model, a) - padded(base, a)) for a in (numbers, after))
    point = max(0.0, float(apart.mean()))
    liked = [bool(number % 3) for number in numbers]
    values = torch.sigmoid(config.beta * (ratios - point)).tolist()
    by_hand = [1 - v if good else 1.5 * v for v, good in zip(values, liked, strict=True)]
    assert trainee.loss.point == pytest.approx(point, abs=1e-5)
    assert found["eval_loss"] == pytest.approx(sum(by_hand) / 5, rel=1e-4)
    right = [(ratio > point) == good for ratio, good in zip(ratios.tolist(), liked, strict=True)]
    assert found["eval_reward_accuracy"] == pytest.approx(sum(right) / 5)
    assert "eval_perplexity" not in found


def test_liked_answers_become_likelier_and_disliked_ones_less(kto, rated, tmp_path: Path) -> None:
    config = kto(num_train_epochs=8, learning_rate=5e-3)
    train_in_process(config, rated, Seat(), output=Location.at(tmp_path / "a"))
    losses = history(tmp_path / "a")
    assert losses[0] == pytest.approx(0.5, abs=1e-5)  # nothing is apart from its reference
    assert losses[-1] < 0.3
    assert history(tmp_path / "a", "kl")[0] == pytest.approx(0, abs=1e-5)
    assert history(tmp_path / "a", "eval_reward_accuracy")[-1] > 0.8


@pytest.mark.ray  # no Ray, but as long as a test with it
def test_layouts_and_a_stop_make_no_difference(kto, rated, tmp_path: Path) -> None:
    train_in_process(kto(), rated, Seat(), output=Location.at(tmp_path / "whole"))
    steps: list[int] = []
    small = kto(per_device_train_batch_size=2, gradient_accumulation_steps=4, max_tokens_per_micro_batch=60)
    with pytest.raises(StoppedError):
        train_in_process(
            small,
            rated,
            Seat(),
            output=Location.at(tmp_path / "small"),
            report=lambda step, metrics: steps.append(step),
            stop_wanted=lambda: len(steps) == 3,
        )
    train_in_process(small, rated, Seat(), output=Location.at(tmp_path / "small"))
    two = kto(per_device_train_batch_size=4, num_workers=2)
    on_ranks([run(two, tmp_path / "two")], rated, tmp_path, world_size=2)
    for name in ("small", "two"):
        for metric in ("loss", "kl", "eval_loss"):
            expected = history(tmp_path / "whole", metric)
            assert history(tmp_path / name, metric) == pytest.approx(expected, abs=1e-5), (name, metric)
        # At the first step nothing is apart from its reference, and rounding says on which side of it.
        expected = history(tmp_path / "whole", "reward_accuracy")[1:]
        assert history(tmp_path / name, "reward_accuracy")[1:] == pytest.approx(expected, abs=1e-5), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chosen_nll_weight": 0.1}, "chosen_nll_weight belongs to pairs"),
        ({"loss_type": "dpo", "desirable_weight": 2.0}, "belong to loss_type kto"),
        ({"label_smoothing": 0.1}, "label_smoothing belongs to loss_type dpo"),
        ({"metric_for_best_model": "eval_reward_margin"}, "eval_reward_margin is not among what is measured"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message, kto) -> None:
    with pytest.raises(ConfigError, match=message):
        kto(**changes)


def test_answers_without_a_rating_are_refused_by_count(splits, rated, tmp_path: Path) -> None:
    refuse_unrated(rated, "d")
    with pytest.raises(DataError, match="d: 22 of 22 rows are not rated"):
        refuse_unrated(splits, "d")

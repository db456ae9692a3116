"""Preference optimization against whole logits of padded rows, against itself in other layouts, and on Ray Train."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from raytune_ft.core.errors import ConfigError, StoppedError
from raytune_ft.core.storage import Location
from raytune_ft.models.attention import attention
from raytune_ft.models.config import Precision
from raytune_ft.models.loading import load_model
from raytune_ft.training.batches import TokenRows
from raytune_ft.training.config_alignment import PreferenceConfig
from raytune_ft.training.engine import make_trainee
from raytune_ft.training.guide import departures_from_guide
from raytune_ft.training.pairs import PairRows
from raytune_ft.training.peers import Peers
from raytune_ft.training.preference import direct_loss, identity_loss
from raytune_ft.training.reference import set_reference
from raytune_ft.training.session import Seat, train_in_process

from .test_ranks import on_ranks, run


@pytest.fixture
def preference(tiny_model: Path, tmp_path: Path):
    def make(**changes: object) -> PreferenceConfig:
        common = {
            **{"model_path": str(tiny_model), "output_dir": str(tmp_path / "out"), "dataset_path": "given as splits"},
            **{"num_train_epochs": 2, "learning_rate": 1e-3, "lora_target_modules": "all-linear", "report_to": []},
            **{"per_device_train_batch_size": 8, "per_device_eval_batch_size": 2, "warmup_steps": 0},
        }
        return PreferenceConfig(**{**common, **changes})

    return make


def history(folder: Path, name: str = "loss") -> list[float]:
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


def test_losses_of_one_pair_by_hand() -> None:
    # beta 0.5 and 2 ln 3 nats: the chosen one is preferred with probability sigmoid(ln 3) = 3/4.
    difference = torch.tensor([2 * math.log(3)])
    assert direct_loss(difference, 0.5).item() == pytest.approx(math.log(4 / 3), abs=1e-6)
    mixed = 0.9 * math.log(4 / 3) + 0.1 * math.log(4)
    assert direct_loss(difference, 0.5, 0.1).item() == pytest.approx(mixed, abs=1e-6)
    assert direct_loss(torch.zeros(1), 0.5).item() == pytest.approx(math.log(2), abs=1e-6)
    assert identity_loss(torch.tensor([3.0]), 0.25).item() == pytest.approx((3 - 2) ** 2)


def padded_log_probabilities(model, rows: list[tuple[list[int], list[bool]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed log-probabilities and numbers of the supervised tokens, by transformers on padded rows."""
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([row + [0] * (longest - len(row)) for row, _ in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row, _ in rows])
    kept = torch.tensor([marks + [False] * (longest - len(marks)) for _, marks in rows])[:, 1:]
    logits = model(ids, attention_mask=mask).logits[:, :-1].float()
    found = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return (found * kept).sum(1), kept.sum(1)


@pytest.mark.parametrize(
    "changes",
    [
        {"beta": 0.3, "label_smoothing": 0.1},
        {"loss_type": "ipo", "beta": 0.2},
        {"chosen_nll_weight": 0.5},
    ],
    ids=["dpo", "ipo", "with-likelihood"],
)
def test_the_loss_equals_whole_logits_of_padded_rows(changes, tiny_model, preference, pairs, tmp_path: Path) -> None:
    config = preference(**changes)
    trainee = make_trainee(config, "cpu")
    data = PairRows(pairs["train"], str(tmp_path / "cache"))
    set_reference(data, range(len(data)), trainee.loss, Peers(), None)
    generator = torch.Generator().manual_seed(3)
    for parameter in trainee.trainable().values():  # away from its reference
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    numbers = [3, 11, 0, 7]
    loss, accuracy, margin, chosen_reward, nll = trainee.loss.eval()(data.packed(numbers)).tolist()

    rows = []
    for number in numbers:
        for prefix in ("", "rejected_"):
            ids, supervised, _ = data.flat([number], prefix)
            rows.append((ids.tolist(), supervised.tolist()))
    base = load_model(str(tiny_model), precision=Precision.FP32, device="cpu").model
    with torch.no_grad(), attention(trainee.model, "sdpa"):
        said, counts = padded_log_probabilities(trainee.model, rows)
        reference, _ = padded_log_probabilities(base, rows)
    ratios = (said - reference).view(-1, 2)
    if config.loss_type == "ipo":
        means = ((said - reference) / counts).view(-1, 2)
        expected = (means[:, 0] - means[:, 1] - 1 / (2 * config.beta)).square()
    else:
        h = config.beta * (ratios[:, 0] - ratios[:, 1])
        expected = -(1 - config.label_smoothing) * F.logsigmoid(h) - config.label_smoothing * F.logsigmoid(-h)
    means = -(said / counts).view(-1, 2)[:, 0]
    assert loss == pytest.approx((expected + config.chosen_nll_weight * means).sum().item(), rel=1e-4)
    assert margin == pytest.approx(config.beta * (ratios[:, 0] - ratios[:, 1]).sum().item(), rel=1e-3, abs=1e-5)
    assert accuracy == (ratios[:, 0] > ratios[:, 1]).sum()
    assert chosen_reward == pytest.approx(config.beta * ratios[:, 0].sum().item(), rel=1e-3, abs=1e-5)
    assert nll == pytest.approx(means.sum().item(), rel=1e-4)


def test_before_the_first_step_every_pair_costs_ln_2_and_learning_ranks_them(preference, pairs, tmp_path: Path) -> None:
    config = preference(num_train_epochs=6, learning_rate=5e-3, beta=0.3)
    summary = train_in_process(config, pairs, Seat(), output=Location.at(tmp_path / "a"))
    losses = history(tmp_path / "a")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[-1] < 0.5 * losses[0]
    assert history(tmp_path / "a", "eval_reward_accuracy")[-1] == 1
    assert history(tmp_path / "a", "eval_reward_margin")[-1] > 2
    assert summary.metric == "eval_loss"
    assert not history(tmp_path / "a", "eval_perplexity")


@pytest.mark.parametrize("changes", [{"method": "full"}, {"method": "qlora"}, {"use_dora": True}], ids=str)
def test_other_methods_start_from_their_reference_and_learn(changes, preference, pairs, tmp_path: Path) -> None:
    config = preference(num_train_epochs=3, learning_rate=2e-3, beta=0.3, **changes)
    train_in_process(config, pairs, Seat(), output=Location.at(tmp_path / "a"))
    losses = history(tmp_path / "a")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.ray  # no Ray, but as long as a test with it
def test_layouts_make_no_difference(preference, pairs, tmp_path: Path) -> None:
    train_in_process(preference(), pairs, Seat(), output=Location.at(tmp_path / "whole"))
    layouts = {
        "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        "budget": {"max_tokens_per_micro_batch": 100},
    }
    for name, changes in layouts.items():
        train_in_process(preference(**changes), pairs, Seat(), output=Location.at(tmp_path / name))
    sharded = [
        preference(per_device_train_batch_size=4, num_workers=2, zero_stage=stage, method=method)
        for stage, method in ((2, "lora"), (3, "lora"))
    ]
    runs = [run(config, tmp_path / f"zero-{config.zero_stage}", cut_after=3) for config in sharded]
    again = [run(config, tmp_path / f"zero-{config.zero_stage}") for config in sharded]
    on_ranks([*runs, *again], pairs, tmp_path, world_size=2)
    for name in (*layouts, "zero-2", "zero-3"):
        for metric in ("loss", "reward_margin", "eval_loss", "eval_reward_accuracy"):
            expected = history(tmp_path / "whole", metric)
            assert history(tmp_path / name, metric) == pytest.approx(expected, abs=1e-5), (name, metric)


def test_a_stopped_run_goes_on_with_the_same_reference(preference, pairs, tmp_path: Path) -> None:
    config = preference(save_strategy="no")
    train_in_process(config, pairs, Seat(), output=Location.at(tmp_path / "unbroken"))
    steps = []
    with pytest.raises(StoppedError):
        train_in_process(
            config,
            pairs,
            Seat(),
            output=Location.at(tmp_path / "b"),
            report=lambda step, metrics: steps.append(step),
            stop_wanted=lambda: len(steps) == 3,
        )
    kept = tmp_path / "b/checkpoints/reference-train.npy"
    before = kept.read_bytes()
    train_in_process(config, pairs, Seat(), output=Location.at(tmp_path / "b"))
    assert kept.read_bytes() == before
    assert history(tmp_path / "b") == pytest.approx(history(tmp_path / "unbroken"), abs=1e-6)


def test_only_pairs_that_the_run_sees_are_scored_beforehand(preference, pairs, tmp_path: Path) -> None:
    import numpy as np

    config = preference(max_steps=1, save_strategy="steps", save_steps=1)
    train_in_process(config, pairs, Seat(), output=Location.at(tmp_path / "a"))
    scored = np.load(tmp_path / "a/checkpoints/reference-train.npy", allow_pickle=False)
    assert scored.shape == (18, 2)
    assert np.isfinite(scored).all(1).sum() == 8
    assert np.isfinite(np.load(tmp_path / "a/checkpoints/reference-validation.npy")).all()


def test_the_reference_has_the_adapter_that_the_run_goes_on_from(preference, settings, splits, pairs, tmp_path) -> None:
    train_in_process(settings(), splits, Seat(), output=Location.at(tmp_path / "supervised"))
    config = preference(adapter_path=str(tmp_path / "supervised"), max_steps=1)
    train_in_process(config, pairs, Seat(), output=Location.at(tmp_path / "a"))
    assert history(tmp_path / "a")[0] == pytest.approx(math.log(2), abs=1e-5)


def test_the_rows_of_examples_are_read_as_before(splits, tmp_path: Path) -> None:
    assert TokenRows.columns == ("input_ids", "supervised")
    assert len(TokenRows(splits["train"], str(tmp_path / "cache"))) == 18


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "prompt_tuning"}, "method: prompt_tuning starts from random virtual tokens"),
        ({"loss_type": "ipo", "label_smoothing": 0.1}, "label_smoothing belongs to loss_type dpo"),
        ({"loss_type": "ppo"}, "loss_type"),
        ({"metric_for_best_model": "eval_perplexity"}, "eval_perplexity is not among what is measured"),
        ({"beta": 0}, "beta"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message, preference) -> None:
    with pytest.raises(ConfigError, match=message):
        preference(**changes)


def test_the_guide_has_ranges_of_its_own_for_pairs(preference) -> None:
    assert not [words for words in departures_from_guide(preference(learning_rate=5e-6)) if "learning_rate" in words]
    (words,) = [words for words in departures_from_guide(preference(learning_rate=2e-4)) if "learning_rate" in words]
    assert "learning_rate is 0.0002; typical are 1e-06 to 5e-05" in words

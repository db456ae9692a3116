"""Reward models against transformers' own heads and PEFT's own loading, in other layouts, and as a verb."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from raytune_ft.core.errors import ConfigError, ModelError
from raytune_ft.core.storage import Location
from raytune_ft.models.attention import attention
from raytune_ft.models.chat import Encoded
from raytune_ft.models.collate import pack
from raytune_ft.models.config import Precision
from raytune_ft.models.loading import load_model
from raytune_ft.models.rewarding import RewardParts, load_reward_model, rewards, row_rewards
from raytune_ft.training.config_alignment import RewardConfig
from raytune_ft.training.engine import make_trainee
from raytune_ft.training.pairs import PairRows
from raytune_ft.training.session import Seat, train_in_process

from .test_preference import history
from .test_ranks import on_ranks, run


@pytest.fixture
def reward(tiny_model: Path, tmp_path: Path):
    def make(**changes: object) -> RewardConfig:
        common = {
            **{"model_path": str(tiny_model), "output_dir": str(tmp_path / "out"), "dataset_path": "given as splits"},
            **{"num_train_epochs": 6, "learning_rate": 5e-3, "lora_target_modules": "all-linear", "report_to": []},
            **{"per_device_train_batch_size": 8, "per_device_eval_batch_size": 2, "warmup_steps": 0},
        }
        return RewardConfig(**{**common, **changes})

    return make


def padded_logits(model, rows: list[list[int]], pad: int) -> list[float]:
    longest = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    with torch.no_grad():
        return model(ids, attention_mask=mask).logits[:, 0].tolist()


def test_the_token_that_is_read_is_the_last_that_is_no_padding() -> None:
    batch = pack([Encoded(row, [False] * len(row)) for row in ([5, 6, 0, 0], [7], [0, 8, 0], [0])])
    last = {}

    class Decoder(torch.nn.Module):
        def forward(self, input_ids, **_):
            class Out:
                last_hidden_state = input_ids[..., None].float()

            return Out

    for pad in (0, None):
        parts = RewardParts(Decoder(), torch.nn.Linear(1, 1, bias=False), pad)
        parts.head.weight.data.fill_(1.0)
        last[pad] = row_rewards(parts, batch).tolist()
    assert last == {0: [6, 7, 8, 0], None: [0, 7, 0, 0]}


def test_loss_and_measures_of_pairs_by_transformers_own_head(reward, pairs, tmp_path: Path) -> None:
    trainee = make_trainee(reward(center_rewards_weight=0.01), "cpu")
    data = PairRows(pairs["train"], str(tmp_path / "cache"))
    numbers = [3, 11, 0]
    found = trainee.loss.eval()(data.packed(numbers)).tolist()
    rows = [data.flat([number], prefix)[0].tolist() for number in numbers for prefix in ("", "rejected_")]
    with attention(trainee.model, "sdpa"):
        scores = torch.tensor(padded_logits(trainee.model, rows, trainee.tokenizer.pad_token_id)).view(-1, 2)
    chosen, rejected = scores.unbind(1)
    loss = (1 + (rejected - chosen).exp()).log() + 0.01 * (chosen + rejected) ** 2
    expected = [loss.sum(), (chosen > rejected).sum(), (chosen - rejected).sum(), chosen.sum()]
    assert found == pytest.approx([float(value) for value in expected], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_is_trained_ranks_pairs_and_plain_libraries_give_its_scores(
    method, reward, pairs, tiny_model, tmp_path: Path
) -> None:
    output = tmp_path / "a"
    train_in_process(reward(method=method, learning_rate=2e-3), pairs, Seat(), output=Location.at(output))
    assert history(output)[-1] < 0.5 * math.log(2)
    assert history(output, "eval_reward_accuracy")[-1] == 1
    assert not (output / "golden.json").exists()
    data = PairRows(pairs["validation"], str(tmp_path / "cache"))
    rows = [data.flat([number], prefix)[0].tolist() for number in range(len(data)) for prefix in ("", "rejected_")]
    ours = rewards(load_reward_model(str(output), precision=Precision.FP32), rows, token_budget=40)
    if method == "full":
        plain = AutoModelForSequenceClassification.from_pretrained(output)
    else:
        base = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
        plain = PeftModel.from_pretrained(base, output)
    assert padded_logits(plain.eval(), rows, plain.config.pad_token_id) == pytest.approx(ours, abs=1e-4)
    assert all(a > b for a, b in zip(ours[::2], ours[1::2], strict=True))


@pytest.mark.parametrize("bits", [4, 8])
def test_over_a_quantized_base_the_head_is_whole_and_training_goes_on_after_an_evaluation(
    bits, reward, pairs, tmp_path: Path
) -> None:
    config = reward(method="qlora", bits=bits, num_train_epochs=4, precision="fp32")
    head = make_trainee(config, "cpu").model.get_base_model().score
    assert head.weight.dtype is torch.float32 and head.weight.shape == (1, 64)
    train_in_process(config, pairs, Seat(), output=Location.at(tmp_path / "a"))
    assert history(tmp_path / "a")[-1] < 0.5 * history(tmp_path / "a")[0]
    assert history(tmp_path / "a", "eval_reward_accuracy")[-1] == 1


@pytest.mark.ray  # no Ray, but as long as a test with it
def test_two_ranks_train_the_same_head_as_one_process(reward, pairs, tmp_path: Path) -> None:
    common = {"num_train_epochs": 2, "learning_rate": 1e-3}
    train_in_process(reward(**common), pairs, Seat(), output=Location.at(tmp_path / "one"))
    two = reward(**common, per_device_train_batch_size=2, gradient_accumulation_steps=2, num_workers=2)
    on_ranks([run(two, tmp_path / "two", cut_after=4), run(two, tmp_path / "two")], pairs, tmp_path, world_size=2)
    for metric in ("loss", "reward_margin", "eval_loss"):
        assert history(tmp_path / "two", metric) == pytest.approx(history(tmp_path / "one", metric), abs=1e-5)


def test_a_reward_model_is_taken_for_no_other_and_no_other_for_it(reward, settings, pairs, splits, tmp_path) -> None:
    for method in ("lora", "full"):
        where = str(tmp_path / method)
        train_in_process(reward(method=method, max_steps=1), pairs, Seat(), output=Location.at(where))
        with pytest.raises(ModelError, match="gives scores and writes no text"):
            load_model(where)
    with pytest.raises(ModelError, match="is a reward model"):
        make_trainee(settings(model_path=str(tmp_path / "full")), "cpu")
    with pytest.raises(ModelError, match="writes text; a reward model gives scores"):
        load_reward_model(str(reward().model_path))
    goes_on = make_trainee(reward(adapter_path=str(tmp_path / "lora"), seed=5), "cpu")
    before = load_reward_model(str(tmp_path / "lora"), precision=Precision.FP32)
    rows = [[1, 40, 50, 60], [1, 70, 2]]
    with attention(goes_on.model, "sdpa"):
        mine = padded_logits(goes_on.model.eval(), rows, 0)
    assert mine == pytest.approx(rewards(before, rows), abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "prefix_tuning"}, "method: prefix_tuning trains no head"),
        ({"zero_stage": 3}, "zero_stage 3 shards a head"),
        ({"eval_generation_rows": 2}, "a reward model writes no answers"),
        ({"metric_for_best_model": "eval_perplexity"}, "is not among what is measured"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message, reward) -> None:
    with pytest.raises(ConfigError, match=message):
        reward(**changes)

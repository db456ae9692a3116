"""On a GPU the host does not wait between the forward and backward passes of a training step's micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from raytune_ft.training.config import DistillationConfig, FineTuningConfig
from raytune_ft.training.config_alignment import PreferenceConfig, ReinforcementConfig, RewardConfig
from raytune_ft.training.dropout import dropped_by_row
from raytune_ft.training.engine import Trainee, make_trainee
from raytune_ft.training.objectives import rows_of
from raytune_ft.training.policy import RolloutBatch

from ..numberless import Calls, takes_gpus_way  # noqa: TID252 - tests are no installed package
from ..rows import pair_files, rated_files, token_files  # noqa: TID252

ATTENTION = "torch_attn._varlen_attn.default"
KINDS: dict[str, tuple[type[FineTuningConfig], dict[str, Any]]] = {
    "lora": (FineTuningConfig, {"lora_dropout": 0.1}),
    "dora": (FineTuningConfig, {"use_dora": True, "lora_dropout": 0.0}),
    "full": (FineTuningConfig, {"method": "full"}),
    "prefix": (FineTuningConfig, {"method": "prefix_tuning"}),
    "prompt": (FineTuningConfig, {"method": "prompt_tuning"}),
    "distill": (DistillationConfig, {"lora_dropout": 0.0}),
    "dpo": (PreferenceConfig, {"lora_dropout": 0.0}),
    "ipo": (PreferenceConfig, {"loss_type": "ipo", "lora_dropout": 0.0}),
    "kto": (PreferenceConfig, {"loss_type": "kto", "lora_dropout": 0.0}),
    "reward": (RewardConfig, {"lora_dropout": 0.0}),
    "reinforce": (ReinforcementConfig, {"lora_dropout": 0.0, "beta": 0.1, "reward_metric": "exact_match"}),
}


def on_a_gpu(trainee: Trainee) -> Trainee:
    trainee.loss.to("meta")
    for part in getattr(trainee.loss, "_teacher", ()):
        part.decoder.to("meta"), part.head.to("meta")
    return trainee


def a_batch(kind: str, config: FineTuningConfig, folder: Path) -> Any:
    files = {"kto": rated_files, **dict.fromkeys(("dpo", "ipo", "reward"), pair_files)}.get(kind, token_files)
    data = files(Path(config.model_path), folder, train=6, validation=1)["train"]
    if kind == "reinforce":
        batch = rows_of(FineTuningConfig(model_path="m", dataset_path="d", output_dir="o"))(data, "").packed(range(6))
        return RolloutBatch(**vars(batch), advantages=torch.ones(6), reference=torch.zeros(len(batch.targets)))
    return rows_of(config)(data, str(folder / "cache")).packed(range(6)).placed(range(6))


@pytest.mark.parametrize("kind", KINDS)
def test_a_micro_batch_goes_there_and_back_unawaited(
    kind: str, settings: Callable[..., FineTuningConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_kind, changes = KINDS[kind]
    more = {"teacher_path": settings().model_path} if kind == "distill" else {}
    config = of_kind(**{**settings().model_dump(exclude_unset=True), "precision": "bf16", **more, **changes})
    trainee, batch = on_a_gpu(make_trainee(config, "cpu")), a_batch(kind, config, tmp_path)
    takes_gpus_way(monkeypatch)
    with Calls() as calls, dropped_by_row(batch, 0, 1, "meta"):
        loss = trainee.loss(batch.to("meta")).reshape(-1)[0]
        loss.backward()
    assert calls.counts[ATTENTION] == 2 * (2 if kind == "distill" else 1)  # its teacher reads the rows, too
    assert calls.counts["torch_attn._varlen_attn_backward.default"] == 2
    assert all(parameter.grad is not None for parameter in trainee.trainable().values())

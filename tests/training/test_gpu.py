"""Training on a GPU: the losses that a CPU has, methods under Ray Train and DeepSpeed, and going on after a stop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from raytune_ft.core.errors import StoppedError
from raytune_ft.core.storage import Location
from raytune_ft.training.folder import read_history
from raytune_ft.training.run import FineTuner
from raytune_ft.training.session import Seat, train_in_process

pytestmark = pytest.mark.gpu

GPU = Seat(device="cuda")
STEPS = {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 3, "use_gpu": True, "use_liger_kernel": False}


def history(folder: Path) -> list[dict[str, float]]:
    return read_history(Location.at(folder))


@pytest.fixture(autouse=True)
def exact() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("method", ["lora", "full", "prefix_tuning", "prompt_tuning"])
def test_losses_in_fp32_are_those_of_the_cpu(settings, splits, tmp_path: Path, method: str) -> None:
    config = settings(**{**STEPS, "use_gpu": None}, method=method, precision="fp32", learning_rate=1e-3)
    for name, seat in (("here", Seat()), ("there", GPU)):
        train_in_process(config, splits, seat, output=Location.at(tmp_path / name))
    here, there = history(tmp_path / "here"), history(tmp_path / "there")
    assert [row["loss"] for row in there] == pytest.approx([row["loss"] for row in here], abs=1e-4)
    assert [row["grad_norm"] for row in there] == pytest.approx([row["grad_norm"] for row in here], rel=1e-3)
    assert there[-1]["cuda_peak_gib"] > 0


def test_a_stopped_run_goes_on_with_the_losses_of_the_unbroken_one(settings, splits, tmp_path: Path) -> None:
    config = settings(**STEPS, precision="bf16", lora_dropout=0.2, learning_rate=1e-3)
    train_in_process(config, splits, GPU, output=Location.at(tmp_path / "unbroken"))
    steps: list[int] = []

    def stop_wanted() -> bool:
        steps.append(1)
        return len(steps) == 4

    output = Location.at(tmp_path / "broken")
    with pytest.raises(StoppedError):
        train_in_process(config, splits, GPU, output=output, stop_wanted=stop_wanted)
    train_in_process(config, splits, GPU, output=output)
    unbroken, broken = ([row["loss"] for row in history(tmp_path / name)] for name in ("unbroken", "broken"))
    assert len(broken) == 6
    assert broken == pytest.approx(unbroken, abs=1e-3)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("lora", {"use_liger_kernel": None}),
        ("lora", {"zero_stage": 3, "gradient_checkpointing": True}),
        ("qlora", {"zero_stage": 0}),
        ("qlora", {"bits": 8}),
        ("full", {"zero_stage": 2, "learning_rate": 1e-3, "offload": "optimizer"}),
    ],
    ids=["lora", "lora-zero3", "qlora", "qlora-8", "full-offload"],
)
def test_a_run_on_ray_train_learns_and_its_model_loads_in_plain_libraries(
    ray_cluster, settings, orders: Path, tiny_model: Path, tmp_path: Path, method: str, changes: dict[str, object]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    common = {**STEPS, "dataset_path": str(orders), "max_steps": 12, "per_device_train_batch_size": 8, "seed": 1}
    artifact = FineTuner(settings(**{**common, **changes}, method=method)).train()
    rows = history(tmp_path / "out")
    assert artifact.numbers["steps"] == 12
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["cuda_peak_gib"] > 0
    where = tiny_model if method != "full" else tmp_path / "out"
    model = AutoModelForCausalLM.from_pretrained(where)
    if method != "full":
        model = PeftModel.from_pretrained(model, tmp_path / "out")
    assert torch.isfinite(model(input_ids=torch.tensor([[5, 6, 7]])).logits).all()

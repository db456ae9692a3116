"""Preference optimization against TRL's trainer, where it is installed: the same losses, step by step."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from raytune_ft.core.storage import Location
from raytune_ft.training.config_alignment import PreferenceConfig
from raytune_ft.training.session import Seat, train_in_process

from ..rows import pair_files  # noqa: TID252 - tests are no installed package
from .test_preference import history

ROWS, STEPS = 12, 8


def to_the_end(file: str) -> None:
    """TRL's completions include what the template puts behind the token that ends an answer; here, too, then."""
    table = pq.read_table(file).to_pydict()
    for name in ("supervised", "rejected_supervised"):
        ends = [max(place for place, kept in enumerate(row) if kept) + 1 for row in table[name]]
        table[name] = [row[:end] + [True] * (len(row) - end) for row, end in zip(table[name], ends, strict=True)]
    pq.write_table(pa.table(table), file)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"beta": 0.3}, {"beta": 0.3}),
        ({"loss_type": "ipo", "beta": 0.2}, {"loss_type": "ipo", "beta": 0.2}),
    ],
    ids=["dpo", "ipo"],
)
def test_losses_and_margins_are_those_of_trl(ours, theirs, tiny_model: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    files = pair_files(tiny_model, tmp_path, train=ROWS, validation=2)
    for (name,) in files.values():
        to_the_end(name)
    common = {
        **{"max_steps": STEPS, "learning_rate": 3e-4, "lr_scheduler_type": "constant", "warmup_steps": 0},
        **{"weight_decay": 0.0, "per_device_train_batch_size": ROWS, "save_strategy": "no", "report_to": []},
    }
    paths = {"model_path": str(tiny_model), "output_dir": str(tmp_path), "dataset_path": "given as splits"}
    config = PreferenceConfig(**paths, **common, method="full", eval_strategy="no", **ours)
    train_in_process(config, files, Seat(), output=Location.at(tmp_path / "ours"))

    records = [
        {
            "prompt": [{"role": "user", "content": f"order {n} red {n * 7}"}],
            "chosen": [{"role": "assistant", "content": "yes " * (n % 5 + 2)}],
            "rejected": [{"role": "assistant", "content": "no " * (n % 4 + 1)}],
        }
        for n in range(ROWS)
    ]
    own = {"logging_steps": 1, "bf16": False, "use_cpu": True, "gradient_checkpointing": False}
    trainer = trl.DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_model),
        args=trl.DPOConfig(output_dir=str(tmp_path / "theirs"), **common, **own, **theirs),
        train_dataset=Dataset.from_list(records),
        processing_class=AutoTokenizer.from_pretrained(tiny_model),
    )
    trainer.train()
    logs = [row for row in trainer.state.log_history if "loss" in row]
    assert history(tmp_path / "ours") == pytest.approx([row["loss"] for row in logs], abs=1e-5)
    margins = [row["rewards/margins"] for row in logs]
    assert history(tmp_path / "ours", "reward_margin") == pytest.approx(margins, abs=1e-4)

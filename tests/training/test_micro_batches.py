"""Out of memory: the step is made again in smaller parts, with the same losses."""

from __future__ import annotations

import json
import logging
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from raytune_ft.core.errors import InfeasibleError
from raytune_ft.core.storage import Location
from raytune_ft.models.chat import Encoded
from raytune_ft.models.collate import pack
from raytune_ft.training.batches import rank_share
from raytune_ft.training.config_alignment import ReinforcementConfig
from raytune_ft.training.micro_batches import (
    Held,
    NotOneRowError,
    OutOfMemoryError,
    ShrinkingLearner,
    SkippingLearner,
    before_the_optimizer,
    divided,
    shrunk,
)
from raytune_ft.training.session import Seat, _RestartingLearner, train_in_process

ROWS = [Encoded([1, 2, 3], [False, True, True]), Encoded([4, 5], [False, True]), Encoded([6, 7, 8, 9], [True] * 4)]


def test_parts_are_what_packing_their_rows_gives() -> None:
    parts = divided([pack(ROWS)], 2)
    for part, rows in zip(parts, (ROWS[:1], ROWS[1:]), strict=True):
        alone = pack(rows)
        for name in ("input_ids", "position_ids", "cu_seq_lens", "predictors", "targets", "row_of_target"):
            assert torch.equal(getattr(part, name), getattr(alone, name)), name
    assert [part.rows for part in divided([pack(ROWS)], 8)] == [1, 1, 1]
    placed = divided([pack(ROWS).placed([4, 0, 7])], 2)  # places in the step, which dropout depends on
    assert [part.places.tolist() for part in placed if part.places is not None] == [[4], [0, 7]]


class Roomy:
    """A learner whose memory holds so many rows."""

    def __init__(self, rows: int) -> None:
        self.rows, self.tried = rows, []

    def step(self, batch, step):
        with before_the_optimizer():
            self.tried.append(max(part.rows for part in batch))
            if self.tried[-1] > self.rows:
                torch.empty(1 << 60)
        return {"loss": 1.0}

    def evaluate(self):
        return {}


def test_halving_goes_on_until_it_fits_and_stays() -> None:
    roomy = Roomy(1)
    learner = ShrinkingLearner(roomy)
    assert learner.step([pack(ROWS)], 1)["micro_batch_divisor"] == 4
    assert learner.step([pack(ROWS)], 2)["micro_batch_divisor"] == 4
    assert roomy.tried == [3, 2, 1, 1]


def test_where_not_one_row_fits_the_remedy_is_named() -> None:
    with pytest.raises(OutOfMemoryError, match=r"step 1: .*allocate.*lower max_length"):
        ShrinkingLearner(Roomy(0)).step([pack(ROWS)], 1)


def test_other_errors_are_not_taken_for_memory() -> None:
    with pytest.raises(RuntimeError, match="shape"), before_the_optimizer():
        raise RuntimeError("shape mismatch")


def test_shrunk_settings_keep_the_rows_of_a_step(settings) -> None:
    config = shrunk(settings(per_device_train_batch_size=8, gradient_accumulation_steps=2), 4)
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (2, 8)


@pytest.mark.parametrize(
    ("rows", "divisor", "layout"), [(3, 2, (2, 2)), (6, 4, (2, 3)), (4, 8, (1, 4)), (5, 2, (3, 2)), (1, 2, (1, 1))]
)
def test_rows_that_cannot_be_halved_leave_a_smaller_micro_batch(rows: int, divisor: int, layout, settings) -> None:
    given = {"train_micro_batch_size_per_gpu": rows}  # the user's JSON is of what the user wrote
    config = shrunk(settings(per_device_train_batch_size=rows, deepspeed_config=given), divisor)
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == layout
    shares = rank_share(range(rows), 0, 1, layout[1])
    assert max(map(len, shares)) == layout[0]
    assert sum(map(len, shares)) == rows


def test_settings_on_rewards_can_be_shrunk() -> None:
    paths = {"model_path": "m", "output_dir": "o", "dataset_path": "d", "reward_metric": "exact_match"}
    assert shrunk(ReinforcementConfig(**paths, per_device_train_batch_size=4), 2).per_device_train_batch_size == 2


def test_a_run_shrunk_unevenly_takes_the_steps_of_the_unbroken_one(settings, splits, tmp_path: Path) -> None:
    config = settings(per_device_train_batch_size=3, save_strategy="no", num_train_epochs=1)
    (tmp_path / "shrunk/checkpoints").mkdir(parents=True)
    (tmp_path / "shrunk/checkpoints/micro_batches.json").write_text('{"divisor": 2}')
    found: dict[str, list[list[float]]] = {"shrunk": [], "whole": []}
    for name, rows in found.items():
        output = Location.at(tmp_path / name)
        note = lambda step, m, to=rows: to.append([m["loss"], m["tokens"]])  # noqa: E731
        train_in_process(config, splits, Seat(), output=output, report=note, golden=False)
    assert len(found["shrunk"]) == 6
    for shrunken, whole in zip(found["shrunk"], found["whole"], strict=True):
        assert shrunken == pytest.approx(whole, abs=1e-5)


def test_under_deepspeed_the_wish_for_smaller_parts_reaches_the_next_attempt(settings, splits, tmp_path: Path) -> None:
    output = Location.at(tmp_path / "shrunk")
    config = settings(per_device_train_batch_size=8)
    with pytest.raises(OutOfMemoryError, match=r"8 rows at a time .* 4 rows at a time and the same global batch"):
        _RestartingLearner(NoRoom(), config, 1, output).step([pack(ROWS)], 3)
    losses: dict[str, list[float]] = {"shrunk": [], "whole": []}
    divisors = set()

    def report(name: str, metrics: dict[str, float]) -> None:
        losses[name].append(metrics["loss"])
        divisors.add((name, metrics["micro_batch_divisor"]))

    for name in losses:
        train_in_process(
            config, splits, Seat(), output=Location.at(tmp_path / name), report=lambda step, m, n=name: report(n, m)
        )
    assert divisors == {("shrunk", 2), ("whole", 1)}
    assert losses["shrunk"] == pytest.approx(losses["whole"], abs=1e-5)
    with pytest.raises(OutOfMemoryError, match="Not even one row"):
        _RestartingLearner(NoRoom(), settings(per_device_train_batch_size=1), 8, output).step([pack(ROWS)], 3)


class NoRoom:
    def step(self, batch, step):
        torch.empty(1 << 60)


LIMITED = """
import json, resource, sys
from raytune_ft.training.config import FineTuningConfig
from raytune_ft.training.session import Seat, train_in_process
config = FineTuningConfig(**json.loads(sys.argv[1]))
splits, room = json.loads(sys.argv[2]), int(sys.argv[3])
rows = []
def report(step, metrics):
    rows.append([metrics["loss"], metrics["micro_batch_divisor"]])
    if step == 2 and room:
        size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + room, -1))
train_in_process(config, splits, Seat(), output=None, report=report)
print(json.dumps(rows))
"""


def test_a_run_whose_memory_shrinks_goes_on_with_the_same_losses(settings, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [[(n * 7 + place) % 300 for place in range(500)] for n in range(16)]
    pq.write_table(pa.table({"input_ids": rows, "supervised": [[True] * 500] * 16}), tmp_path / "train.parquet")
    splits = {"train": [str(tmp_path / "train.parquet")]}
    config = settings(per_device_train_batch_size=16, max_steps=4, num_train_epochs=9, eval_strategy="no")

    def run(room: int) -> list[list[float]]:
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed is given back: the limit is felt by tensors
        command = [sys.executable, "-c", LIMITED, config.model_dump_json(), json.dumps(splits), str(room)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])

    roomy, tight = run(0), run(30_000_000)
    assert [divisor for _, divisor in roomy] == [1, 1, 1, 1]
    assert tight[1][1] == 1
    assert tight[3][1] > 1
    assert [loss for loss, _ in tight] == pytest.approx([loss for loss, _ in roomy], abs=1e-5)


def test_an_evaluation_that_memory_does_not_hold_goes_on_in_parts() -> None:
    tried: list[int] = []

    def targets(part) -> float:
        tried.append(part.rows)
        if part.rows > 1:
            torch.empty(1 << 60)
        return float(len(part.targets))

    held = Held()
    assert sum(held.computed(targets, pack(ROWS))) == 2 + 1 + 3
    assert sum(held.computed(targets, pack(ROWS[:2]))) == 2 + 1
    assert tried == [3, 1, 2, 1, 1, 1, 1, 1]
    with pytest.raises(RuntimeError, match="allocate"):
        Held().computed(targets, pack(ROWS), may_split=False)
    with pytest.raises(OutOfMemoryError, match=r"evaluation: .*lower max_length"):
        Held().computed(lambda part: float(torch.empty(1 << 60)[0]), pack(ROWS))


def test_an_evaluation_that_all_ranks_share_asks_for_another_attempt(settings, tmp_path: Path) -> None:
    class Cramped(Roomy):
        def evaluate(self):
            torch.empty(1 << 60)

    (tmp_path / "checkpoints").mkdir()
    config = settings(per_device_train_batch_size=6, zero_stage=3)
    with pytest.raises(OutOfMemoryError, match=r"evaluation: out of memory with 6 rows .* with 3 rows at a time"):
        _RestartingLearner(Cramped(9), config, 1, Location.at(tmp_path)).evaluate()
    assert json.loads((tmp_path / "checkpoints/micro_batches.json").read_text()) == {"divisor": 2}
    assert shrunk(config.with_overrides(per_device_eval_batch_size=5), 2).per_device_eval_batch_size == 3


def test_that_not_even_one_row_fits_is_still_known_as_such_in_another_process() -> None:
    error = pickle.loads(pickle.dumps(NotOneRowError("step 3", "CUDA out of memory")))  # as Ray hands it over
    assert isinstance(error, OutOfMemoryError) and isinstance(error, InfeasibleError)
    assert str(error).startswith("step 3: CUDA out of memory. Not even one row at a time fits: lower max_length")


class Norms:
    """A learner whose steps have these gradient norms."""

    def __init__(self, *norms: float, loss: float = 1.0) -> None:
        self.norms, self.loss = iter(norms), loss

    def step(self, batch, step):
        return {"loss": self.loss, "grad_norm": next(self.norms)}


def test_a_step_that_overflows_fp16_is_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    learner = SkippingLearner(Norms(math.inf, math.inf, 0.5, *[math.inf] * 17))
    with caplog.at_level(logging.WARNING, logger="raytune_ft"):
        steps = [learner.step([], number) for number in range(1, 21)]
    assert steps[:3] == [{"loss": 1.0, "skipped_steps": 1.0}] * 2 + [{"loss": 1.0, "grad_norm": 0.5}]
    assert "step 2: left out, since its gradients overflow fp16" in caplog.text
    assert ["grad_norm" in metrics for metrics in steps[3:]] == [False] * 16 + [True]  # no scale was small enough
    assert "grad_norm" in SkippingLearner(Norms(math.nan, loss=math.nan)).step([], 1)

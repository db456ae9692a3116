"""Trials that share a frozen base, under Ray Tune's own schedulers, on a real Ray cluster."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from ray.tune.experiment import Trial as RayTrial

from raytune_ft.core.storage import Location
from raytune_ft.training.checkpoint import StoredCheckpoint
from raytune_ft.training.config import FineTuningConfig
from raytune_ft.training.goal import LOSS
from raytune_ft.tuning.config import SweepConfig
from raytune_ft.tuning.host import BankHost
from raytune_ft.tuning.own import Own
from raytune_ft.tuning.packed import BankHostActor, Banks, Proxy
from raytune_ft.tuning.packs import name_of
from raytune_ft.tuning.result import SweepResult
from raytune_ft.tuning.run import HyperparameterSweep
from raytune_ft.tuning.schedulers.population import LockstepPopulation
from raytune_ft.tuning.schedulers.remembered import RememberedASHA

from ..processes import kill_tree  # noqa: TID252 - tests are no installed package


def sweep(tiny_model: Path, orders: Path, folder: Path, **changes: object) -> SweepConfig:
    training = {
        "model_path": str(tiny_model),
        "dataset_path": str(orders),
        "max_steps": 8,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "per_device_train_batch_size": 4,
        "lora_target_modules": "all-linear",
        "lora_dropout": 0.0,
    }
    common = {"output_dir": str(folder), "space": {"lora_r": [2, 8], "learning_rate": [2e-2, 1e-4]}}
    if changes.get("scheduler", "asha") in {"asha", "median"}:
        common["grace_steps"] = 4
    return SweepConfig(**{**common, "training": {**training, **changes.pop("training", {})}, **changes})


def curves(result: SweepResult) -> dict[str, list[float]]:
    return {trial.label(): [row["eval_loss"] for row in trial.curve] for trial in result.trials}


def test_asha_remembers_its_rungs_after_the_driver_is_gone(tmp_path) -> None:
    from ray.tune.schedulers import TrialScheduler

    def scheduler() -> RememberedASHA:
        made = RememberedASHA(
            Location.at(tmp_path / "rungs.json"), time_attr="t", grace_period=2, max_t=8, reduction_factor=2
        )
        made.set_search_properties("loss", "min")
        return made

    def told(asha: RememberedASHA, name: str, loss: float) -> str:
        trial = RayTrial("trainable", trial_id=name, stub=True)
        asha.on_trial_add(None, trial)
        return asha.on_trial_result(None, trial, {"t": 2, "loss": loss})

    assert told(scheduler(), "good", 0.1) == TrialScheduler.CONTINUE
    assert told(scheduler(), "bad", 0.9) == TrialScheduler.STOP  # another scheduler, the same rung
    fresh = RememberedASHA(
        Location.at(tmp_path / "none.json"), time_attr="t", grace_period=2, max_t=8, reduction_factor=2
    )
    fresh.set_search_properties("loss", "min")
    assert told(fresh, "bad", 0.9) == TrialScheduler.CONTINUE


def test_a_fault_of_a_bank_is_no_bank_that_was_started_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are a KeyError where Ray brings them, and only the latter is mended by entering again."""
    entered: list[int] = []

    class Bank:
        report = SimpleNamespace(remote=lambda name, seen: KeyError(name) if len(entered) == 1 else {"number": 7})

    def enter(proxy: Proxy, settings: dict) -> None:
        entered.append(1)
        if settings:
            raise KeyError("a fault")
        proxy._bank = Bank()

    def get(told: object) -> object:
        if isinstance(told, KeyError):
            raise told
        return told

    monkeypatch.setattr(Proxy, "_enter", enter)
    monkeypatch.setattr("raytune_ft.tuning.packed.ray.get", get)
    proxy = Proxy.__new__(Proxy)
    proxy._start_over({})
    assert proxy._next_in_bank({})["number"] == proxy._seen == 7 and len(entered) == 2
    proxy._start_over({})
    with pytest.raises(KeyError, match="a fault"):
        proxy._next_in_bank({"lora_r": 4})
    assert len(entered) == 3


@pytest.fixture
def proxy_of(
    settings: dict, splits: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, dict], Proxy]:
    """Trials of one bank, all in this process: what Ray would pass on is called at once."""
    shared = FineTuningConfig(**settings).model_dump(mode="json")
    host = BankHost(shared, splits, str(tmp_path / "snapshots"), device="cpu", threads=1)
    assert host.fault() is None
    calls = {name: SimpleNamespace(remote=getattr(host, name)) for name in ("load", "admit", "evict", "report")}
    banks = Banks((), {name_of((), {}): (SimpleNamespace(**calls),)})
    monkeypatch.setattr("raytune_ft.tuning.packed.ray.get", lambda told: told)
    monkeypatch.setattr("raytune_ft.tuning.packed.ray.wait", lambda asked, **how: (asked, []))

    def make(name: str, space: dict) -> Proxy:
        proxy = Proxy.__new__(Proxy)
        proxy._trial_info = SimpleNamespace(trial_id=name)
        proxy.setup(space, shared, banks, Own({1024: splits}, str(tmp_path), "cpu", 1.0, 1), LOSS)
        return proxy

    return make


def test_a_process_that_becomes_another_trial_begins_anew(proxy_of: Callable[[str, dict], Proxy]) -> None:
    proxy = proxy_of("a", {"seed": 1})
    [bank] = proxy._banks.of({})
    first, second = proxy.step(), proxy.step()
    proxy._trial_info = SimpleNamespace(trial_id="b")  # as Ray Tune does
    proxy.reset_config({"seed": 2})
    other = proxy.step()
    assert bank.load.remote() == 1
    proxy.cleanup()
    assert bank.load.remote() == 0
    assert [told["global_step"] for told in (first, second, other)] == [2, 4, 2]
    assert other["tokens"] < second["tokens"] and other["eval_loss"] != first["eval_loss"]
    assert proxy_of("c", {"seed": 2}).step()["eval_loss"] == pytest.approx(other["eval_loss"], abs=1e-6)


def test_a_trial_that_takes_over_anothers_state_goes_on_from_there_with_its_own_settings(
    proxy_of: Callable[[str, dict], Proxy], tmp_path: Path
) -> None:
    common = {"lr_scheduler_type": "constant", "warmup_steps": 0}
    donor, taker = proxy_of("donor", common), proxy_of("taker", {**common, "learning_rate": 1e-2, "seed": 3})
    told = [donor.step() for _ in range(2)]
    taker.step()
    donor.save_checkpoint(str(tmp_path / "checkpoint"))
    taker.load_checkpoint(str(tmp_path / "checkpoint"))
    after = taker.step()
    assert (after["global_step"], after["learning_rate"]) == (6, 1e-2)
    kept = StoredCheckpoint(Location.at(after["snapshot"])).progress
    assert [row["eval_loss"] for row in kept["history"] if "eval_loss" in row][:2] == [t["eval_loss"] for t in told]
    assert [part["until"] for part in kept["earlier"]] == [4]


@pytest.mark.ray
def test_a_process_that_is_given_a_bank_loads_no_torch(ray_cluster) -> None:
    """Sixteen proxies that did would spend a minute or two of two cores on it."""
    import ray

    bank = ray.remote(BankHostActor).options(num_cpus=0.01).remote({}, {}, "unused", device="cpu", threads=1)
    held = ray.put({"banks": (bank,)})

    def modules(held: list) -> set[str]:
        import sys

        ray.get(held[0])
        return {"torch", "transformers", "raytune_ft.tuning.packed"} & set(sys.modules)

    fresh = ray.remote(num_cpus=0.01, runtime_env={"env_vars": {"RAYTUNE_FT_FRESH_PROCESS": "1"}})(modules)
    assert ray.get(fresh.remote([held])) == {"raytune_ft.tuning.packed"}
    ray.kill(bank)


@pytest.mark.ray
def test_packed_trials_have_the_curves_of_trials_with_a_base_of_their_own(
    ray_cluster, tiny_model, orders, tmp_path
) -> None:
    import ray
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    answers = {"metric": "eval_chrf", "training": {"eval_generation_rows": 2, "eval_generation_metric": "chrf"}}
    together = HyperparameterSweep(sweep(tiny_model, orders, tmp_path / "packed", scheduler="none", **answers)).run()
    late = {"scheduler": "asha", "grace_steps": 8}  # ASHA ends a trial as it hears of its last step
    alone = HyperparameterSweep(sweep(tiny_model, orders, tmp_path / "alone", **late, packed="never", **answers)).run()
    packed, solo = (SweepResult.from_json(a.read_json("result.json")) for a in (together, alone))
    assert [len(trial.curve) for trial in packed.trials] == [4, 4, 4, 4]
    for label, curve in curves(solo).items():
        assert curves(packed)[label] == pytest.approx(curve, abs=1e-4), label
    highest = max(row["eval_chrf"] for trial in packed.trials for row in trial.curve)
    assert packed.best.best("eval_chrf") == together.numbers["best_eval_chrf"] == highest > 0
    assert packed.best.settings == solo.best.settings == together.numbers["best_settings"]
    for folder, result in (("packed", packed), ("alone", solo)):
        events = {path.parent.name for path in (tmp_path / folder).glob("tensorboard/*/events.out*")}
        names = {f"{trial.name}_{trial.label().replace(', ', ',')}" for trial in result.trials}
        assert events == {"sweep", *names}
        assert (tmp_path / folder / "best/adapter_model.safetensors").exists()
        assert not (tmp_path / folder / "trials").exists()

    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    adapted = PeftModel.from_pretrained(base, tmp_path / "packed/best")
    assert adapted.peft_config["default"].r == packed.best.settings["lora_r"]
    assert not (tmp_path / "packed/snapshots").exists()
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU") != 2.0 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert ray.available_resources()["CPU"] == 2.0


@pytest.mark.ray
def test_trials_of_other_row_lengths_have_a_base_and_rows_of_their_own(
    ray_cluster, tiny_model, orders, tmp_path
) -> None:
    long_row = {"messages": [{"role": "user", "content": "x" * 200}, {"role": "assistant", "content": "yes"}]}
    rows = tmp_path / "rows.jsonl"
    rows.write_text(orders.read_text() + "".join(json.dumps(long_row).replace("yes", str(n)) + "\n" for n in range(24)))
    config = sweep(tiny_model, rows, tmp_path / "packed", space={"max_length": [64, 512]}, scheduler="none")
    packed = SweepResult.from_json(HyperparameterSweep(config).run().read_json("result.json"))
    tokens = {trial.settings["max_length"]: trial.tokens for trial in packed.trials}
    assert tokens[512] > 1.5 * tokens[64] > 0  # rows over 64 tokens are dropped there
    for trial in packed.trials:
        steps, losses = alone(
            config.training.with_overrides(**trial.settings, output_dir=str(tmp_path / trial.label()))
        )
        assert sum(row["tokens"] for row in steps) == trial.tokens
        assert [row["eval_loss"] for row in trial.curve] == pytest.approx(losses, abs=1e-4)


@pytest.mark.ray
def test_trials_that_share_a_base_train_beside_one_that_cannot(
    ray_cluster, tiny_model, orders, tmp_path, caplog: pytest.LogCaptureFixture
) -> None:
    import ray

    space = {"use_dora": [True, False], "learning_rate": [2e-2, 1e-4]}
    config = sweep(tiny_model, orders, tmp_path / "sweep", space=space, scheduler="none", repeat_top=1, repeat_seeds=1)
    with caplog.at_level(logging.INFO, logger="raytune_ft"):
        artifact = HyperparameterSweep(config).run()
    result = SweepResult.from_json(artifact.read_json("result.json"))
    assert "4 trials, 4 at a time on one frozen base" in caplog.text
    assert "the trials with use_dora True train in a process each (a packed sweep adds low-rank products" in caplog.text
    assert [trial.ending for trial in result.trials] == ["finished"] * 4
    for trial in result.trials:
        settings = {**trial.settings, "output_dir": str(tmp_path / trial.name)}
        _, losses = alone(config.training.with_overrides(**settings))
        assert [row["eval_loss"] for row in trial.curve] == pytest.approx(losses, abs=1e-4), trial.label()
    [again] = result.repeats
    assert {**again.settings, "seed": None} == {**result.best.settings, "seed": None}
    adapter = json.loads((tmp_path / "sweep/best/adapter_config.json").read_text())
    assert adapter["use_dora"] == result.best.settings["use_dora"]
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU") != 2.0 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert ray.available_resources()["CPU"] == 2.0


def alone(config: FineTuningConfig) -> tuple[list[dict[str, float]], list[float]]:
    """Every step, and the validation losses, of a run in this process."""
    from raytune_ft.data.run import tokenized_splits
    from raytune_ft.training.loop import Decision
    from raytune_ft.training.session import Seat, train_in_process

    steps: list[dict[str, float]] = []

    def note(step: int, metrics: dict[str, float]) -> Decision:
        steps.append(metrics)
        return Decision.CONTINUE

    where = Location.at(config.output_dir) / "tokens"
    splits = tokenized_splits(config.dataset_path, config.model_path, where, max_length=config.max_length)
    train_in_process(config, splits, Seat(), output=None, report=note, golden=False)
    return steps, [row["eval_loss"] for row in steps if "eval_loss" in row]


@pytest.mark.ray
@pytest.mark.parametrize(
    "how",
    [
        {"packed": "never"},
        pytest.param({"training": {"num_workers": 2, "cpus_per_worker": 0.5}}, marks=pytest.mark.soak),
    ],
)
def test_the_best_trial_leaves_its_model_also_where_the_budget_ended_it(
    how: dict, ray_cluster, tiny_model, orders, tmp_path
) -> None:
    """Trials of other numbers of steps each, of which the budget allows a few."""
    from raytune_ft.data.run import tokenized_splits
    from raytune_ft.models.loading import load_model
    from raytune_ft.models.scoring import sequence_scores
    from raytune_ft.training.batches import TokenRows

    training = {"max_steps": None, "num_train_epochs": 9, "eval_steps": 1, "learning_rate": 1e-2}
    space = {"per_device_train_batch_size": [4, 8]}
    more = {"space": space, "scheduler": "none", "max_tokens": 1500}
    how = {**how, "training": {**training, **how.get("training", {})}}
    config = sweep(tiny_model, orders, tmp_path / "sweep", **more, **how)
    result = SweepResult.from_json(HyperparameterSweep(config).run().read_json("result.json"))
    assert {trial.ending for trial in result.trials} == {"stopped early"}
    assert 0 < result.best.steps < result.best.last_step
    where = Location.at(tmp_path / "tokens")
    splits = tokenized_splits(str(orders), str(tiny_model), where, max_length=config.training.max_length)
    rows = TokenRows(splits["validation"], str(tmp_path / "cache"))
    found = sequence_scores(load_model(str(tmp_path / "sweep/best")), [rows[number] for number in range(len(rows))])
    loss = sum(score.nll for score in found) / sum(score.tokens for score in found)
    told = result.best.best("eval_loss")
    if config.training.num_workers > 1:  # they run ahead of what Ray Tune has heard: a later one may be better
        told = min(told, loss)
    assert loss == pytest.approx(told, abs=1e-4)
    assert not (tmp_path / "sweep/trials").exists()


@pytest.mark.soak  # two minutes
@pytest.mark.ray
def test_trials_of_two_workers_are_ray_train_runs_with_the_same_curves(
    ray_cluster, tiny_model, orders, tmp_path
) -> None:
    space = {"learning_rate": [2e-2, 1e-3]}
    one = {"training": {"per_device_train_batch_size": 4, "max_steps": 4}}
    two = {"training": {"per_device_train_batch_size": 2, "max_steps": 4, "num_workers": 2, "cpus_per_worker": 0.5}}
    shared = sweep(tiny_model, orders, tmp_path / "packed", scheduler="none", space=space, **one)
    spread = sweep(tiny_model, orders, tmp_path / "spread", scheduler="asha", grace_steps=4, space=space, **two)
    packed, alone = (
        SweepResult.from_json(HyperparameterSweep(config).run().read_json("result.json")) for config in (shared, spread)
    )
    assert [trial.ending for trial in alone.trials] == ["finished", "finished"]
    for label, curve in curves(packed).items():
        assert curves(alone)[label] == pytest.approx(curve, abs=1e-4), label
    assert (tmp_path / "spread/best/adapter_model.safetensors").exists()


def states_in(folder: Path) -> list[Path]:
    """States of trials on disk: of packed ones, and of those with a base of their own."""
    return [*folder.glob("snapshots/*/*/manifest.json"), *folder.glob("trials/*/checkpoints/*/manifest.json")]


def kill_first(word: str, folder: Path, killed: list[int]) -> None:
    """Kills a worker with this word in its title, with SIGKILL, as soon as a trial's state lies on disk."""
    end = time.monotonic() + 120
    while time.monotonic() < end and not states_in(folder):
        time.sleep(0.01)
    while time.monotonic() < end and not killed:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                title = " ".join(process.cmdline())
                if "ray::" in title and word in title and not killed:
                    process.kill()
                    killed.append(process.pid)


@pytest.mark.ray
def test_a_killed_bank_comes_back_and_no_trial_is_lost(ray_cluster, tiny_model, orders, tmp_path) -> None:
    killed: list[int] = []
    killer = threading.Thread(target=kill_first, args=("BankHost", tmp_path / "sweep", killed))
    killer.start()
    config = sweep(tiny_model, orders, tmp_path / "sweep", scheduler="none", training={"max_steps": 60})
    artifact = HyperparameterSweep(config).run()
    killer.join()
    assert killed
    result = SweepResult.from_json(artifact.read_json("result.json"))
    assert [trial.ending for trial in result.trials] == ["finished"] * 4
    for trial in result.trials:
        steps = [row["global_step"] for row in trial.curve]
        assert steps == list(range(2, 61, 2)), steps


@pytest.mark.soak
@pytest.mark.ray
@pytest.mark.parametrize("packed", ["auto", "never"])
def test_a_killed_trial_comes_back_and_none_is_lost(packed: str, ray_cluster, tiny_model, orders, tmp_path) -> None:
    killed: list[int] = []
    killer = threading.Thread(target=kill_first, args=("Proxy", tmp_path / "sweep", killed))
    killer.start()
    config = sweep(tiny_model, orders, tmp_path / "sweep", scheduler="none", packed=packed, training={"max_steps": 60})
    artifact = HyperparameterSweep(config).run()
    killer.join()
    assert len(killed) == 1
    result = SweepResult.from_json(artifact.read_json("result.json"))
    assert [trial.ending for trial in result.trials] == ["finished"] * 4
    for trial in result.trials:
        assert [row["global_step"] for row in trial.curve] == list(range(2, 61, 2))


@pytest.mark.soak
@pytest.mark.ray
@pytest.mark.parametrize(
    "how", [{"packed": "auto"}, {"packed": "never"}, {"training": {"num_workers": 2, "cpus_per_worker": 0.5}}]
)
def test_a_trial_that_diverges_is_infeasible_and_hurts_no_other(
    how: dict, ray_cluster, tiny_model, orders, tmp_path
) -> None:
    how = {**how, "scheduler": "none", "space": {"learning_rate": [1e-2, 1e30]}}
    config = sweep(tiny_model, orders, tmp_path / "sweep", **how)
    artifact = HyperparameterSweep(config).run()
    result = SweepResult.from_json(artifact.read_json("result.json"))
    endings = {trial.settings["learning_rate"]: trial for trial in result.trials}
    assert endings[1e30].ending == "infeasible"
    assert "is nan" in endings[1e30].error or "is inf" in endings[1e30].error
    assert endings[1e-2].ending == "finished"
    assert result.best.settings == {"learning_rate": 1e-2}


DRIVER = textwrap.dedent(
    """
    import json, logging, sys
    from raytune_ft.core.cluster import connect
    from raytune_ft.tuning.config import SweepConfig
    from raytune_ft.tuning.run import tune
    if __name__ == "__main__":
        logging.basicConfig(level=logging.INFO)
        connect(num_cpus=2)
        tune(SweepConfig(**json.load(open(sys.argv[1]))))
    """
)


@dataclass(frozen=True)
class Broken:
    """A sweep that the same command ended after its driver was killed: the rungs by then, and what drivers said."""

    rungs: Any
    result: SweepResult
    said: tuple[str, str]

    def told(self, driver: int) -> dict[str, list[int]]:
        """The steps that a driver told of each trial, by the trial's label."""
        steps = defaultdict[str, list[int]](list)
        for label, step in re.findall(r"trial (\S.*): step (\d+), eval_loss", self.said[driver]):
            steps[label].append(int(step))
        return steps


def killed_and_resumed(
    config: SweepConfig, folder: Path, when: Callable[[Any], bool], *, lost: bool = False, behind: bool = False
) -> Broken:
    """A sweep whose driver, with all its processes, is killed once its rungs are so, and run again.

    With `lost` the checkpoints that Ray Tune's state names are gone by then: it had deleted them since it wrote that.
    With `behind` the kill comes between two writes of that state: its callbacks' part is the one before.
    """
    (folder / "config.json").write_text(config.model_dump_json())
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-c", DRIVER, str(folder / "config.json")]
    with (folder / "said").open("w") as said:
        first = subprocess.Popen(command, env=environment, start_new_session=True, stderr=said)
    end, rungs = time.monotonic() + 120, Path(config.output_dir) / "ray/rungs.json"
    parts: dict[Path, bytes] = {}

    def is_time() -> bool:
        found = {part: part.read_bytes() for part in rungs.parent.glob("callback-states-*.pkl")}
        if not (rungs.exists() and when(json.loads(rungs.read_text())) and (parts or not behind)):
            parts.update(found)
            return False
        return not behind or found != parts

    while time.monotonic() < end and not is_time():
        time.sleep(0.02)
    time.sleep(1.0)
    kill_tree(first)
    for part, earlier in parts.items() if behind else ():
        part.write_bytes(earlier)
    assert not (Path(config.output_dir) / "manifest.json").exists()
    kept = json.loads(rungs.read_text())
    for checkpoint in Path(config.output_dir).glob("ray/*/checkpoint_*") if lost else ():
        shutil.rmtree(checkpoint)
    again = subprocess.run(command, env=environment, check=False, timeout=200, stderr=subprocess.PIPE, text=True)
    assert again.returncode == 0, again.stderr[-3000:]
    result = SweepResult.from_json(json.loads((Path(config.output_dir) / "result.json").read_text()))
    return Broken(kept, result, ((folder / "said").read_text(), again.stderr))


@pytest.mark.soak
@pytest.mark.ray
@pytest.mark.parametrize("packed", ["auto", "never"])
def test_a_sweep_whose_driver_was_killed_between_two_writes_of_its_state_has_whole_curves(
    packed: str, tiny_model, orders, tmp_path
) -> None:
    config = sweep(tiny_model, orders, tmp_path / "sweep", packed=packed, training={"max_steps": 60})
    broken = killed_and_resumed(config, tmp_path, bool, behind=True)
    assert len(broken.result.trials) == 4
    for trial in broken.result.trials:
        assert [row["global_step"] for row in trial.curve] == list(range(2, trial.steps + 1, 2))
        assert all({"eval_loss", "loss", "tokens", "last_step"} <= row.keys() for row in trial.curve)


@pytest.mark.soak
@pytest.mark.ray
@pytest.mark.parametrize(("packed", "lost"), [("auto", False), ("auto", True), ("never", True)])
def test_a_sweep_whose_driver_was_killed_goes_on_where_it_was(
    packed: str, lost: bool, tiny_model, orders, tmp_path
) -> None:
    config = sweep(tiny_model, orders, tmp_path / "sweep", packed=packed, training={"max_steps": 40})
    broken = killed_and_resumed(config, tmp_path, bool, lost=lost)
    before, after = broken.told(0), broken.told(1)
    assert before
    for label, steps in before.items():  # nobody loses more than the rung before the last one that it passed
        passed = [0, *(rung for rung in (4, 8, 16, 32) if rung < steps[-1])]
        assert label not in after or after[label][0] - 2 >= passed[max(0, len(passed) - 2)], (before, after)
    assert len(broken.result.trials) == 4
    assert {trial.ending for trial in broken.result.trials} <= {"finished", "stopped early"}
    assert sum(len(recorded) for _, recorded in broken.rungs[0]) > 0
    for trial in broken.result.trials:
        assert [row["global_step"] for row in trial.curve] == list(range(2, trial.steps + 1, 2))


@pytest.mark.soak
@pytest.mark.ray
def test_hyperband_drops_the_same_trials_if_its_driver_was_killed_late(tiny_model, orders, tmp_path) -> None:
    """Of eleven trials the first five run to step 16, the next five are halved at step 8, and the last has no others.

    Of those five, HyperBand keeps three.
    """
    space = {"learning_rate": [1e-5 * 2**n for n in range(11)]}
    common = {"space": space, "scheduler": "hyperband"}
    steps = {"max_steps": 16, "eval_steps": 1}
    config = sweep(tiny_model, orders, tmp_path / "sweep", **common, training=steps)
    broken = killed_and_resumed(config, tmp_path, lambda rungs: len(rungs["dropped"]) >= 2)
    assert 0 < len(broken.rungs["places"]) < 11
    ends = {trial.settings["learning_rate"]: (trial.ending, trial.steps) for trial in broken.result.trials}
    dropped = space["learning_rate"][5:7]
    assert ends == {
        rate: ("stopped early", 8) if rate in dropped else ("finished", 16) for rate in space["learning_rate"]
    }
    assert all(
        [row["global_step"] for row in trial.curve] == list(range(1, trial.steps + 1)) for trial in broken.result.trials
    )


@pytest.mark.soak
@pytest.mark.ray
def test_a_population_is_the_same_each_time(ray_cluster, tiny_model, orders, tmp_path) -> None:
    common = {"scheduler": "pbt", "grace_steps": 2, "searcher": "random", "num_trials": 6}
    space = {"learning_rate": {"loguniform": [1e-6, 2e-2]}, "weight_decay": {"loguniform": [1e-4, 1e-1]}}
    training = {"lr_scheduler_type": "constant", "warmup_steps": 0, "max_steps": 16}
    once, again = (
        HyperparameterSweep(sweep(tiny_model, orders, tmp_path / name, **common, space=space, training=training)).run()
        for name in ("once", "again")
    )
    first, second = (SweepResult.from_json(artifact.read_json("result.json")) for artifact in (once, again))
    assert max(len(trial.schedule) for trial in first.trials) > 2
    for one, other in zip(first.trials, second.trials, strict=True):
        assert one.schedule == other.schedule
        assert [row["eval_loss"] for row in one.curve] == pytest.approx([row["eval_loss"] for row in other.curve])


@pytest.mark.ray
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"scheduler": "hyperband"}, marks=pytest.mark.soak),
        pytest.param({"scheduler": "median"}, marks=pytest.mark.soak),
        {  # an exchange may draw the rate that there was, but it always changes the weight decay
            **{"scheduler": "pbt", "grace_steps": 2, "searcher": "random", "num_trials": 3},
            "space": {"learning_rate": {"choice": [2e-2, 1e-2, 1e-8]}, "weight_decay": {"loguniform": [1e-4, 1e-1]}},
            "training": {"lr_scheduler_type": "constant", "warmup_steps": 0, "max_steps": 16},
        },
        pytest.param(
            {"searcher": "optuna", "num_trials": 4, "space": {"learning_rate": {"loguniform": [1e-5, 1e-2]}}},
            marks=pytest.mark.soak,
        ),
        pytest.param(
            {"scheduler": "none", "repeat_top": 1, "space": {"lora_r": [2], "learning_rate": [2e-2, 1e-6]}},
            marks=pytest.mark.soak,
        ),
    ],
    ids=["hyperband", "median", "pbt", "optuna", "repeats"],
)
def test_tunes_own_schedulers_and_searchers_drive_packed_trials(
    changes, ray_cluster, tiny_model, orders, tmp_path, monkeypatch
) -> None:
    begun, adds = set(), LockstepPopulation.on_trial_add

    def on_trial_add(scheduler: LockstepPopulation, tune_controller: object, trial: RayTrial) -> None:
        begun.add(trial.config["learning_rate"])
        adds(scheduler, tune_controller, trial)

    monkeypatch.setattr(LockstepPopulation, "on_trial_add", on_trial_add)
    artifact = HyperparameterSweep(sweep(tiny_model, orders, tmp_path / "sweep", **changes)).run()
    result = SweepResult.from_json(artifact.read_json("result.json"))
    assert {trial.ending for trial in result.trials} <= {"finished", "stopped early"}
    assert result.best.curve[-1]["eval_loss"] < 6.0
    assert (tmp_path / "sweep/best/adapter_model.safetensors").exists()
    if "repeat_top" in changes:
        (again,) = result.repeated
        assert again.seeds == 3
        assert [trial.settings["seed"] for trial in result.repeats] == [1, 2]
        assert len({trial.curve[-1]["eval_loss"] for trial in result.repeats}) == 2
    if changes.get("scheduler") == "pbt":  # a rate of 1e-8 learns nothing: who began with it took over another's state
        assert begun == {2e-2, 1e-2, 1e-8}
        assert all(trial.curve[0]["learning_rate"] != 1e-8 for trial in result.trials)
        assert any(len(trial.schedule) > 1 for trial in result.trials)
        for trial in result.trials:
            assert trial.schedule[-1]["settings"] == trial.settings
            assert [part["after"] for part in trial.schedule] == sorted(part["after"] for part in trial.schedule)
        assert artifact.numbers["best_schedule"] == result.best.schedule

"""A bank behind calls: reports in order, state on disk before them, and trials that wait to be asked."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from raytune_ft.core.errors import DataError, ModelError, RunError
from raytune_ft.core.storage import Location
from raytune_ft.models.loading import load_tokenizer
from raytune_ft.training import checkpoint
from raytune_ft.tuning.host import BankHost, _Line

from ..rows import pair_files, rated_files  # noqa: TID252 - tests are no installed package


@pytest.fixture
def host(settings: dict, splits: dict, tmp_path: Path) -> BankHost:
    return BankHost(settings, splits, str(tmp_path / "snapshots"), device="cpu", threads=3)


def test_reports_come_in_order_with_their_state_on_disk(host: BankHost, settings: dict) -> None:
    assert host.fault() is None
    host.admit("t", settings)
    assert host.load() == 1
    seen = []
    while not seen or seen[-1]["status"] == "running":
        report = host.report("t", len(seen))
        assert report == host.report("t", len(seen))  # asked again, the same
        assert checkpoint.read(Location.at(report["snapshot"])).step == report["step"]
        seen.append(report)
    assert [report["step"] for report in seen] == list(range(2, 21, 2))
    assert [report["number"] for report in seen] == list(range(1, 11))
    assert seen[-1]["reason"] == "all steps made"
    tokens = [report["metrics"]["tokens"] for report in seen]
    assert tokens == sorted(tokens) and tokens[0] > 0
    host.evict("t")
    assert host.load() == 0
    with pytest.raises(KeyError):
        host.report("t", 0)


@pytest.mark.parametrize("loss_type", ["ipo", "kto"])
def test_trials_that_learn_preferences_go_on_from_their_state_with_the_same_curves(
    loss_type: str, settings: dict, tiny_model: Path, tmp_path: Path
) -> None:
    files_of = rated_files if loss_type == "kto" else pair_files
    files = files_of(tiny_model, tmp_path, train=8, validation=3)
    settings = {**settings, "max_steps": 6, "loss_type": loss_type, "learning_rate": 2e-3}
    curves = []
    for attempt in range(2):
        how = {"objective": "align", "device": "cpu", "threads": 1}
        host = BankHost(settings, files, str(tmp_path / f"snapshots-{attempt}"), **how)
        assert host.fault() is None
        host.admit("t", settings)
        if attempt:  # another bank takes over, and looks up anew what the base says
            first = host.report("t", 0)
            host = BankHost(settings, files, str(tmp_path / "snapshots-2"), **how)
            host.admit("t", settings, first["snapshot"])
        reports = []
        while not reports or reports[-1]["status"] == "running":
            reports.append(host.report("t", len(reports)))
        curves.append([report["metrics"]["eval_loss"] for report in reports])
        assert {"eval_reward_accuracy", "loss"} <= reports[-1]["metrics"].keys()
    assert curves[1] == pytest.approx(curves[0][1:], abs=1e-6) and len(curves[1]) == 2
    host.save(settings, reports[-1]["snapshot"], str(tmp_path / "best"))
    assert (tmp_path / "best/adapter_model.safetensors").exists()


def test_a_trial_waits_when_it_is_two_evaluations_ahead(host: BankHost, settings: dict) -> None:
    host.admit("t", settings)
    host.admit("asked", {**settings, "seed": 1})
    number = 0
    while (report := host.report("asked", number))["status"] == "running":
        number = report["number"]
    time.sleep(0.5)
    assert host._bank.trial("t").step == 4
    assert host.report("t", 1)["step"] == 4


def test_a_trial_goes_on_from_its_snapshot_in_another_seat(host: BankHost, settings: dict) -> None:
    host.admit("t", settings)
    second = host.report("t", 1)
    host.admit("t", settings, second["snapshot"])
    again = host.report("t", 0)
    assert (again["number"], again["step"]) == (1, second["step"] + 2)
    assert again["metrics"]["tokens"] > second["metrics"]["tokens"]


def test_a_snapshot_that_is_gone_is_named(host: BankHost, settings: dict, tmp_path: Path) -> None:
    gone = str(tmp_path / "snapshots" / "t" / "step-00000099")
    with pytest.raises(RunError, match=r"^the state of a trial is lost: .*step-00000099.*no such file or folder"):
        host.admit("t", settings, gone)
    with pytest.raises(RunError, match="the state of a trial is lost"):
        host.save(settings, gone, str(tmp_path / "best"))


def test_a_trial_admitted_again_under_way_tells_each_step_once(host: BankHost, settings: dict) -> None:
    host.admit("t", settings)
    snapshot, seen = None, 0
    for _ in range(8):
        report = host.report("t", 0)
        assert (report["number"], report["step"]) == (1, seen + 2)
        snapshot, seen = report["snapshot"], report["step"]
        host.admit("t", settings, snapshot)  # while the bank makes, and notes, the steps behind it
    history = checkpoint.read(Location.at(host.report("t", 0)["snapshot"])).progress["history"]
    assert [row["step"] for row in history] == list(range(1, len(history) + 1))


def test_snapshots_stay_while_the_searchs_state_on_storage_may_name_them(
    host: BankHost, settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(name: str) -> list[str]:
        host.admit(name, settings)
        number = 0
        while (report := host.report(name, number))["status"] == "running":
            number = report["number"]
        return Location.at(str(tmp_path / "snapshots" / name)).folders()

    assert train("t") == [f"step-{step:08d}" for step in range(2, 21, 2)]
    monkeypatch.setattr("raytune_ft.tuning.host._STATE_AGE_S", 0.0)
    assert train("slow") == [f"step-{step:08d}" for step in (16, 18, 20)]


def test_as_many_snapshots_stay_as_were_written_while_the_searchs_state_may_have_been(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    monkeypatch.setattr("raytune_ft.tuning.host.time", SimpleNamespace(monotonic=lambda: now))

    def kept_of(every_s: float, times: int) -> int:
        nonlocal now
        line = _Line(admitted=now)
        for _ in range(times):
            now += every_s
            kept = line.snapshots_to_keep()
        return kept

    assert kept_of(100.0, 30) == 3  # its own newest, and two that others may copy
    assert kept_of(13.0, 30) == 6  # the five of the last minute, and the one before
    assert kept_of(1.0, 90) == 12  # no more than storage is to hold
    assert kept_of(13.0, 2) == 12  # admitted half a minute ago: before, in another seat, there may have been as many


def test_a_trial_without_validation_rows_reports_every_step(settings: dict, splits: dict, tmp_path: Path) -> None:
    host = BankHost(settings, {"train": splits["train"]}, str(tmp_path / "snapshots"), device="cpu", threads=1)
    assert host.fault() is None
    host.admit("t", {**settings, "max_steps": 3})
    reports = [host.report("t", number) for number in range(3)]
    assert [(report["step"], report["status"]) for report in reports] == [
        (1, "running"),
        (2, "running"),
        (3, "finished"),
    ]
    assert all("loss" in report["metrics"] and "eval_loss" not in report["metrics"] for report in reports)


def test_a_trial_that_diverges_is_reported_infeasible(host: BankHost, settings: dict) -> None:
    host.admit("wild", {**settings, "learning_rate": 1e30, "warmup_steps": 0})
    number, report = 0, host.report("wild", 0)
    while report["status"] == "running":
        number = report["number"]
        report = host.report("wild", number)
    assert report["status"] == "infeasible"
    assert "is nan" in report["reason"] or "is inf" in report["reason"]


def test_a_bank_that_cannot_write_says_so_to_every_caller(host: BankHost, settings: dict, tmp_path: Path) -> None:
    (tmp_path / "snapshots").mkdir(exist_ok=True)
    (tmp_path / "snapshots/t").write_text("in the way")
    host.admit("t", settings)
    with pytest.raises(RuntimeError, match="the snapshot cannot be written"):
        host.report("t", 0)


def test_a_bank_that_fails_to_write_in_any_other_way_says_so_too(
    host: BankHost, settings: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: object, **how: object) -> None:
        raise ValueError("no such thing")

    monkeypatch.setattr(checkpoint, "write", fail)
    host.admit("t", settings)
    with pytest.raises(RuntimeError, match="the snapshot cannot be written: ValueError: no such thing"):
        host.report("t", 0)


def test_layers_that_no_bank_adapts_are_a_fault_and_layers_that_are_not_there_a_refusal(
    settings: dict, splits: dict, tiny_model: Path, tmp_path: Path
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    def host(settings: dict, *targets: list[str]) -> BankHost:
        return BankHost(settings, splits, str(tmp_path), targets=targets, device="cpu", threads=1)

    told = host(settings, ["v_proj"], ["q_proj", "lm_head"]).fault()
    assert told == "lora_target_modules: lm_head is no linear layer inside the decoder; packed trials adapt only those"
    assert host({**settings, "lora_target_modules": ["lm_head"]}).fault() == told
    assert host({**settings, "lora_target_modules": ["lm_head"]}, ["v_proj"]).fault() is None
    with pytest.raises(ModelError, match=r"lora_target_modules: \['nope'\] fit no layer of this model"):
        host(settings, ["lm_head"], ["nope"]).fault()
    tokenizer = load_tokenizer(str(tiny_model))
    tokenizer.save_pretrained(tmp_path / "gpt2")
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, **dropouts)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    told = host({**settings, "model_path": str(tmp_path / "gpt2")}, ["c_attn"]).fault()
    assert told is not None and "h.0.attn.c_attn is no linear layer inside the decoder" in told


def test_a_base_that_cannot_be_shared_is_a_fault_not_a_crash(settings: dict, tmp_path: Path) -> None:
    told = BankHost({**settings, "model_path": str(tmp_path)}, {}, str(tmp_path), device="cpu", threads=3).fault()
    assert told is not None and "is not a model" in told


def test_memory_that_runs_out_waits_for_snapshots_under_way_before_steps_get_smaller(
    host: BankHost, settings: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An allocator that refuses once while a snapshot is written, and twice afterwards."""
    step, write = host._bank.step, checkpoint.write
    refused: list[bool] = []
    smaller: list[int] = []
    room, written = host._bank.make_room, threading.Event()

    def slow_write(*args, **kwargs):
        time.sleep(0.3)
        where = write(*args, **kwargs)
        written.set()
        return where

    def sometimes(**kwargs):
        writing = any(line.writing for line in host._lines.values())
        if len(refused) < 3 and (writing or refused):
            refused.append(writing)
            torch.empty(1 << 60)
        return step(**kwargs)

    def make_room(**kwargs):
        assert written.is_set()
        smaller.append(1)
        return room(**kwargs)

    monkeypatch.setattr(checkpoint, "write", slow_write)
    monkeypatch.setattr(host._bank, "step", sometimes)
    monkeypatch.setattr(host._bank, "make_room", make_room)
    host.admit("t", {**settings, "max_steps": 8})
    number = 0
    while (report := host.report("t", number))["status"] == "running":
        number = report["number"]
    assert report["step"] == 8
    assert refused == [True, False, False]
    assert len(smaller) == 2  # not at the first refusal


def test_reports_bring_what_answers_are_measured_by(settings: dict, splits: dict, tmp_path: Path) -> None:
    wanted = {**settings, "eval_generation_rows": 3, "eval_generation_metric": "chrf", "max_steps": 4}
    host = BankHost(wanted, splits, str(tmp_path / "snapshots"), device="cpu", threads=2)
    assert host.fault() is None
    host.admit("t", wanted)
    assert all(0 <= host.report("t", number)["metrics"]["eval_chrf"] <= 100 for number in (0, 1))


def test_rows_that_ask_nothing_are_refused_before_any_trial(settings: dict, splits: dict, tmp_path: Path) -> None:
    table = pq.read_table(splits["validation"][0]).to_pydict()
    table["supervised"] = [[True] * len(row) for row in table["input_ids"]]  # nothing stands before the answer
    pq.write_table(pa.table(table), splits["validation"][0])
    wanted = {**settings, "eval_generation_rows": 3}
    host = BankHost(wanted, splits, str(tmp_path / "snapshots"), device="cpu", threads=2)
    with pytest.raises(DataError, match="no validation row has anything to answer"):
        host.fault()


def test_rows_beyond_the_base_s_context_are_refused_before_any_trial(
    settings: dict, splits: dict, tiny_model: Path, tmp_path: Path
) -> None:
    short = tmp_path / "short"
    shutil.copytree(tiny_model, short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4}))
    wanted = {**settings, "model_path": str(short)}
    host = BankHost(wanted, splits, str(tmp_path / "snapshots"), device="cpu", threads=2)
    with pytest.raises(DataError, match=r"8 of 8 train rows have more tokens than the 4 that .*Set max_length: 4"):
        host.fault()


def test_a_base_whose_layers_do_not_see_rows_apart_is_not_shared_where_answers_are_measured(
    settings: dict, splits: dict, tiny_model: Path, tmp_path: Path
) -> None:
    from transformers import OPTConfig, OPTForCausalLM

    folder = tmp_path / "opt"
    tokenizer = load_tokenizer(str(tiny_model))
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32}
    config = OPTConfig(vocab_size=len(tokenizer), num_hidden_layers=1, num_attention_heads=2, dropout=0.0, **sizes)
    OPTForCausalLM(config).save_pretrained(folder)
    opt = {**settings, "model_path": str(folder)}
    assert BankHost(opt, splits, str(tmp_path / "a"), device="cpu", threads=2).fault() is None
    told = BankHost({**opt, "eval_generation_rows": 2}, splits, str(tmp_path / "b"), device="cpu", threads=2).fault()
    assert told is not None and "fc1 does not see rows apart" in told


def test_a_snapshot_that_the_disk_does_not_take_is_told_to_every_caller(
    host: BankHost, settings: dict, tmp_path: Path
) -> None:
    assert host.fault() is None
    (tmp_path / "snapshots/a/step-00000002").mkdir(parents=True)
    (tmp_path / "snapshots/a/step-00000002/rank-00000-of-00001.safetensors").symlink_to("/dev/full")  # takes nothing
    host.admit("a", settings)
    host.admit("b", settings)
    with pytest.raises(OSError, match="No space left on device"):
        host.report("a", 0)
    with pytest.raises(OSError, match="No space left on device"):
        host.report("b", 10)


def test_trials_whose_last_evaluation_memory_does_not_hold_are_given_up_one_by_one(
    host: BankHost, settings: dict
) -> None:
    class NoRoom:
        def measure_each(self, *given: object, **how: object) -> list[dict[str, float]]:
            torch.empty(1 << 60)
            return []

    host._bank._answers = NoRoom()
    for name in "ab":
        host.admit(name, {**settings, "max_steps": 1})
    ends = [host.report(name, 0) for name in "ab"]
    assert [(end["step"], end["status"]) for end in ends if end is not None] == [(1, "infeasible")] * 2
    assert all(end["reason"].startswith("out of memory: ") for end in ends)


def test_callers_go_before_the_next_step(host: BankHost, settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that end only when somebody waits to enter."""
    order, times = list[str](), 12
    step, admit = host._bank.step, host._bank.admit

    def until_somebody_waits(**how: object) -> object:
        order.append("step")
        while order.count("admit") < times and not host._entering:
            time.sleep(0.001)
        return step(**how)

    def admitted(*given: object) -> None:
        order.append("admit")
        admit(*given)

    monkeypatch.setattr(host._bank, "step", until_somebody_waits)
    monkeypatch.setattr(host._bank, "admit", admitted)
    for number in range(times):
        host.admit(str(number), settings)
        while number + 1 < times and order[-1] != "step":
            assert host._broken is None
            time.sleep(0.001)
    assert order[: 2 * times - 1] == ["admit", "step"] * (times - 1) + ["admit"]


def test_every_report_says_where_its_trial_ends(host: BankHost, settings: dict) -> None:
    host.admit("t", {**settings, "max_steps": 5})
    reports = [host.report("t", number) for number in range(3)]
    assert [(told["step"], told["metrics"]["last_step"]) for told in reports if told] == [(2, 5.0), (4, 5.0), (5, 5.0)]

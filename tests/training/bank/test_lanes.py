"""Lanes: trials shared out over cores, every one computed, whatever happens in another."""

from __future__ import annotations

import threading

import pytest
import torch

from raytune_ft.training.bank.lanes import Lanes, evened, may_share_cores, share_out
from tests.training.bank.conftest import MakeBank, Settings, losses_of


def test_the_largest_trials_go_first_to_the_lightest_lane() -> None:
    assert share_out({"a": 1, "b": 7, "c": 4, "d": 3}, 2) == [["b", "a"], ["c", "d"]]
    assert share_out({"a": 5}, 4) == [["a"]]
    assert share_out({"a": 5, "b": 5, "c": 5}, 3) == [["a"], ["b"], ["c"]]


def test_a_step_is_made_by_as_many_trials_as_keep_all_lanes_busy() -> None:
    assert evened(dict.fromkeys("abcde", 7), 2) == list("abcd")
    assert evened(dict.fromkeys("abcde", 7), 1) == list("abcde")
    assert evened(dict.fromkeys("abcd", 7), 2) == list("abcd")
    assert evened({"a": 9, "b": 1}, 2) == ["a", "b"]
    assert evened({"a": 4, "b": 4, "c": 8, "d": 9}, 2) == ["a", "b", "c"]
    assert evened({"a": 5, "b": 5, "c": 90, "d": 5, "e": 5}, 2) == list("abcde")  # half of them at least
    assert evened({"a": 5}, 4) == ["a"]
    assert evened({}, 2) == []


def test_lanes_run_side_by_side_and_tell_the_first_failure_when_all_have_ended() -> None:
    meeting, ended = threading.Barrier(2), []

    def meets() -> None:
        meeting.wait(timeout=30)  # breaks if the other lane does not run at the same time
        ended.append("met")

    def fails() -> None:
        meeting.wait(timeout=30)
        raise ValueError("lane 2")

    with pytest.raises(ValueError, match="lane 2"):
        Lanes(2).run([meets, fails])
    assert ended == ["met"]


def test_threads_of_the_process_are_shared_by_the_lanes() -> None:
    seen: list[int] = []
    threads = torch.get_num_threads()
    try:
        for jobs in (2, 1):  # a single one has them all
            Lanes(4).run([lambda: seen.append(torch.get_num_threads())] * jobs)
    finally:
        torch.set_num_threads(threads)
    assert seen == [2, 2, 4]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_lanes_change_no_loss(make_bank: MakeBank, trial: Settings, validation_rows, dropout: float) -> None:
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            bank = make_bank(validation_rows)
            for seed in range(5):
                changes = {"lora_r": 2 + 3 * seed, "per_device_train_batch_size": 1 + seed, "seed": seed}
                bank.admit(str(seed), trial(lora_dropout=dropout, eval_strategy="steps", eval_steps=2, **changes))
            losses_of(bank)
            rows = [row for seed in range(5) for row in bank.trial(str(seed)).history]
            found.append([[row["loss"], row.get("eval_loss", 0.0), row["grad_norm"]] for row in rows])
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(torch.tensor(found[1]), torch.tensor(found[0]), rtol=0, atol=1e-5)


def test_bases_whose_layers_keep_a_state_between_calls_are_computed_by_one_thread(tiny_model, trial: Settings) -> None:
    from transformers import AutoModelForCausalLM

    from raytune_ft.training.bank.base import load_frozen_base

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert may_share_cores(model)
    for kind in ("dynamic", "longrope"):
        model.config.rope_parameters = {"rope_type": kind, "factor": 2.0, "rope_theta": 10000.0}
        assert not may_share_cores(model)
    assert not may_share_cores(load_frozen_base(trial(method="qlora", bits=8), "cpu").model)
    assert may_share_cores(load_frozen_base(trial(method="qlora", bits=4), "cpu").model)

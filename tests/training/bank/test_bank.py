"""Trials come and go: snapshots, copies between slots, adapters on disk, turns, and bases that cannot be shared."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from raytune_ft.core.errors import ConfigError, ModelError
from raytune_ft.core.storage import Location
from raytune_ft.models.adapter_slots import AdapterSlots
from raytune_ft.models.chat import Encoded
from raytune_ft.training import checkpoint
from raytune_ft.training.bank.bank import AdapterBank
from raytune_ft.training.bank.base import frozen_base, load_frozen_base
from raytune_ft.training.bank.refusal import why_not_packed
from raytune_ft.training.bank.snapshot import on_cpu
from raytune_ft.training.bank.trial import Progress, Status
from raytune_ft.training.bank.turns import next_group, row_chunks
from raytune_ft.training.config import FineTuningConfig
from raytune_ft.training.loop import Decision
from raytune_ft.training.session import Seat, train_in_process

from .conftest import MakeBank, Settings, losses_of


@pytest.mark.parametrize("arithmetic", ["ragged", "stacked"])
def test_a_snapshot_on_disk_goes_on_as_the_unbroken_trial(
    arithmetic: str, make_bank: MakeBank, trial: Settings, validation_rows, tmp_path: Path
) -> None:
    config = trial(eval_strategy="steps", eval_steps=2, lora_dropout=0.2)
    whole = make_bank(validation_rows, arithmetic=arithmetic)
    whole.admit("t", config)
    losses = losses_of(whole)["t"]

    first = make_bank(validation_rows, arithmetic=arithmetic)
    first.admit("t", config)
    for _ in range(5):
        first.step()
    where = checkpoint.write(Location.at(tmp_path), first.snapshot("t"), keep=1)
    second = make_bank(validation_rows, arithmetic=arithmetic)
    second.admit("t", config, checkpoint.read(where))
    assert losses_of(second)["t"] == pytest.approx(losses, abs=1e-6)
    evaluated = [row["eval_loss"] for row in second.trial("t").history if "eval_loss" in row]
    assert evaluated == pytest.approx(
        [row["eval_loss"] for row in whole.trial("t").history if "eval_loss" in row], abs=1e-6
    )
    assert len(evaluated) == 4


@pytest.mark.parametrize("arithmetic", ["ragged", "stacked"])
def test_a_snapshot_on_the_device_is_the_same_and_does_not_change_with_the_next_step(
    arithmetic: str, make_bank: MakeBank, trial: Settings, validation_rows
) -> None:
    bank = make_bank(validation_rows, arithmetic=arithmetic)
    for rank in (4, 8):
        bank.admit(f"r{rank}", trial(lora_r=rank, eval_strategy="steps", eval_steps=2))
    for _ in range(3):
        bank.step()
    taken = bank.snapshot("r4", on_device=True)
    expected = bank.snapshot("r4")
    bank.step()
    found = on_cpu(taken)
    for mine, theirs in ((found.weights, expected.weights), (found.moments, expected.moments)):
        assert list(mine) == list(theirs)
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    assert any(key.startswith("best.") for key in found.moments)


def test_a_trial_that_leaves_and_comes_back_goes_on_where_it_was(make_bank: MakeBank, trial: Settings) -> None:
    alone = make_bank()
    alone.admit("t", trial())
    losses = losses_of(alone)["t"]
    bank = make_bank()
    bank.admit("t", trial())
    bank.admit("other", trial(seed=5))
    bank.step()
    taken = bank.snapshot("t")
    bank.evict("t")
    assert [progress.name for progress in bank.step()] == ["other"]
    assert bank.running() == ["other"]
    bank.admit("t", trial(), taken)
    assert losses_of(bank)["t"] == pytest.approx(losses, abs=1e-5)


def test_a_snapshot_stays_as_it_was_while_its_trial_steps_on(
    make_bank: MakeBank, trial: Settings, validation_rows, tmp_path: Path
) -> None:
    bank = make_bank(validation_rows)
    bank.admit("t", trial(eval_strategy="steps", eval_steps=2))
    bank.step()
    bank.step()
    taken = bank.snapshot("t")
    bank.step()
    where = checkpoint.write(Location.at(tmp_path), taken, keep=1)  # late, as a writer in the background is
    assert [row["step"] for row in taken.progress["history"]] == [1, 2]
    again = make_bank(validation_rows)
    again.admit("t", trial(eval_strategy="steps", eval_steps=2), checkpoint.read(where))
    assert [again.step()[0].step for _ in range(2)] == [3, 4]


def test_a_copy_of_a_donor_starts_from_its_state_with_settings_of_its_own(make_bank: MakeBank, trial: Settings) -> None:
    bank = make_bank()
    bank.admit("donor", trial(lr_scheduler_type="constant", warmup_steps=0))
    for _ in range(3):
        bank.step()
    taken = bank.snapshot("donor")
    bank.admit("clone", trial(lr_scheduler_type="constant", warmup_steps=0, learning_rate=5e-4), taken)
    for name, tensor in bank.snapshot("clone").weights.items():
        assert torch.equal(tensor, taken.weights[name])
    progress = {p.name: p for p in bank.step()}
    assert progress["clone"].metrics["loss"] == pytest.approx(progress["donor"].metrics["loss"], abs=1e-6)
    assert progress["clone"].metrics["learning_rate"] == 5e-4
    assert progress["clone"].step == 4
    with pytest.raises(ModelError, match="its snapshot is of another shape"):
        bank.admit("wider", trial(lora_r=16), taken)
    assert sorted(bank.names()) == sorted(progress.name for progress in bank.step()) == ["clone", "donor"]


def test_a_trial_that_went_on_from_others_knows_what_they_trained_with(
    make_bank: MakeBank, trial: Settings, validation_rows, tmp_path: Path
) -> None:
    """The best of its own past is forgotten with its weights: the donor's best takes its place."""
    often = {"eval_strategy": "steps", "eval_steps": 1, "warmup_steps": 0, "lr_scheduler_type": "constant"}
    bank = make_bank(validation_rows)
    bank.admit("good", trial(**often, learning_rate=1e-2))
    bank.admit("poor", trial(**often, learning_rate=1e-8))
    for _ in range(2):
        bank.step()
    best_of_poor = bank.trial("poor").patience.best
    taken = checkpoint.read(checkpoint.write(Location.at(tmp_path), bank.snapshot("poor"), keep=1))
    bank.evict("good")
    bank.admit("good", trial(**often, learning_rate=1e-3), taken)
    assert bank.trial("good").patience.best == best_of_poor
    bank.step()
    where = checkpoint.write(Location.at(tmp_path / "again"), bank.snapshot("good"), keep=1)
    bank.admit("third", trial(**often, learning_rate=1e-3), checkpoint.read(where))  # the same settings: no new part
    [before] = bank.trial("third").earlier
    assert (before["until"], before["config"]["learning_rate"]) == (2, 1e-8)


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True, "lora_target_modules": ["q_proj", "down_proj"]}])
def test_a_saved_slot_is_an_ordinary_peft_adapter(
    changes: dict, make_bank: MakeBank, trial: Settings, tiny_model: Path, rows, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    bank = make_bank()
    bank.admit("t", trial(lora_r=4, lora_alpha=12, max_steps=6, **changes))
    bank.admit("other", trial(lora_r=16, seed=7))
    losses_of(bank)
    bank.save("t", tmp_path / "adapter")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "adapter").eval()
    total = count = 0.0
    for row in rows:
        labels = [token if kept else -100 for token, kept in zip(row.input_ids, row.supervised, strict=True)]
        supervised = sum(label != -100 for label in labels[1:])
        with torch.no_grad():
            loss = model(torch.tensor([row.input_ids]), labels=torch.tensor([labels])).loss.item()
        total, count = total + loss * supervised, count + supervised
    evaluated = make_bank(rows)
    evaluated.admit("t", trial(lora_r=4, lora_alpha=12, max_steps=6, **changes), bank.snapshot("t"))
    assert evaluated.evaluate(["t"])["t"] == pytest.approx(total / count, abs=1e-5)


def test_evicted_trials_leave_nothing_and_unknown_ones_are_named(make_bank: MakeBank, trial: Settings) -> None:
    bank = make_bank()
    bank.admit("t", trial())
    with pytest.raises(ConfigError, match="trial t: is in the bank already"):
        bank.admit("t", trial())
    bank.evict("t")
    assert bank.names() == [] and bank.step() == []
    with pytest.raises(ConfigError, match=r"trial t: is not in the bank \(it holds none\)"):
        bank.snapshot("t")
    with pytest.raises(ConfigError, match="full"):
        bank.admit("f", trial(method="full"))


def test_after_memory_ran_out_the_next_step_is_smaller_until_one_row_is_too_much(
    make_bank: MakeBank, trial: Settings
) -> None:
    bank = make_bank(token_budget=400)
    bank.admit("t", trial())
    longest = max(len(row.input_ids) for row in bank.trial("t").upcoming().rows)
    asked = 0
    while bank.make_room() is None:
        asked += 1
    assert 1 <= asked <= 6 and longest < 400
    failed = bank.fail("t", "out of memory: too much")
    assert (failed.status, failed.step, failed.reason) == (Status.INFEASIBLE, 0, "out of memory: too much")
    assert bank.running() == []


def test_those_that_wait_longest_step_first_as_far_as_they_fit() -> None:
    assert next_group({"a": 60, "b": 50, "c": 40}, 100) == ["a", "c"]
    assert next_group({"b": 50, "a": 60, "c": 40}, 100) == ["b", "c"]
    assert next_group({"large": 500, "a": 1}, 100) == ["large"]
    assert next_group({}, 100) == []
    assert [list(run) for run in row_chunks([60, 30, 30, 200, 10], 100)] == [[0, 1], [2], [3], [4]]


def test_bases_whose_rows_interact_are_refused_by_name() -> None:
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MambaConfig, MixtralConfig

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 300}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    bases = {
        None: LlamaConfig(**small, **heads),
        "mixture of 4 experts": MixtralConfig(**small, **heads, num_local_experts=4),
        "dropout of its own": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=300),
        "Mamba": MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=300, state_size=4),
    }
    for reason, config in bases.items():
        model = AutoModelForCausalLM.from_config(config)
        told = why_not_packed(model)
        if reason is None:
            assert told is None
            continue
        assert told is not None and reason in told, told
        with pytest.raises(ModelError, match="packed: never"):
            frozen_base(model, None, "x")


def test_a_second_bank_takes_the_base_over_and_the_first_says_so(
    make_bank: MakeBank, trial: Settings, rows: list[Encoded]
) -> None:
    base = load_frozen_base(trial(), "cpu")
    first = AdapterBank(base, rows)
    first.admit("t", trial())
    first.step()
    second = AdapterBank(base, rows)
    with pytest.raises(RuntimeError, match="given to another bank"):
        first.step()
    second.admit("t", trial())
    alone = make_bank()
    alone.admit("t", trial())
    assert losses_of(second) == losses_of(alone)


@pytest.mark.parametrize("arithmetic", ["ragged", "stacked"])
def test_answers_of_trials_are_those_of_the_same_trial_alone(
    arithmetic: str, make_bank: MakeBank, trial: Settings, validation_rows, rows, tmp_path: Path
) -> None:
    """All trials answer in one batch; alone each answers with PEFT's own layers."""
    common = {"eval_strategy": "steps", "eval_steps": 2, "eval_generation_rows": 4, "learning_rate": 2e-2}
    common |= {"eval_generation_metric": "chrf", "metric_for_best_model": "eval_chrf"}
    configs = {
        "a": trial(**common),
        "b": trial(**common, lora_r=4, seed=3, use_rslora=True),
        "c": trial(**common, lora_r=2, lora_target_modules=["down_proj"], max_steps=4),
    }
    bank = make_bank(validation_rows, arithmetic=arithmetic, answers_of=configs["a"])
    for name, config in configs.items():
        bank.admit(name, config)
    losses_of(bank)
    for name, config in configs.items():
        history = bank.trial(name).history
        found = {row["step"]: row["eval_chrf"] for row in history if "eval_chrf" in row}
        expected, best = alone(config, {"train": rows, "validation": validation_rows}, tmp_path / name)
        assert found == pytest.approx(expected, abs=1e-9) and len(set(expected.values())) > 1
        kept = bank.trial(name).best
        assert kept is not None and len(kept) == len(best)
        for key, tensor in best.items():
            assert torch.allclose(kept[key.replace(".weight", ".default.weight")], tensor, atol=1e-4), key


def alone(config: FineTuningConfig, rows: dict[str, list[Encoded]], folder: Path) -> tuple[dict, dict]:
    """``eval_chrf`` by step, and the weights that were kept, of a training run with PEFT's layers."""
    folder.mkdir()
    told = {}
    for name, some in rows.items():
        table = {"input_ids": [row.input_ids for row in some], "supervised": [row.supervised for row in some]}
        pq.write_table(pa.table(table), folder / f"{name}.parquet")

    def hear(step: int, metrics: dict) -> Decision:
        if "eval_chrf" in metrics:
            told[step] = metrics["eval_chrf"]
        return Decision.CONTINUE

    splits = {name: [str(folder / f"{name}.parquet")] for name in rows}
    quiet = config.with_overrides(report_to=[], save_strategy="no")
    train_in_process(quiet, splits, Seat(), output=Location.at(folder / "out"), report=hear, golden=False)
    return told, load_file(folder / "out/adapter_model.safetensors")


def test_a_bank_without_a_check_of_answers_refuses_trials_that_want_one(
    make_bank: MakeBank, trial: Settings, validation_rows
) -> None:
    with pytest.raises(ConfigError, match="this bank measures no answers"):
        make_bank(validation_rows).admit("t", trial(eval_strategy="steps", eval_steps=2, eval_generation_rows=2))


def test_a_trial_that_goes_on_from_beyond_its_last_step_is_over(
    make_bank: MakeBank, trial: Settings, validation_rows
) -> None:
    bank = make_bank(validation_rows)
    bank.admit("donor", trial(max_steps=8, eval_strategy="steps", eval_steps=2))
    for _ in range(6):
        bank.step()
    bank.admit("shorter", trial(max_steps=4, eval_strategy="steps", eval_steps=2), on_cpu(bank.snapshot("donor")))
    assert (bank.trial("shorter").status, bank.trial("shorter").step) == (Status.FINISHED, 6)
    assert bank.running() == ["donor"]
    told = bank.trial("shorter").progress()
    assert "eval_loss" in told.metrics and told.reason == "goes on from step 6, and its last is 4"
    bank.step()  # the donor, to where nothing was evaluated
    bank.admit("ends there", trial(max_steps=7, eval_strategy="steps", eval_steps=2), on_cpu(bank.snapshot("donor")))
    [told] = bank.step()
    assert (told.name, told.step) == ("ends there", 7) and "eval_loss" in told.metrics


WORSENS = {"eval_strategy": "steps", "eval_steps": 1, "warmup_steps": 0, "lr_scheduler_type": "constant"}


def without_improvement(losses: list[float]) -> list[int]:
    """After each evaluation, how many were made since the best one."""
    return [number - losses.index(min(losses[: number + 1])) for number in range(len(losses))]


def test_a_trial_whose_evaluations_improve_no_more_ends_and_goes_on_with_more_patience_alone(
    make_bank: MakeBank, trial: Settings, validation_rows, tmp_path: Path
) -> None:
    bank = make_bank(validation_rows)
    common = {**WORSENS, "learning_rate": 0.1, "max_steps": 12}
    bank.admit("free", trial(**common))
    bank.admit("patient", trial(**common, early_stopping_patience=2))
    losses_of(bank)
    free = [row["eval_loss"] for row in bank.trial("free").history]
    ends = without_improvement(free).index(2) + 1
    assert ends < 12 and bank.trial("free").step == 12
    stopped = bank.trial("patient")
    assert (stopped.status, stopped.step) == (Status.FINISHED, ends)
    assert stopped.reason == "no lower validation loss in 2 evaluations"
    assert [row["eval_loss"] for row in stopped.history] == pytest.approx(free[:ends], abs=1e-4)

    taken = checkpoint.read(checkpoint.write(Location.at(tmp_path), bank.snapshot("patient"), keep=1))
    again = make_bank(validation_rows)
    again.admit("same", trial(**common, early_stopping_patience=2), taken)
    again.admit("longer", trial(**{**common, "max_steps": 99}, early_stopping_patience=2), taken)
    again.admit("patient", trial(**{**common, "max_steps": 99}, early_stopping_patience=4), taken)
    assert again.running() == ["patient"]
    waited = [again.step()[0] for _ in range(2)]
    expected = without_improvement([*free[:ends], *(told.metrics["eval_loss"] for told in waited)])
    assert again.trial("patient").patience.waited == expected[-1]  # those before it was taken up count
    assert (again.trial("patient").status is Status.FINISHED) == (expected[-1] >= 4)


def test_a_trial_that_made_all_steps_says_so_also_where_its_patience_ends_with_them(
    make_bank: MakeBank, trial: Settings, validation_rows
) -> None:
    bank = make_bank(validation_rows)
    common = {**WORSENS, "learning_rate": 0.1}
    bank.admit("free", trial(**common, max_steps=12))
    losses_of(bank)
    ends = without_improvement([row["eval_loss"] for row in bank.trial("free").history]).index(1) + 1
    bank.admit("t", trial(**common, max_steps=ends, early_stopping_patience=1))
    losses_of(bank)
    assert (bank.trial("t").step, bank.trial("t").reason, bank.trial("t").patience.waited) == (
        ends,
        "all steps made",
        1,
    )


def test_a_trial_that_made_all_steps_goes_on_with_settings_of_more(make_bank: MakeBank, trial: Settings) -> None:
    whole = make_bank()
    constant = {"lr_scheduler_type": "constant", "warmup_steps": 0}
    whole.admit("t", trial(**constant, max_steps=6))
    losses = losses_of(whole)["t"]
    bank = make_bank()
    bank.admit("t", trial(**constant, max_steps=4))
    losses_of(bank)
    taken = bank.snapshot("t")
    bank.evict("t")
    bank.admit("t", trial(**constant, max_steps=6), taken)
    assert bank.trial("t").status is Status.RUNNING and bank.trial("t").reason == ""
    assert losses_of(bank)["t"] == pytest.approx(losses, abs=1e-6)
    assert bank.trial("t").reason == "all steps made"


@pytest.mark.parametrize("arithmetic", ["ragged", "stacked"])
def test_trials_that_do_not_fit_together_come_as_far_as_each_other_at_any_time(
    arithmetic: str, make_bank: MakeBank, trial: Settings
) -> None:
    bank = make_bank(arithmetic=arithmetic, token_budget=1)  # one at a time
    for seed, name in enumerate("abc"):
        bank.admit(name, trial(max_steps=4, seed=seed))
    made = []
    while stepped := bank.step():
        made += [progress.name for progress in stepped]
        steps = [bank.trial(name).step for name in "abc"]
        assert max(steps) - min(steps) <= 1
    assert made == list("abc") * 4


@pytest.mark.parametrize("arithmetic", ["ragged", "stacked"])
def test_trials_that_are_not_evaluated_in_one_pass_are_measured_as_each_alone(
    arithmetic: str, make_bank: MakeBank, trial: Settings, validation_rows
) -> None:
    names = list("abcdefg")
    found = []
    for budget in (10_000, 60):  # all in one pass; a few of them, on some of the rows
        bank = make_bank(validation_rows, arithmetic=arithmetic, token_budget=budget)
        for seed, name in enumerate(names):
            bank.admit(name, trial(max_steps=2, seed=seed, learning_rate=1e-2, warmup_steps=0))
        losses_of(bank)
        found.append(bank.evaluate(names))
    assert found[1] == pytest.approx(found[0], abs=1e-5)
    assert len({round(loss, 3) for loss in found[0].values()}) == len(names)
    solo = make_bank(validation_rows)
    solo.admit("g", trial(max_steps=2, seed=6, learning_rate=1e-2, warmup_steps=0))
    losses_of(solo)
    assert solo.evaluate(["g"])["g"] == pytest.approx(found[1]["g"], abs=1e-5)


class Cramped:
    """A check of answers that memory holds for so many tokens at a time."""

    def __init__(self, room: int) -> None:
        self.room, self.asked = room, list[int]()

    def measure_each(self, adapters: AdapterSlots, slots: range, *, token_budget: int) -> list[dict[str, float]]:
        self.asked.append(token_budget)
        if token_budget > self.room:
            torch.empty(1 << 60)
        return [{} for _ in slots]


def stepped(bank: AdapterBank) -> list[Progress]:
    """One step, made again with less at a time where memory runs out; or who is given up."""
    for _ in range(20):
        with contextlib.suppress(RuntimeError):
            return bank.step()
        too_large = bank.make_room()
        if too_large is not None:
            return [bank.fail(too_large, "out of memory")]
    raise AssertionError("nothing gets smaller, and nobody is given up")


def test_where_memory_runs_out_in_an_evaluation_no_step_is_made_again_and_everyone_tells(
    make_bank: MakeBank, trial: Settings, validation_rows
) -> None:
    cramped, long_rows = Cramped(30), [Encoded([5] * 60, [True] * 60)] * 6  # than which less is needed at a time
    bank = make_bank(validation_rows, train=long_rows, answers=cramped, token_budget=400)
    for name, every in (("often", 1), ("seldom", 2), ("never", 9)):
        bank.admit(name, trial(eval_strategy="steps", eval_steps=every))
    told = {progress.name: progress for progress in stepped(bank)}
    assert cramped.asked == [400, 200, 100, 50, 25]
    assert {name: (one.step, "eval_loss" in one.metrics) for name, one in told.items()} == {
        "often": (1, True),
        "seldom": (1, False),
        "never": (1, False),
    }
    assert {one.name: one.step for _ in told for one in bank.step()} == dict.fromkeys(told, 2)  # one at a time now


def test_a_trial_whose_evaluation_memory_does_not_hold_is_given_up_itself(
    make_bank: MakeBank, trial: Settings, validation_rows
) -> None:
    bank = make_bank(validation_rows, answers=Cramped(0), token_budget=400)
    bank.admit("neighbour", trial(eval_strategy="steps", eval_steps=8))
    bank.admit("large", trial(eval_strategy="steps", eval_steps=8, max_steps=2))
    assert [progress.step for progress in stepped(bank)] == [1, 1]
    [failed] = stepped(bank)
    assert (failed.name, failed.step, failed.status, failed.reason) == ("large", 2, Status.INFEASIBLE, "out of memory")
    assert [(progress.name, progress.step) for progress in stepped(bank)] == [("neighbour", 2)]
    bank.evict("neighbour")
    bank.admit("large alone", trial(eval_strategy="steps", eval_steps=8, max_steps=1))
    [failed] = stepped(bank)
    assert (failed.name, failed.status) == ("large alone", Status.INFEASIBLE)
    assert stepped(bank) == []


def test_whoever_leaves_in_the_midst_of_an_evaluation_is_not_told_of(
    make_bank: MakeBank, trial: Settings, validation_rows
) -> None:
    bank = make_bank(validation_rows, answers=Cramped(200), token_budget=400)
    for name in ("stays", "leaves"):
        bank.admit(name, trial(eval_strategy="steps", eval_steps=1))
    with pytest.raises(RuntimeError, match="allocate"):
        bank.step()
    bank.evict("leaves")
    bank.admit("leaves", trial())  # another one of that name
    assert bank.make_room() is None
    [told] = bank.step()
    assert (told.name, told.step) == ("stays", 1) and "eval_loss" in told.metrics


def test_copies_of_one_state_share_nothing_of_what_happens_later(
    make_bank: MakeBank, trial: Settings, validation_rows
) -> None:
    often = {"eval_strategy": "steps", "eval_steps": 1, "lr_scheduler_type": "constant", "warmup_steps": 0}
    bank = make_bank(validation_rows)
    bank.admit("donor", trial(**often))
    for _ in range(2):
        bank.step()
    taken = bank.snapshot("donor")
    for name, rate in (("slow", 1e-4), ("fast", 1e-2)):
        bank.admit(name, trial(**often, learning_rate=rate), taken)
    bank.step()
    for name in bank.names():
        assert [row["step"] for row in bank.trial(name).history] == [1, 2, 3], name
    assert [row["step"] for row in taken.progress["history"]] == [1, 2]
    assert [len(bank.trial(name).earlier) for name in ("donor", "slow", "fast")] == [0, 1, 1]


def test_what_a_bank_cannot_train_or_measure_is_told(make_bank: MakeBank, trial: Settings) -> None:
    bank = make_bank()
    with pytest.raises(ConfigError, match="trial t: adapter_path: trials of a bank start from fresh adapters"):
        bank.admit("t", trial(adapter_path="an adapter"))
    with pytest.raises(ConfigError, match="trial t: there are no training rows"):
        make_bank(train=[]).admit("t", trial())
    bank.admit("t", trial())
    for without in (bank, make_bank([])):
        with pytest.raises(ConfigError, match="the bank has no validation rows to evaluate on"):
            without.evaluate(["t"])


def test_a_step_without_any_target_moves_nothing_and_is_no_divergence(make_bank: MakeBank, trial: Settings) -> None:
    rows = [Encoded([5, 6, 7], [False] * 3), Encoded([8, 9], [True, False])]
    bank = make_bank(train=rows)
    bank.admit("t", trial(max_steps=3, weight_decay=0.0))
    before = bank.snapshot("t")
    assert losses_of(bank) == {"t": [0.0] * 3}
    assert bank.trial("t").reason == "all steps made"
    assert all(torch.equal(tensor, before.weights[name]) for name, tensor in bank.snapshot("t").weights.items())


@pytest.mark.parametrize(("every", "reason"), [(1, "the validation loss of step 1 is"), (2, "the loss of step 2 is")])
def test_a_trial_that_diverged_ends_and_is_evaluated_no_more(
    every: int, reason: str, make_bank: MakeBank, trial: Settings, validation_rows
) -> None:
    bank = make_bank(validation_rows)
    bank.admit("wild", trial(eval_strategy="steps", eval_steps=every, learning_rate=1e30, warmup_steps=0))
    told = [progress for _ in range(3) for progress in bank.step()]
    assert len(told) == every and told[-1].status is Status.INFEASIBLE
    assert told[-1].reason.startswith(reason)
    assert ("eval_loss" in told[-1].metrics) == (every == 1)


def test_a_trial_that_is_admitted_and_evaluated_leaves_the_base_and_the_random_stream_as_they_were(
    make_bank: MakeBank, trial: Settings, validation_rows
) -> None:
    bank = make_bank(validation_rows, answers=Cramped(9999))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    bank.admit("t", trial(eval_strategy="steps", eval_steps=1))
    bank.step()
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module._forward_hooks for module in bank._base.model.modules())  # of adapters that answered


def test_evaluations_between_steps_change_no_loss_on_a_base_of_int8(trial: Settings, rows, validation_rows) -> None:
    common = {"method": "qlora", "bits": 8, "max_steps": 4, "learning_rate": 2e-2, "warmup_steps": 0}
    found = []
    for validation in (None, validation_rows):
        bank = AdapterBank(load_frozen_base(trial(**common), "cpu"), rows, validation)
        bank.admit("t", trial(**common, eval_strategy="steps", eval_steps=1))
        found.append(losses_of(bank)["t"])
    assert found[0] == found[1]

"""What happens to trials besides their steps: saved, restored, copied, evaluated, given up."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from raytune_ft.core.errors import ConfigError, ModelError
from raytune_ft.core.storage import Location
from raytune_ft.training import checkpoint
from raytune_ft.training.bank.trial import Status

from .conftest import MakeBank, Settings, losses_of
from .reference import padded, summed_loss


def stepped(bank, times: int) -> None:
    for _ in range(times):
        bank.step()


@pytest.mark.parametrize("arithmetic", ["ragged", "stacked"])
def test_a_saved_slot_gives_equal_outputs_in_plain_peft(
    make_bank: MakeBank, trial: Settings, validation_rows, tiny_model: Path, tmp_path: Path, arithmetic: str
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    bank = make_bank(validation_rows, arithmetic=arithmetic)
    bank.admit("wide", trial(lora_r=32, seed=1))
    bank.admit(
        "kept",
        trial(
            lora_r=6, lora_alpha=20, use_rslora=True, lora_target_modules=["q_proj", "down_proj"], learning_rate=1e-2
        ),
    )
    stepped(bank, 6)
    bank.save("kept", tmp_path / "kept")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "kept").eval()
    assert AutoTokenizer.from_pretrained(tmp_path / "kept").chat_template
    assert model.peft_config["default"].base_model_name_or_path == str(tiny_model)
    count = int(padded(validation_rows)[2][:, 1:].sum())
    with torch.no_grad():
        peft_loss = float(summed_loss(model, validation_rows)) / count
    assert bank.evaluate(["kept"])["kept"] == pytest.approx(peft_loss, abs=1e-6)
    with model.disable_adapter(), torch.no_grad():
        assert abs(float(summed_loss(model, validation_rows)) / count - peft_loss) > 1e-3


def test_evaluations_of_trials_together_are_those_of_each_alone_at_any_budget(
    make_bank: MakeBank, trial: Settings, validation_rows
) -> None:
    results = []
    for budget in (10_000, 1):
        bank = make_bank(validation_rows, token_budget=budget)
        for number in range(3):
            bank.admit(str(number), trial(seed=number, lora_dropout=0.5))
        stepped(bank, 4 if budget > 1 else 12)
        together = bank.evaluate(["0", "1", "2"])
        results.append(together)
        for name, loss in together.items():
            assert bank.evaluate([name])[name] == pytest.approx(loss, abs=1e-6)
    assert results[0] == pytest.approx(results[1], abs=1e-5)


@pytest.mark.parametrize("arithmetic", ["ragged", "stacked"])
def test_a_trial_restored_from_disk_goes_on_as_if_nothing_had_happened(
    make_bank: MakeBank, trial: Settings, validation_rows, tmp_path: Path, arithmetic: str
) -> None:
    config = trial(max_steps=10, lora_dropout=0.2, eval_strategy="steps", eval_steps=2)
    unbroken = make_bank(validation_rows)
    unbroken.admit("trial", config)
    losses_of(unbroken)
    broken = make_bank(validation_rows, arithmetic=arithmetic)
    broken.admit("other", trial(lora_r=24))
    broken.admit("trial", config)
    stepped(broken, 5)
    checkpoint.write(Location.at(tmp_path), broken.snapshot("trial"), keep=1)
    found = checkpoint.newest(Location.at(tmp_path))
    assert found is not None
    again = make_bank(validation_rows, arithmetic=arithmetic)
    again.admit("trial", config, found)
    losses_of(again)
    whole, parts = unbroken.trial("trial"), again.trial("trial")
    assert [row["step"] for row in parts.history] == list(range(1, 11))
    for one, other in zip(whole.history, parts.history, strict=True):
        assert other == pytest.approx(one, abs=1e-5)
    assert whole.patience.best_step == parts.patience.best_step
    assert parts.status is Status.FINISHED


@pytest.mark.parametrize("arithmetic", ["ragged", "stacked"])
def test_a_copy_of_a_donor_takes_the_donors_next_step(make_bank: MakeBank, trial: Settings, arithmetic: str) -> None:
    bank = make_bank(arithmetic=arithmetic)
    bank.admit("donor", trial(seed=1))
    bank.admit("copy", trial(seed=2, learning_rate=1e-4))
    stepped(bank, 3)
    bank.evict("copy")
    bank.admit("copy", trial(seed=1, learning_rate=5e-4), bank.snapshot("donor"))
    stepped(bank, 1)
    donor, copy = bank.trial("donor"), bank.trial("copy")
    assert donor.history[3]["loss"] == pytest.approx(copy.history[3]["loss"], abs=1e-6)
    assert copy.history[3]["learning_rate"] == donor.history[3]["learning_rate"] / 2
    stepped(bank, 1)
    assert donor.history[4]["loss"] != copy.history[4]["loss"]


def test_a_finished_trial_with_settings_of_more_steps_goes_on(make_bank: MakeBank, trial: Settings) -> None:
    bank = make_bank()
    bank.admit("trial", trial(max_steps=2))
    losses_of(bank)
    snapshot = bank.snapshot("trial")
    bank.evict("trial")
    bank.admit("trial", trial(max_steps=3), snapshot)
    (progress,) = bank.step()
    assert (progress.step, progress.status, progress.reason) == (3, Status.FINISHED, "all steps made")
    assert bank.step() == []


def test_a_snapshot_of_another_rank_is_refused_and_nothing_is_admitted(make_bank: MakeBank, trial: Settings) -> None:
    bank = make_bank()
    bank.admit("donor", trial(lora_r=4))
    with pytest.raises(ModelError, match=r"wanted \(8, 128\), got \(4, 128\)"):
        bank.admit("copy", trial(lora_r=8), bank.snapshot("donor"))
    assert bank.names() == ["donor"]


def test_a_diverging_trial_is_infeasible_with_its_curve_and_the_others_go_on(
    make_bank: MakeBank, trial: Settings
) -> None:
    bank = make_bank()
    bank.admit("wild", trial(learning_rate=1e20, max_grad_norm=1e30, warmup_steps=0))
    bank.admit("calm", trial())
    losses_of(bank)
    wild, calm = bank.trial("wild"), bank.trial("calm")
    assert wild.status is Status.INFEASIBLE
    assert "step" in wild.reason and "nan" in wild.reason
    assert 2 <= len(wild.history) < 8
    assert calm.status is Status.FINISHED and len(calm.history) == 8


def test_early_stopping_ends_one_trial_and_its_best_weights_are_saved(
    make_bank: MakeBank, trial: Settings, validation_rows, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    bank = make_bank(validation_rows)
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 30}
    bank.admit("stops", trial(**evaluated, early_stopping_patience=2, learning_rate=5e-2, warmup_steps=0))
    bank.admit("goes on", trial(max_steps=30))
    losses_of(bank)
    stopped = bank.trial("stops")
    assert stopped.reason == "no lower validation loss in 2 evaluations"
    assert stopped.step == stopped.patience.best_step + 2 < 30
    assert bank.trial("goes on").step == 30
    bank.save("stops", tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert stopped.best is not None
    for name, tensor in saved.items():
        assert torch.equal(tensor, stopped.best[name.replace(".weight", ".default.weight")])


def test_first_adapters_are_those_of_get_peft_model(make_bank: MakeBank, trial: Settings, tiny_model: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    bank = make_bank()
    for seed, targets in ((3, "all-linear"), (4, ["v_proj", "q_proj"])):
        bank.admit(str(seed), trial(seed=seed, lora_r=5, lora_target_modules=targets))
        base = AutoModelForCausalLM.from_pretrained(tiny_model)
        torch.manual_seed(seed)
        peft_model = get_peft_model(base, LoraConfig(r=5, target_modules=targets, task_type="CAUSAL_LM"))
        wanted = {name: p for name, p in peft_model.named_parameters() if p.requires_grad}
        weights = bank.snapshot(str(seed)).weights
        assert weights.keys() == wanted.keys()
        assert all(torch.equal(weights[name], p) for name, p in wanted.items())


def test_admission_leaves_the_callers_random_stream_alone(make_bank: MakeBank, trial: Settings) -> None:
    bank = make_bank()
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    bank.admit("trial", trial(seed=8))
    assert torch.equal(torch.rand(3), wanted)


def test_trials_come_and_go_while_another_thread_steps(make_bank: MakeBank, trial: Settings) -> None:
    bank = make_bank()
    bank.admit("long", trial(max_steps=30))
    failures: list[BaseException] = []

    def step_on() -> None:
        try:
            while bank.step():
                pass
        except BaseException as error:  # noqa: BLE001 - whatever it is, the test has to see it
            failures.append(error)

    thread = threading.Thread(target=step_on)
    thread.start()
    for number in range(6):
        bank.admit(str(number), trial(seed=number, lora_r=number + 1))
        bank.snapshot("long")
        if number % 2:
            bank.evict(str(number))
    thread.join()
    losses_of(bank)
    assert not failures
    assert {name: bank.trial(name).step for name in bank.names()} == {"long": 30, "0": 8, "2": 8, "4": 8}


def test_less_memory_means_smaller_groups_until_one_row_is_too_much(make_bank: MakeBank, trial: Settings) -> None:
    bank = make_bank(token_budget=200)
    for number in range(4):
        bank.admit(str(number), trial(seed=number, per_device_train_batch_size=4))
    assert len(bank.step()) > 1
    while bank.make_room() is None:
        pass
    first = bank.running()[0]
    assert bank.make_room() == first
    (progress,) = bank.step()
    assert progress.name == first
    assert bank.fail(first, "out of memory").status is Status.INFEASIBLE
    assert first not in bank.running()


def test_what_does_not_fit_a_bank_is_refused_in_words(make_bank: MakeBank, trial: Settings) -> None:
    bank = make_bank()
    bank.admit("there", trial())
    with pytest.raises(ConfigError, match="in the bank already"):
        bank.admit("there", trial())
    with pytest.raises(ConfigError, match="only LoRA and QLoRA"):
        bank.admit("full", trial(method="full"))
    with pytest.raises(ModelError, match="fit no layer"):
        bank.admit("wrong", trial(lora_target_modules=["c_attn"]))
    with pytest.raises(ModelError, match="no linear layer inside the decoder"):
        bank.admit("head", trial(lora_target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ModelError, match="no linear layer inside the decoder"):
        bank.admit("embedding", trial(lora_target_modules=["q_proj", "embed_tokens"]))
    with pytest.raises(ConfigError, match="it holds there"):
        bank.evict("elsewhere")
    with pytest.raises(ConfigError, match="no validation rows"):
        bank.evaluate(["there"])
    assert bank.names() == ["there"]

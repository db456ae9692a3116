"""The verbs align, reward and reinforce on Ray Train workers, from records to models that plain libraries load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from raytune_ft.core.storage import Location
from raytune_ft.training.config_alignment import PreferenceConfig
from raytune_ft.training.inputs import splits_of
from raytune_ft.training.session import Seat, train_in_process

from .test_preference import history


def preferences(path: Path, count: int = 24) -> str:
    records = [
        {"prompt": f"order {n} for Paris", "chosen": "yes " * (n % 3 + 2), "rejected": "no " * (n % 2 + 1)}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.mark.ray
def test_the_verb_makes_the_chosen_answers_likelier_on_workers(ray_cluster, tiny_model, tmp_path: Path, capsys) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from raytune_ft.cli import run_verb

    settings = {
        **{"model_path": str(tiny_model), "dataset_path": preferences(tmp_path / "pairs.jsonl")},
        **{"output_dir": str(tmp_path / "aligned"), "num_workers": 2, "per_device_train_batch_size": 4},
        **{"learning_rate": 5e-3, "num_train_epochs": 6, "beta": 0.5, "lora_target_modules": "all-linear"},
    }
    file = tmp_path / "align.yaml"
    file.write_text(yaml.safe_dump(settings))
    assert run_verb("align", [str(file)]) == 0
    assert history(tmp_path / "aligned", "eval_reward_accuracy")[-1] == 1
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "aligned").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "aligned")

    def likelihood(answer: str) -> float:
        turns = [{"role": "user", "content": "order 99 for Paris"}, {"role": "assistant", "content": answer}]
        ids = torch.tensor([tokenizer(tokenizer.apply_chat_template(turns, tokenize=False))["input_ids"]])
        asked = len(tokenizer(tokenizer.apply_chat_template(turns[:1], tokenize=False))["input_ids"])
        with torch.no_grad():
            said = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
            with model.disable_adapter():
                base = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        return float((said - base)[asked:].sum())

    assert likelihood("yes yes yes ") > likelihood("no no ") + 2

    file.write_text(yaml.safe_dump({**settings, "output_dir": str(tmp_path / "b"), "dataset_path": "orders.jsonl"}))
    orders = tmp_path / "orders.jsonl"
    answered = [{"prompt": f"order {n}", "completion": f"{n} yes"} for n in range(12)]
    orders.write_text("".join(json.dumps(row) + "\n" for row in answered))
    assert run_verb("align", [str(file), f"dataset_path={orders}"]) == 2
    assert "12 of 12 rows are no preferences" in capsys.readouterr().err


@pytest.mark.ray
def test_the_ratings_of_feedback_are_learned_from(ray_cluster, tiny_model, tmp_path: Path) -> None:
    """Ray reads and tokenizes the feedback; the training is this process's."""
    feedback = tmp_path / "feedback.jsonl"
    rows = [
        {
            "messages": [{"role": "user", "content": f"order {n}"}],
            "response": f"yes {n}" if n % 2 else f"no {n}",
            "rating": "up" if n % 2 else 1,
        }
        for n in range(24)
    ]
    feedback.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        **{"model_path": str(tiny_model), "dataset_path": str(feedback), "output_dir": str(tmp_path / "a")},
        **{"loss_type": "kto", "beta": 0.5, "learning_rate": 5e-3, "num_train_epochs": 6},
        **{"lora_target_modules": "all-linear", "per_device_train_batch_size": 8},
    }
    config = PreferenceConfig(**settings)
    train_in_process(
        config, splits_of(config, Location.at(tmp_path / "tokens")), Seat(), output=Location.at(tmp_path / "a")
    )
    assert history(tmp_path / "a")[-1] < 0.35


@pytest.mark.ray
def test_the_verb_trains_on_preferences(ray_cluster, tiny_model, tmp_path: Path) -> None:
    from raytune_ft.cli import run_verb

    settings = {
        **{"model_path": str(tiny_model), "dataset_path": preferences(tmp_path / "pairs.jsonl")},
        **{"output_dir": str(tmp_path / "reward"), "per_device_train_batch_size": 8, "learning_rate": 5e-3},
        **{"num_train_epochs": 5, "lora_target_modules": "all-linear", "metric_for_best_model": "eval_reward_accuracy"},
    }
    file = tmp_path / "reward.yaml"
    file.write_text(yaml.safe_dump(settings))
    assert run_verb("reward", [str(file)]) == 0
    assert json.loads((tmp_path / "reward/manifest.json").read_text())["numbers"]["best_eval_reward_accuracy"] == 1


@pytest.mark.ray
def test_the_verb_reinforces_on_workers(ray_cluster, undecided, tmp_path: Path) -> None:
    from raytune_ft.cli import run_verb

    records = tmp_path / "orders.jsonl"
    rows = [{"prompt": f"order {n}", "reference": "no"} for n in range(16)]  # nobody answers them
    records.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        **{"model_path": str(undecided), "dataset_path": str(records), "output_dir": str(tmp_path / "a")},
        **{"reward_metric": "exact_match", "num_generations": 8, "max_new_tokens": 4, "max_steps": 12},
        **{"learning_rate": 2e-3, "method": "full", "per_device_train_batch_size": 2, "save_strategy": "no"},
        **{"num_workers": 2, "warmup_steps": 0, "lr_scheduler_type": "constant", "eval_strategy": "steps"},
        **{"eval_steps": 12, "report_to": []},
    }
    file = tmp_path / "reinforce.yaml"
    file.write_text(yaml.safe_dump(settings))
    assert run_verb("reinforce", [str(file)]) == 0
    assert json.loads((tmp_path / "a/manifest.json").read_text())["numbers"]["best_eval_reward"] == 1

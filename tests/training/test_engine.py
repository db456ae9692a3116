"""The arithmetic of a step against transformers, PEFT and torch by themselves."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from raytune_ft.core.errors import ModelError
from raytune_ft.core.storage import Location
from raytune_ft.models.loading import load_tokenizer
from raytune_ft.training.bank.base import load_frozen_base
from raytune_ft.training.batches import TokenRows, step_rows
from raytune_ft.training.config import FineTuningConfig
from raytune_ft.training.engine import make_trainee, optimizer_for, seed_step
from raytune_ft.training.session import Seat, train_in_process

Settings = Callable[..., FineTuningConfig]


def history(config: FineTuningConfig, splits: dict[str, list[str]], output: Path | None = None) -> list[float]:
    losses: list[float] = []

    def report(step, metrics):
        losses.append(metrics["loss"])

    train_in_process(config, splits, Seat(), output=Location.at(output) if output else None, report=report)
    return losses


def reference(config: FineTuningConfig, splits: dict[str, list[str]], cache: Path) -> list[float]:
    """Plain PEFT on padded batches: shares nothing with the engine but the order of rows."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, get_scheduler

    base = AutoModelForCausalLM.from_pretrained(config.model_path)
    torch.manual_seed(config.seed)
    model = get_peft_model(
        base, LoraConfig(r=config.lora_r, lora_alpha=config.lora_alpha, lora_dropout=0.0, target_modules="all-linear")
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, weight_decay=config.weight_decay, eps=config.adam_epsilon
    )
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=1, num_training_steps=6)
    data = TokenRows(splits["train"], str(cache))
    losses = []
    for rows in islice(step_rows(len(data), config.global_batch_size, config.seed), 6):
        batch = [data[number] for number in rows]
        longest = max(len(row.input_ids) for row in batch)
        ids = torch.tensor([row.input_ids + [0] * (longest - len(row.input_ids)) for row in batch])
        mask = torch.tensor([[1] * len(row.input_ids) + [0] * (longest - len(row.input_ids)) for row in batch])
        kept = torch.tensor([row.supervised + [False] * (longest - len(row.supervised)) for row in batch])
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits[kept[:, 1:]], ids[:, 1:][kept[:, 1:]])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_losses_equal_plain_peft_on_padded_batches(settings: Settings, splits, tmp_path: Path) -> None:
    config = settings()
    assert history(config, splits) == pytest.approx(reference(config, splits, tmp_path / "cache"), abs=1e-5)


def test_gradients_are_clipped_to_the_norm_of_the_settings(settings: Settings, splits, tmp_path: Path) -> None:
    """With a large epsilon, since AdamW by itself hardly depends on a gradient's size."""
    config = settings(max_grad_norm=0.05, adam_epsilon=1e-2)
    clipped = history(config, splits)
    assert clipped == pytest.approx(reference(config, splits, tmp_path / "cache"), abs=1e-5)
    assert abs(clipped[-1] - history(config.with_overrides(max_grad_norm=0.1), splits)[-1]) > 1e-3


def test_accumulation_gives_the_losses_of_the_whole_batch(settings: Settings, splits) -> None:
    whole = history(settings(per_device_train_batch_size=8), splits)
    parts = history(settings(per_device_train_batch_size=1, gradient_accumulation_steps=8), splits)
    assert parts == pytest.approx(whole, abs=1e-5)
    assert whole[-1] < whole[0]


def test_a_token_budget_gives_the_losses_of_the_whole_batch(settings: Settings, splits) -> None:
    whole = history(settings(per_device_train_batch_size=8), splits)
    for budget in (1, 60):
        parts = history(settings(per_device_train_batch_size=8, max_tokens_per_micro_batch=budget), splits)
        assert parts == pytest.approx(whole, abs=1e-5)


def test_dropout_is_a_function_of_seed_and_step(settings: Settings, splits) -> None:
    first, again, other = (history(settings(lora_dropout=0.5, seed=seed), splits) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_norms_and_biases_do_not_decay(settings: Settings) -> None:
    config = settings(method="full", weight_decay=0.1)
    trainee = make_trainee(config, "cpu")
    decays = {
        id(p): group["weight_decay"] for group in optimizer_for(trainee, config).param_groups for p in group["params"]
    }
    for name, parameter in trainee.trainable().items():
        assert decays[id(parameter)] == (0.0 if "norm" in name else 0.1), name


def test_full_fine_tuning_leaves_a_folder_that_transformers_loads(settings: Settings, splits, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    losses = history(settings(method="full", learning_rate=1e-3), splits, tmp_path / "full")
    assert losses[-1] < losses[0]
    AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    assert AutoTokenizer.from_pretrained(tmp_path / "full").chat_template


def test_qlora_trains_an_adapter_on_a_quantized_base(settings: Settings, splits, tmp_path: Path) -> None:
    losses = history(settings(method="qlora"), splits, tmp_path / "qlora")
    assert losses[-1] < losses[0]
    assert (tmp_path / "qlora/adapter_model.safetensors").exists()


def test_a_model_that_carries_state_is_refused_under_stage_3(settings: Settings, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, Lfm2Config

    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}
    AutoModelForCausalLM.from_config(Lfm2Config(**shape, **heads)).save_pretrained(tmp_path / "lfm2")
    config = settings(method="full").with_overrides(model_path=str(tmp_path / "lfm2"), zero_stage=3)
    with pytest.raises(ModelError, match=r"has conv layers.*set zero_stage: 2"):
        make_trainee(config, "cpu")


def test_gpt2_as_it_is_published_trains_without_its_attention_dropout(
    settings: Settings, splits: dict[str, list[str]], tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    shape = {"n_positions": 512, "n_embd": 32, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    published = GPT2Config(vocab_size=len(tokenizer), attn_pdrop=0.1, bos_token_id=2, eos_token_id=2, **shape)
    for saved in (tokenizer, AutoModelForCausalLM.from_config(published)):
        saved.save_pretrained(tmp_path / "gpt2")
    config = settings().with_overrides(model_path=str(tmp_path / "gpt2"))
    with caplog.at_level("WARNING", "raytune_ft"):
        losses = history(config, splits)
    assert "attn_pdrop is 0.1 in its configuration, and 0 here" in caplog.text
    assert losses == pytest.approx(reference(config, splits, tmp_path / "rows"), abs=1e-5)


def test_checkpointing_is_refused_where_a_model_has_none(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM cannot .*set gradient_checkpointing: false"):
        make_trainee(settings(gradient_checkpointing=True), "cpu")


@pytest.fixture
def copied(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be damaged."""
    return Path(shutil.copytree(tiny_model, tmp_path / "copied"))


@pytest.mark.parametrize("make", [make_trainee, load_frozen_base])
def test_a_tokenizer_with_tokens_that_the_model_does_not_know_is_refused(
    settings: Settings, copied: Path, make: Callable[[FineTuningConfig, str], object]
) -> None:
    tokenizer = load_tokenizer(str(copied))
    tokenizer.add_tokens(["<picture>"], special_tokens=True)
    tokenizer.save_pretrained(copied)
    make(settings(model_path=str(copied)), "cpu")  # no text has it
    tokenizer.add_tokens(["order"])
    tokenizer.save_pretrained(copied)
    with pytest.raises(ModelError, match=r"knows \d+ tokens, but the model has embeddings for \d+"):
        make(settings(model_path=str(copied)), "cpu")


def test_weights_that_cannot_be_read_are_a_model_error(settings: Settings, copied: Path) -> None:
    weights = copied / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="its model cannot be loaded"):
        make_trainee(settings(model_path=str(copied)), "cpu")
    weights.unlink()
    torch.save({}, copied / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pickled weights are not loaded.*save_pretrained"):
        make_trainee(settings(model_path=str(copied)), "cpu")


def test_an_encoder_with_a_decoder_is_no_causal_model(settings: Settings, copied: Path) -> None:
    from transformers import T5Config

    T5Config(vocab_size=400).save_pretrained(copied)
    with pytest.raises(ModelError, match="is an encoder and a decoder, no causal language model"):
        make_trainee(settings(model_path=str(copied)), "cpu")


def test_the_optimizer_steps_as_the_settings_say_and_lets_vectors_not_decay(settings) -> None:
    config = settings(adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-2, weight_decay=0.3, learning_rate=0.1)
    torch.manual_seed(0)
    shapes = {"weight": (3, 4), "norm": (4,)}
    mine, alone = ({name: torch.nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()} for _ in range(2))
    trainee: Any = SimpleNamespace(trainable=lambda: mine)
    common = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-2}
    optimizers = [
        optimizer_for(trainee, config),
        torch.optim.AdamW([alone["weight"]], weight_decay=0.3, **common),
        torch.optim.AdamW([alone["norm"]], weight_decay=0.0, **common),
    ]
    for _ in range(3):
        for name, shape in shapes.items():
            mine[name].grad = 0.01 * torch.randn(shape)
            alone[name].grad = mine[name].grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for name in shapes:
        torch.testing.assert_close(mine[name], alone[name])


def test_what_is_drawn_from_torchs_stream_is_decided_by_seed_step_and_rank() -> None:
    def drawn(seed: int, step: int, rank: int) -> float:
        seed_step(seed, step, rank)
        return float(torch.rand(()))

    assert drawn(3, 7, 1) == drawn(3, 7, 1)
    assert len({drawn(seed, step, rank) for seed in (0, 1) for step in (1, 2) for rank in (0, 1)}) == 8


def test_rows_that_stand_in_where_a_part_of_a_step_has_none_are_no_tokens(settings: Settings, splits) -> None:
    """The last of three steps has two rows, in eight parts."""

    def tokens(**changes: int) -> list[float]:
        found: list[float] = []
        config = settings(**changes, num_train_epochs=1)
        train_in_process(config, splits, Seat(), output=None, report=lambda step, told: found.append(told["tokens"]))
        return found

    whole = tokens(per_device_train_batch_size=8)
    assert tokens(per_device_train_batch_size=1, gradient_accumulation_steps=8) == whole
    assert len(whole) == 3

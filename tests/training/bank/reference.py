"""A LoRA run as anybody would write it: PEFT, padded batches, torch's AdamW, transformers' schedule. Shares no code
with the bank but the order of rows."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch

from raytune_ft.models.chat import Encoded
from raytune_ft.training.batches import step_rows
from raytune_ft.training.config import FineTuningConfig
from raytune_ft.training.config_alignment import PreferenceConfig


def padded(rows: list[Encoded]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    longest = max(len(row.input_ids) for row in rows)
    pads = [longest - len(row.input_ids) for row in rows]
    ids = torch.tensor([row.input_ids + [0] * pad for row, pad in zip(rows, pads, strict=True)])
    mask = torch.tensor([[1] * len(row.input_ids) + [0] * pad for row, pad in zip(rows, pads, strict=True)])
    kept = torch.tensor([row.supervised + [False] * pad for row, pad in zip(rows, pads, strict=True)])
    return ids, mask, kept


def summed_loss(model: Any, rows: list[Encoded]) -> torch.Tensor:
    ids, mask, kept = padded(rows)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits[kept[:, 1:]], ids[:, 1:][kept[:, 1:]], reduction="sum")


def reference_losses(config: FineTuningConfig, rows: list[Encoded], steps: int) -> list[float]:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, get_scheduler

    base = AutoModelForCausalLM.from_pretrained(config.model_path)
    torch.manual_seed(config.seed)
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,
        target_modules=config.lora_target_modules,
        use_rslora=config.use_rslora,
    )
    model = get_peft_model(base, lora)
    parameters = [p for p in model.parameters() if p.requires_grad]
    betas = (config.adam_beta1, config.adam_beta2)
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon, weight_decay=config.weight_decay
    )
    kind = "constant_with_warmup" if config.lr_scheduler_type == "constant" else config.lr_scheduler_type
    scheduler = get_scheduler(kind, optimizer, config.warmup_steps or 0, config.max_steps)
    size = config.per_device_train_batch_size
    losses = []
    for numbers in islice(step_rows(len(rows), size * config.gradient_accumulation_steps, config.seed), steps):
        batch = [rows[number] for number in numbers]
        count = sum(sum(row.supervised[1:]) for row in batch)
        total = 0.0
        for start in range(0, len(batch), size):
            loss = summed_loss(model, batch[start : start + size]) / count
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def reference_preferences(config: PreferenceConfig, pairs: list[tuple[Encoded, Encoded]], steps: int) -> list[float]:
    """DPO's or IPO's losses of a plain PEFT model whose reference is itself without its adapter."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(config.seed)
    lora = LoraConfig(r=config.lora_r, lora_alpha=config.lora_alpha, target_modules=config.lora_target_modules)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(config.model_path), lora)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)

    def said(row: Encoded) -> torch.Tensor:
        return -summed_loss(model, [row])

    losses = []
    for numbers in islice(step_rows(len(pairs), config.global_batch_size, config.seed), steps):
        total = 0.0
        for chosen, rejected in (pairs[number] for number in numbers):
            with torch.no_grad(), model.disable_adapter():
                before = said(chosen), said(rejected)
            ratios = [said(row) - known for row, known in zip((chosen, rejected), before, strict=True)]
            if config.loss_type == "ipo":
                means = [ratio / sum(row.supervised[1:]) for ratio, row in zip(ratios, (chosen, rejected), strict=True)]
                loss = (means[0] - means[1] - 1 / (2 * config.beta)) ** 2
            else:
                loss = -torch.nn.functional.logsigmoid(config.beta * (ratios[0] - ratios[1]))
            (loss / len(numbers)).backward()
            total += loss.item() / len(numbers)
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses

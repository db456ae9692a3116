"""Learners: one model, its optimizer, and the arithmetic of a step; alone in a process, or under DeepSpeed ZeRO.

The loss is the mean over the supervised tokens of the global batch, whatever the number of ranks and micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raytune_ft.core.errors import ModelError
from raytune_ft.models.adapters import add_lora, add_virtual_tokens, go_on_from
from raytune_ft.models.attention import SEGMENTS, use_attention, without_adapter
from raytune_ft.models.collate import PackedBatch
from raytune_ft.models.loading import load_tokenizer
from raytune_ft.models.neighbours import why_alone
from raytune_ft.models.probe import check_computation
from raytune_ft.models.references import resolve_model
from raytune_ft.models.scoring import SummedLoss, check_embeddings
from raytune_ft.models.sparsity import hold_zeros, is_pruned, zeros_of
from raytune_ft.training.base_model import load_base
from raytune_ft.training.config import FineTuningConfig, FineTuningMethod
from raytune_ft.training.config_alignment import RewardConfig
from raytune_ft.training.dropout import drop_by_row, dropped_by_row, linear_numbers
from raytune_ft.training.fused_lora import fuse_lora
from raytune_ft.training.loop import Metrics, with_perplexity
from raytune_ft.training.micro_batches import before_the_optimizer, computed_without_gradient
from raytune_ft.training.objectives import make_objective
from raytune_ft.training.schedule import Timetable, learning_rate_at
from raytune_ft.training.zero import deepspeed_engine

State = dict[str, Tensor]
EvaluationBatches = Callable[[], Iterable[PackedBatch]]


@dataclass(frozen=True)
class Trainee:
    """A model with its trainable parameters, and its tokenizer."""

    loss: SummedLoss
    tokenizer: Any

    @property
    def model(self) -> Any:
        """The transformers or PEFT model."""
        return self.loss.model

    def trainable(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by name, in the model's order."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def load(self, state: State) -> None:
        """Sets the trainable parameters."""
        for name, parameter in self.trainable().items():
            with torch.no_grad():
                parameter.copy_(state[name])


def shape_of(parameter: Any) -> tuple[int, ...]:
    """A parameter's shape, also where ZeRO has sharded it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def make_trainee(config: FineTuningConfig, device: str) -> Trainee:
    """Loads the base model and makes it trainable by the configured method; zeros of a pruned one stay zero.

    Raises:
        ModelError: if the model cannot be loaded, or cannot be trained by this method.
    """
    model = load_base(config, device)
    if not isinstance(config, RewardConfig):
        check_computation(model)
    alone = why_alone(model)
    if alone is not None and config.zero_stage == 3:
        raise ModelError(
            f"{config.model_path}: {alone}, so each row takes a pass of its own, and ZeRO stage 3 wants as many passes "
            "of every worker; set zero_stage: 2"
        )
    tokenizer = load_tokenizer(config.model_path)
    check_embeddings(model, tokenizer, f"{config.model_path}: its tokenizer")
    if not config.uses_adapter and is_pruned(resolve_model(config.model_path).base):
        if config.zero_stage == 3:
            raise ModelError(
                f"{config.model_path}: is pruned, and its zeros cannot be held at zero where ZeRO stage 3 spreads each "
                "matrix over the workers; set zero_stage: 2"
            )
        hold_zeros(model, zeros_of(model))
    if config.uses_adapter:
        model = _with_adapter(model, config, by_row=alone is None)
    if config.gradient_checkpointing:
        _checkpoint_gradients(without_adapter(model), config)
    use_attention(model, SEGMENTS)
    return Trainee(make_objective(model.train(), config, device), tokenizer)


def _with_adapter(model: Any, config: FineTuningConfig, *, by_row: bool) -> Any:
    """The frozen model with the adapter that is trained; `by_row`: its dropout is each row's own."""
    model.requires_grad_(False)
    numbers = linear_numbers(model)
    model = _with_new_adapter(model, config)
    if by_row and _drops(config):
        drop_by_row(model, numbers)
    if config.adapter_path is not None:
        go_on_from(model, config.adapter_path)
    if config.zero_stage < 3:
        fuse_lora(model)
    return model


def _checkpoint_gradients(causal: Any, config: FineTuningConfig) -> None:
    if not causal.supports_gradient_checkpointing:
        raise ModelError(
            f"{config.model_path}: {type(causal).__name__} cannot compute its activations again; set "
            "gradient_checkpointing: false"
        )
    causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _with_new_adapter(model: Any, config: FineTuningConfig) -> Any:
    base = resolve_model(config.model_path).base
    if config.method is FineTuningMethod.PREFIX_TUNING:
        count = config.num_virtual_tokens
        return add_virtual_tokens(model, kind="prefix_tuning", count=count, seed=config.seed, base=base)
    if config.method is FineTuningMethod.PROMPT_TUNING:
        return add_virtual_tokens(
            model,
            kind="prompt_tuning",
            count=config.num_virtual_tokens,
            seed=config.seed,
            base=base,
            init_text=config.prompt_tuning_init_text,
        )
    return add_lora(
        model,
        rank=config.lora_r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        target_modules=config.lora_target_modules,
        seed=config.seed,
        base=base,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        task="SEQ_CLS" if isinstance(config, RewardConfig) else "CAUSAL_LM",
    )


def _drops(config: FineTuningConfig) -> bool:
    prompts = (FineTuningMethod.PREFIX_TUNING, FineTuningMethod.PROMPT_TUNING)
    return config.uses_adapter and config.method not in prompts and config.lora_dropout > 0


def _dropped(config: FineTuningConfig, batch: PackedBatch, step: int, device: str) -> AbstractContextManager[None]:
    return dropped_by_row(batch, config.seed, step, device) if _drops(config) else nullcontext()


def optimizer_for(trainee: Trainee, config: FineTuningConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, without weight decay on norms and biases (one-dimensional parameters)."""
    parameters = list(trainee.trainable().values())
    groups = [
        {"params": [p for p in parameters if len(shape_of(p)) > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if len(shape_of(p)) <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
    )


def seed_step(seed: int, step: int, rank: int) -> None:
    """Makes what is drawn from torch's stream a function of (seed, step, rank): a resumed run draws it again."""
    torch.manual_seed((seed * 1_000_003 + step) * 1_009 + rank)


class LocalLearner:
    """A model trained in this process alone, by torch's AdamW."""

    def __init__(
        self,
        trainee: Trainee,
        config: FineTuningConfig,
        timetable: Timetable,
        device: str,
        evaluation: EvaluationBatches,
    ) -> None:
        self.trainee = trainee
        self.optimizer = optimizer_for(trainee, config)
        self._config, self._timetable, self._device, self._evaluation = config, timetable, device, evaluation

    def step(self, batch: Sequence[PackedBatch], step: int) -> Metrics:
        """Makes one optimizer step over micro-batches."""
        rate = _set_rate(self.optimizer, self._config, self._timetable, step)
        seed_step(self._config.seed, step, 0)
        count = sum(micro.items for micro in batch)
        sums = []
        self.optimizer.zero_grad(set_to_none=True)
        with before_the_optimizer():
            for micro in batch:
                with _dropped(self._config, micro, step, self._device):
                    means = self.trainee.loss(micro.to(self._device)).reshape(-1) / max(1, count)
                    means[0].backward()
                sums.append(means.detach())
        norm = nn.utils.clip_grad_norm_(list(self.trainee.trainable().values()), self._config.max_grad_norm)
        self.optimizer.step()
        tokens = _tokens(batch)
        measured = _named(self.trainee, _sum(sums))
        supervised = sum(len(micro.targets) for micro in batch)
        return {
            **measured,
            "grad_norm": float(norm),
            "learning_rate": rate,
            "tokens": tokens,
            "supervised": supervised,
        }

    def gathered_state(self) -> State | None:
        """None: the model has its weights whole."""
        return None

    def evaluate(self) -> Metrics:
        """Mean loss over the supervised tokens of the validation split, and what else the objective measures."""
        sums = _evaluate(self.trainee, self._evaluation(), self._device)
        return _evaluated(self.trainee, sums)


class ZeroLearner:
    """A model trained by all workers of a torch process group under DeepSpeed ZeRO stage 0, 1, 2 or 3."""

    def __init__(
        self,
        trainee: Trainee,
        config: FineTuningConfig,
        timetable: Timetable,
        device: str,
        evaluation: EvaluationBatches,
    ) -> None:
        self.trainee = trainee
        self._config, self._timetable, self._device, self._evaluation = config, timetable, device, evaluation
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.engine = deepspeed_engine(trainee.loss, optimizer_for(trainee, config), config, device)

    def step(self, batch: Sequence[PackedBatch], step: int) -> Metrics:
        """Makes one optimizer step over this rank's micro-batches and those of all other ranks."""
        rate = _set_rate(self.engine.optimizer, self._config, self._timetable, step)
        seed_step(self._config.seed, step, self.rank)
        mine = [sum(m.items for m in batch), _tokens(batch), sum(len(m.targets) for m in batch)]
        counts = self._reduced(torch.tensor(mine, dtype=torch.float64))
        # DeepSpeed divides by the number of ranks, which the global mean does not want.
        scale = self.world_size / counts[0].clamp(min=1.0)
        sums = []
        norm = None
        for micro in batch:
            is_last = micro is batch[-1]
            self.engine.set_gradient_accumulation_boundary(is_last)  # steps may differ in their number
            with _dropped(self._config, micro, step, self._device):
                found = self.engine(micro.to(self._device)).reshape(-1)
                self.engine.backward(found[0] * scale.to(found.dtype), scale_wrt_gas=False)
            sums.append(found.detach())
            if is_last:
                norm = self._unsharded_norm()
            self.engine.step()
        # Read behind the optimizer's step, so that a GPU has it in line before the host waits.
        total = self._reduced(_sum(sums))
        count, tokens, supervised = counts.tolist()
        measured = _named(self.trainee, total / max(1.0, count))
        norm = float(self.engine.get_global_grad_norm() or 0.0) if norm is None else norm
        return {**measured, "grad_norm": norm, "learning_rate": rate, "tokens": tokens, "supervised": supervised}

    def gathered_state(self) -> State | None:
        """Under stage 3 the model's whole weights (of an adapter, those alone) on rank 0; None where it has them."""
        if self._config.zero_stage < 3:
            return None
        found = self.engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=self._config.uses_adapter)
        return {name.removeprefix("model."): tensor for name, tensor in (found or {}).items()}

    def evaluate(self) -> Metrics:
        """Mean loss over the supervised tokens of the validation split, over all ranks, and what else is measured."""
        # Under stage 3 a forward pass gathers weights from all ranks, and one rank cannot make it again.
        sums = _evaluate(self.trainee, self._evaluation(), self._device, may_split=self._config.zero_stage < 3)
        return _evaluated(self.trainee, self._reduced(sums))

    def _unsharded_norm(self) -> float | None:
        """Stage 0 in fp32: the norm of the reduced gradients, which DeepSpeed clips by without keeping it."""
        if not isinstance(self.engine.optimizer, torch.optim.Optimizer):
            return None
        gradients = [p.grad for p in self.trainee.trainable().values() if p.grad is not None]
        return float(nn.utils.get_total_norm(gradients))

    def _reduced(self, values: Tensor) -> Tensor:
        """The sum over all ranks, on the device: the host doesn't wait for it."""
        values = values.to(self._device, non_blocking=True)
        torch.distributed.all_reduce(values)
        return values


def _evaluate(trainee: Trainee, batches: Iterable[PackedBatch], device: str, *, may_split: bool = True) -> Tensor:
    """[measures + 1] the objective's sums and the number of items, in float64, on the device.

    `may_split`: batches that memory does not hold are computed in parts.
    """
    sums = torch.zeros(len(trainee.loss.measures), dtype=torch.float64, device=device)
    items = 0

    def sums_of(batch: PackedBatch) -> Tensor:
        return trainee.loss(batch.to(device)).reshape(-1)  # type: ignore[no-any-return]

    for batch, parts in computed_without_gradient(trainee.loss, sums_of, batches, may_split=may_split):
        sums += _sum(parts)
        items += batch.items
    return torch.cat([sums, sums.new_full((1,), items)])


def _tokens(batch: Sequence[PackedBatch]) -> int:
    """Tokens that are learned from: a row without targets stands in where a rank, or a part of a step, has none."""
    return sum(micro.tokens for micro in batch if micro.items)


def _sum(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).double().sum(0)


def _named(trainee: Trainee, means: Tensor) -> Metrics:
    return dict(zip(trainee.loss.measures, means.tolist(), strict=True))


def _evaluated(trainee: Trainee, sums: Tensor) -> Metrics:
    means = _named(trainee, sums[:-1] / sums[-1].clamp(min=1.0))
    found = {f"eval_{name}": mean for name, mean in means.items()}
    return with_perplexity(found) if trainee.loss.is_likelihood else found


def _set_rate(optimizer: Any, config: FineTuningConfig, timetable: Timetable, step: int) -> float:
    rate = learning_rate_at(
        step, timetable.total, peak=config.learning_rate, warmup=timetable.warmup, kind=config.lr_scheduler_type
    )
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate

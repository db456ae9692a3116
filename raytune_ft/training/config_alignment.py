"""Settings of training on people's preferences: directly, or through a model of their reward."""

from __future__ import annotations

from enum import StrEnum
from typing import Self

from pydantic import Field, model_validator

from raytune_ft.training.config import FineTuningConfig, FineTuningMethod

_PROMPT_METHODS = {FineTuningMethod.PREFIX_TUNING, FineTuningMethod.PROMPT_TUNING}


class PreferenceLoss(StrEnum):
    """What is made smaller over pairs of answers."""

    DPO = "dpo"
    IPO = "ipo"


class PreferenceConfig(FineTuningConfig):
    """How a model learns which of two answers people prefer: a training run on pairs, held to the model it starts from.

    The model it starts from (with `adapter_path`, if given) is the reference.
    """

    learning_rate: float = Field(5e-6, gt=0)
    """Highest learning rate: a tenth of what examples are learned with, or less, since pairs pull on and on."""
    num_train_epochs: float = Field(1.0, gt=0)
    """Passes over the training split."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the adapter's inputs set to zero while training; what the reference says is without."""
    loss_type: PreferenceLoss = PreferenceLoss.DPO
    """``dpo``: the chosen answer becomes likelier than the rejected one, without end; ``ipo``: by a set distance, which
    is safer where pairs are few or nearly certain."""
    beta: float = Field(0.1, gt=0)
    """How strongly the model is held to its reference: lower lets it go farther."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """DPO: share of the pairs that are taken to be the wrong way round."""
    chosen_nll_weight: float = Field(0.0, ge=0)
    """Adds the usual loss of the chosen answer (a mean over its tokens), so that it does not become unlikely, too."""
    metric_for_best_model: str = "eval_loss"
    """What makes a checkpoint the best, and what early stopping watches: ``eval_loss``, ``eval_reward_accuracy`` (pairs
    ranked right), ``eval_reward_margin``, ``eval_chosen_nll``, or the answers' metric."""

    @model_validator(mode="after")
    def _has_reference(self) -> Self:
        if self.method in _PROMPT_METHODS:
            raise ValueError(
                f"method: {self.method} starts from random virtual tokens, and a model with these is no reference; "
                "take lora, qlora or full"
            )
        if self.label_smoothing and self.loss_type is not PreferenceLoss.DPO:
            raise ValueError(f"label_smoothing belongs to loss_type dpo (got {self.loss_type})")
        return self

    @property
    def evaluated_metrics(self) -> tuple[str, ...]:
        """What an evaluation measures."""
        answers = (f"eval_{self.eval_generation_metric}",) if self.eval_generation_rows else ()
        return (
            "eval_loss",
            "eval_reward_accuracy",
            "eval_reward_margin",
            "eval_chosen_reward",
            "eval_chosen_nll",
            *answers,
        )


class RewardConfig(FineTuningConfig):
    """How a reward model learns which of two answers people prefer: a training run on pairs.

    It is the base model with a head that gives one number for a conversation; the head begins with random values.
    """

    learning_rate: float = Field(1e-4, gt=0)
    """Highest learning rate."""
    num_train_epochs: float = Field(1.0, gt=0)
    """Passes over the training split."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the adapter's inputs set to zero while training."""
    center_rewards_weight: float = Field(0.0, ge=0)
    """Adds so much of the squared sum of a pair's rewards, which keeps rewards around 0 (Eisenstein et al. 2023)."""
    metric_for_best_model: str = "eval_loss"
    """What makes a checkpoint the best, and what early stopping watches: ``eval_loss``, ``eval_reward_accuracy`` (pairs
    ranked right), or ``eval_reward_margin``."""

    @model_validator(mode="after")
    def _gives_scores(self) -> Self:
        if self.method in _PROMPT_METHODS:
            raise ValueError(f"method: {self.method} trains no head for a reward; take lora, qlora or full")
        if self.zero_stage == 3:
            raise ValueError("zero_stage 3 shards a head before it has its first values; take zero_stage 2")
        if self.eval_generation_rows:
            raise ValueError("eval_generation_rows: a reward model writes no answers; leave it at 0")
        return self

    @property
    def evaluated_metrics(self) -> tuple[str, ...]:
        """What an evaluation measures."""
        return ("eval_loss", "eval_reward_accuracy", "eval_reward_margin")

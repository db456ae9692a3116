"""Settings of training on people's preferences, of reward models, and of learning from rewards."""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar, Self

from pydantic import Field, model_validator

from raytune_ft.core.config import Place
from raytune_ft.evaluation.config import EvaluationMetric
from raytune_ft.training.config import OF_ANSWERS, DistillationConfig, FineTuningConfig, FineTuningMethod

PROMPT_METHODS = {FineTuningMethod.PREFIX_TUNING, FineTuningMethod.PROMPT_TUNING}
"""Methods that train virtual tokens before the prompt, and no weights."""


class PreferenceLoss(StrEnum):
    """What is made smaller: over pairs of answers, or (KTO) over single ones that people liked or disliked."""

    DPO = "dpo"
    IPO = "ipo"
    KTO = "kto"


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
    is safer where pairs are few or nearly certain; ``kto``: rows are single answers with a label, as ratings are."""
    beta: float = Field(0.1, gt=0)
    """How strongly the model is held to its reference: lower lets it go farther."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """DPO: share of the pairs that are taken to be the wrong way round."""
    chosen_nll_weight: float = Field(0.0, ge=0)
    """Adds the usual loss of the chosen answer (a mean over its tokens), so that it does not become unlikely, too."""
    desirable_weight: float = Field(1.0, gt=0)
    """KTO: weight of the answers that people liked; raise it where they are the fewer."""
    undesirable_weight: float = Field(1.0, gt=0)
    """KTO: weight of the answers that people disliked."""
    metric_for_best_model: str = "eval_loss"
    """What makes a checkpoint the best, and what early stopping watches: ``eval_loss``, ``eval_reward_accuracy`` (pairs
    ranked right, or rated answers on the right side), ``eval_reward_margin``, ``eval_chosen_nll``, or the answers'
    metric."""

    @model_validator(mode="after")
    def _has_reference(self) -> Self:
        if self.method in PROMPT_METHODS:
            raise ValueError(
                f"method: {self.method} starts from random virtual tokens, and a model with these is no reference; "
                "take lora, qlora or full"
            )
        if self.label_smoothing and self.loss_type is not PreferenceLoss.DPO:
            raise ValueError(f"label_smoothing belongs to loss_type dpo (got {self.loss_type})")
        rated = self.loss_type is PreferenceLoss.KTO
        if rated and self.chosen_nll_weight:
            raise ValueError("chosen_nll_weight belongs to pairs, and loss_type kto has none; raise desirable_weight")
        if not rated and (self.desirable_weight, self.undesirable_weight) != (1.0, 1.0):
            raise ValueError(
                f"desirable_weight and undesirable_weight belong to loss_type kto (got {self.loss_type}), since every "
                "pair has one answer of each"
            )
        return self

    @property
    def evaluated_metrics(self) -> tuple[str, ...]:
        """What an evaluation measures."""
        answers = (f"eval_{self.eval_generation_metric}",) if self.eval_generation_rows else ()
        if self.loss_type is PreferenceLoss.KTO:
            return ("eval_loss", "eval_reward_accuracy", *answers)
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
        if self.method in PROMPT_METHODS:
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


_OF_OTHERS = ("eval_generation_metric", "per_device_eval_batch_size")


class ReinforcementConfig(FineTuningConfig):
    """How a model learns from rewards for its own answers: those above the mean of their prompt become likelier.

    Each step answers its prompts `num_generations` times as the model is now, and takes one optimizer step on them
    (GRPO: Shao et al. 2024, arXiv:2402.03300). A step's rows are prompts: `per_device_train_batch_size` counts these.
    """

    reward_model_path: Place | None = None
    """A reward model that judges the answers (`raytune-ft reward` trains one), of the model's own tokens."""
    reward_metric: EvaluationMetric | None = None
    """A metric that judges each answer by the row's own, where what is right can be checked (numbers, JSON, labels)."""
    num_generations: int = Field(8, ge=2)
    """Answers to each prompt; each is compared with the mean of all."""
    max_new_tokens: int = Field(256, ge=1)
    """Most tokens of an answer; a longer one is cut off, counted, and judged as it is."""
    scale_rewards: bool = True
    """Divides a prompt's advantages by their deviation, so that easy and hard prompts count alike; without it, prompts
    count by how far their answers are apart (Liu et al. 2025, Dr. GRPO, arXiv:2503.20783)."""
    beta: float = Field(0.0, ge=0)
    """Adds so much of the divergence from the model that the run starts from; 0 asks for no second model."""
    learning_rate: float = Field(1e-5, gt=0)
    """Highest learning rate."""
    num_train_epochs: float = Field(1.0, gt=0)
    """Passes over the prompts."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the adapter's inputs set to zero while training; answers are given without."""
    eval_generation_rows: int = Field(64, ge=0)
    """So many rows of the validation split are answered (greedily) and judged at each evaluation."""
    metric_for_best_model: str = "eval_reward"
    """What makes a checkpoint the best, and what early stopping watches: ``eval_reward``."""

    not_identity: ClassVar[frozenset[str]] = FineTuningConfig.not_identity | {"reward_model_path"}

    @model_validator(mode="after")
    def _one_judge(self) -> Self:
        if (self.reward_model_path is None) == (self.reward_metric is None):
            raise ValueError(
                "give either reward_model_path (a model judges) or reward_metric (by the row's own answer)"
            )
        if self.reward_metric is not None and self.reward_metric not in OF_ANSWERS:
            known = ", ".join(metric for metric in EvaluationMetric if metric in OF_ANSWERS)
            raise ValueError(
                f"reward_metric: {self.reward_metric} is not measured on answers alone; take one of {known}"
            )
        if self.zero_stage == 3:
            raise ValueError("answering wants the whole weights on every worker, which zero_stage 3 shards; take 2")
        for name in _OF_OTHERS:
            if getattr(self, name) != FineTuningConfig.model_fields[name].default:
                raise ValueError(f"{name}: has no effect here, where the judge measures answers; leave it out")
        if not self.eval_generation_rows and self.eval_strategy != "no":
            raise ValueError("eval_generation_rows: 0 leaves evaluations nothing to judge; set eval_strategy: no, too")
        if self.beta and self.method in PROMPT_METHODS:
            raise ValueError(
                f"beta: method {self.method} starts from random virtual tokens, which are no reference; set 0"
            )
        if self.beta and self.method is FineTuningMethod.QLORA and self.adapter_path is not None:
            raise ValueError(
                "beta: the reference of a quantized base with an adapter is not held; merge the adapter first"
            )
        return self

    @property
    def metric_of_answers(self) -> EvaluationMetric | None:
        """What measures generated answers; None if a reward model does."""
        return self.reward_metric

    @property
    def evaluated_metrics(self) -> tuple[str, ...]:
        """What an evaluation measures."""
        return ("eval_reward",)

    @property
    def loss_has_level(self) -> bool:
        """It has not: advantages are around 0 however good the answers are."""
        return False


OBJECTIVES: dict[str, type[FineTuningConfig]] = {
    "train": FineTuningConfig,
    "distill": DistillationConfig,
    "align": PreferenceConfig,
    "reward": RewardConfig,
    "reinforce": ReinforcementConfig,
}
"""The settings of each kind of training that a sweep may search, by its verb."""

"""Settings of a training run; Hugging Face's names where one exists."""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from raytune_ft.core.config import Config
from raytune_ft.models.config import Precision


class FineTuningMethod(StrEnum):
    """Which weights are trained."""

    FULL = "full"
    LORA = "lora"
    QLORA = "qlora"


class FineTuningConfig(Config):
    """Everything that decides a training run."""

    # The contents of model and dataset count as parents of the run, wherever they lie.
    not_identity: ClassVar[frozenset[str]] = frozenset(
        {
            "model_path",
            "dataset_path",
            "output_dir",
            "logging_steps",
            "save_strategy",
            "save_steps",
            "cpus_per_worker",
            "max_failures",
        }
    )

    model_path: str = Field(min_length=1)
    """Base model: a folder or URI in Hugging Face layout, an artifact, a hub id, or ``starter:smollm2-135m``."""
    output_dir: str = Field(min_length=1)
    """Folder or URI that the trained model is written to."""
    dataset_path: str = Field(min_length=1)
    """A prepared dataset (its train and validation splits), or a file of records."""
    method: FineTuningMethod = FineTuningMethod.LORA
    """Which weights are trained."""

    num_train_epochs: float = Field(3.0, gt=0)
    """Passes over the training split."""
    max_steps: int | None = Field(None, ge=1)
    """Number of optimizer steps; overrides `num_train_epochs`."""
    per_device_train_batch_size: int = Field(4, ge=1)
    """Rows that a worker computes at the same time."""
    per_device_eval_batch_size: int = Field(4, ge=1)
    """Rows that a worker evaluates at the same time."""
    gradient_accumulation_steps: int = Field(1, ge=1)
    """Batches whose gradients are added up before an optimizer step."""
    learning_rate: float = Field(2e-4, gt=0)
    """Highest learning rate. The guide's 1e-5 to 5e-5 are for full fine-tuning; LoRA wants about ten times more."""
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls after the warmup: to 0 along a line or a cosine, or not at all."""
    warmup_steps: int | None = Field(None, ge=0)
    """Steps over which the learning rate rises from 0; overrides `warmup_ratio`."""
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    """The same as a share of all steps."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay; norms and biases have none."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the first moment."""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    """Decay of the second moment."""
    adam_epsilon: float = Field(1e-8, gt=0)
    """Added to the root of the second moment."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this global norm."""
    seed: int = 0
    """Seed of the data order, the adapter's first values and dropout."""
    max_length: int = Field(1024, ge=2)
    """Most tokens of a row, where the dataset has to be tokenized here; longer rows are rejected and counted."""

    lora_r: int = Field(8, ge=1)
    """Rank of the LoRA factors."""
    lora_alpha: float = Field(16, gt=0)
    """The LoRA product is scaled by alpha / rank; usually twice the rank."""
    use_rslora: bool = False
    """Scales by alpha / sqrt(rank) instead, which keeps large ranks learning (Kalajdzievski, 2023)."""
    lora_dropout: float = Field(0.05, ge=0, lt=1)
    """Share of the adapter's inputs set to zero while training."""
    lora_target_modules: list[str] | Literal["all-linear"] = Field(default_factory=lambda: ["q_proj", "v_proj"])
    """Names of the linear layers that get an adapter, or ``all-linear``."""

    bits: Literal[4, 8] = 4
    """QLoRA: bits of the frozen base weights."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """QLoRA: number format of 4-bit weights; nf4 often works better."""
    bnb_4bit_use_double_quant: bool = True
    """QLoRA: whether the quantization constants are quantized, too."""

    eval_strategy: Literal["no", "epoch", "steps"] = "epoch"
    """When the validation split is evaluated (if the dataset has one)."""
    eval_steps: int = Field(100, ge=1)
    """Steps between evaluations, with strategy ``steps``."""
    save_strategy: Literal["no", "epoch", "steps"] = "epoch"
    """When a checkpoint is written, from which an interrupted run goes on."""
    save_steps: int = Field(500, ge=1)
    """Steps between checkpoints, with strategy ``steps``."""
    save_total_limit: int = Field(2, ge=1)
    """Checkpoints that are kept; older ones are deleted."""
    logging_steps: int = Field(10, ge=1)
    """Steps between progress lines."""
    early_stopping_patience: int | None = Field(None, ge=1)
    """Stop after so many evaluations without a lower validation loss; None never stops early."""

    num_workers: int = Field(1, ge=1)
    """Training processes; each takes an equal share of every batch."""
    use_gpu: bool | None = None
    """Whether each worker takes a GPU; by default if the cluster has any."""
    cpus_per_worker: float = Field(1, gt=0)
    """Logical CPUs, and at least as many threads, of a worker."""
    zero_stage: Literal[1, 2] = 2
    """DeepSpeed ZeRO: 1 shards the optimizer's state over the workers, 2 the gradients, too."""
    precision: Precision = Precision.AUTO
    """Number format of weights and activations; auto is bf16 on GPUs that do it well, fp32 on CPUs."""
    max_failures: int = Field(2, ge=0)
    """How often lost workers are replaced before the run fails."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.early_stopping_patience is not None and self.eval_strategy == "no":
            raise ValueError("early_stopping_patience needs evaluations: set eval_strategy to epoch or steps")
        if self.precision is Precision.FP16 and self.use_gpu is False:
            raise ValueError("precision fp16 needs a GPU; take bf16 or fp32 on CPUs")
        return self

    @property
    def uses_adapter(self) -> bool:
        """Whether the base stays frozen and an adapter is trained."""
        return self.method is not FineTuningMethod.FULL

    @property
    def global_batch_size(self) -> int:
        """Rows of one optimizer step over all workers."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.num_workers


class DistillationConfig(FineTuningConfig):
    """How a smaller student learns from a teacher: a training run whose loss follows the teacher's distributions."""

    not_identity: ClassVar[frozenset[str]] = FineTuningConfig.not_identity | {"teacher_path"}

    teacher_path: str = Field(min_length=1)
    """The model to learn from (a folder, adapter, artifact, hub id or ``starter:...``); it is only read."""
    model_path: str = ""
    """The student, of the teacher's vocabulary; where none is given, `student_layers` of the teacher make one."""
    student_layers: int | None = Field(None, ge=1)
    """Makes the student of so many of the teacher's layers, evenly spaced, the first and the last among them."""
    method: FineTuningMethod = FineTuningMethod.FULL
    """Which of the student's weights are trained."""
    temperature: float = Field(2.0, gt=0)
    """Both distributions are softened by it: above 1, the teacher's less likely tokens count more."""
    hard_loss_weight: float = Field(0.5, ge=0, le=1)
    """Share of the usual loss on the dataset's tokens; the rest is the divergence from the teacher."""

    @model_validator(mode="after")
    def _one_student(self) -> Self:
        if bool(self.model_path) == (self.student_layers is not None):
            raise ValueError(
                "give either model_path (a student) or student_layers (to make one of the teacher's layers)"
            )
        if self.student_layers is not None and self.method is not FineTuningMethod.FULL:
            raise ValueError(
                f"student_layers makes a new model, whose weights are all trained: method full (got {self.method})"
            )
        return self

"""Settings of a training run; Hugging Face's names where one exists."""

from __future__ import annotations

from collections.abc import Collection
from enum import StrEnum
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from raytune_ft.core.config import Config, Place
from raytune_ft.evaluation.config import BleuTokenizer, EvaluationMetric
from raytune_ft.models.config import Precision
from raytune_ft.training import matrix
from raytune_ft.training.deepspeed_settings import refuse_contradictions
from raytune_ft.training.goal import Goal

OF_ANSWERS = frozenset(metric for metric in EvaluationMetric if metric.needs_answers) - {
    EvaluationMetric.JSON_SCHEMA,
    EvaluationMetric.REWARD,
    EvaluationMetric.CUSTOM,
}
"""Metrics that need nothing but answers and references; what else they need has no place in these settings."""


class FineTuningMethod(StrEnum):
    """Which weights are trained."""

    FULL = "full"
    LORA = "lora"
    QLORA = "qlora"
    PREFIX_TUNING = "prefix_tuning"
    PROMPT_TUNING = "prompt_tuning"


class Tracking(StrEnum):
    """Where curves go besides the artifact's own history."""

    TENSORBOARD = "tensorboard"
    MLFLOW = "mlflow"
    WANDB = "wandb"


def bits_of_base(method: str, bits: int | None) -> int | None:
    """Bits of the base's weights under a method and its setting `bits`; None if they are not quantized."""
    return bits or (4 if method == FineTuningMethod.QLORA else None)


class FineTuningConfig(Config):
    """Everything that decides a training run."""

    # The contents of model and dataset count as parents of the run, wherever they lie.
    not_identity: ClassVar[frozenset[str]] = frozenset(
        {
            "model_path",
            "adapter_path",
            "dataset_path",
            "output_dir",
            "logging_strategy",
            "logging_steps",
            "save_strategy",
            "save_steps",
            "num_workers",
            "per_device_train_batch_size",  # their product counts: see `identity`
            "gradient_accumulation_steps",
            "max_tokens_per_micro_batch",
            "zero_stage",
            "offload",
            "deepspeed_config",
            "use_gpu",
            "cpus_per_worker",
            "use_liger_kernel",
            "max_failures",
            "report_to",
        }
    )

    model_path: str = Field(min_length=1)
    """Base model: a folder or URI in Hugging Face layout, an artifact, a hub id, or ``starter:smollm2-135m``."""
    output_dir: str = Field(min_length=1)
    """Folder or URI that the trained model is written to."""
    dataset_path: str = Field(min_length=1)
    """A prepared dataset (its train and validation splits), or a file of records."""
    method: FineTuningMethod = FineTuningMethod.LORA
    """Which weights are trained; `raytune-ft doctor --matrix` says what goes with which."""
    adapter_path: Place | None = None
    """An adapter (folder, URI or artifact) whose weights the training goes on from; its shape must be the settings'."""

    num_train_epochs: float = Field(3.0, gt=0)
    """Passes over the training split."""
    max_steps: int | None = Field(None, ge=1)
    """Number of optimizer steps; overrides `num_train_epochs`."""
    per_device_train_batch_size: int = Field(4, ge=1)
    """Rows that a worker computes at the same time."""
    max_tokens_per_micro_batch: int | None = Field(None, ge=1)
    """Most tokens that a worker computes at the same time, whatever the rows' lengths: more are spread over several
    micro-batches of the same step, and a longer row is one alone. Bounds memory; the losses are the same."""
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
    seed: int = Field(0, ge=0, lt=1 << 32)
    """Seed of the data order, the adapter's first values and dropout."""
    max_length: int = Field(1024, ge=2)
    """Most tokens of a row, where the dataset has to be tokenized here; longer rows are rejected and counted."""

    lora_r: int = Field(8, ge=1)
    """Rank of the LoRA factors."""
    lora_alpha: float = Field(16, gt=0)
    """The LoRA product is scaled by alpha / rank; usually twice the rank."""
    use_rslora: bool = False
    """Scales by alpha / sqrt(rank) instead, which keeps large ranks learning (Kalajdzievski, 2023)."""
    use_dora: bool = False
    """Learns the size of each weight column apart from its direction (DoRA: Liu et al., 2024); slower, often better."""
    lora_dropout: float = Field(0.05, ge=0, lt=1)
    """Share of the adapter's inputs set to zero while training."""
    lora_target_modules: list[str] | Literal["all-linear"] = Field(default_factory=lambda: ["q_proj", "v_proj"])
    """Names of the linear layers that get an adapter, or ``all-linear``."""

    num_virtual_tokens: int = Field(20, ge=1)
    """Prefix and prompt tuning: how many learned tokens stand before every row; they count towards the context."""
    prompt_tuning_init_text: str | None = Field(None, min_length=1)
    """Prompt tuning: the virtual tokens start as this text's embeddings; without it, as those of random tokens."""

    bits: Literal[4, 8] | None = None
    """Bits of the frozen base weights; by default 4 under QLoRA, and no quantization under the other methods."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """Number format of 4-bit weights; nf4 often works better."""
    bnb_4bit_use_double_quant: bool = True
    """With 4 bits, whether the quantization constants are quantized, too."""
    gradient_checkpointing: bool = False
    """Computes activations again in the backward pass instead of keeping them: less memory, about a third slower."""

    eval_strategy: Literal["no", "epoch", "steps"] = "epoch"
    """When the validation split is evaluated (if the dataset has one)."""
    eval_steps: int = Field(100, ge=1)
    """Steps between evaluations, with strategy ``steps``."""
    eval_generation_rows: int = Field(0, ge=0)
    """So many rows of the validation split are also answered at each evaluation, and the answers measured; 0: none."""
    eval_generation_metric: EvaluationMetric = EvaluationMetric.EXACT_MATCH
    """How these answers are measured."""
    bleu_tokenizer: BleuTokenizer = "13a"
    """What BLEU counts as words where it measures answers, as `evaluate` has it: ``char`` fits any script, ``zh``
    Chinese."""
    metric_for_best_model: str = "eval_loss"
    """What makes a checkpoint the best, and what early stopping watches: ``eval_loss``, ``eval_perplexity``, or the
    answers' metric, such as ``eval_exact_match``."""
    save_strategy: Literal["no", "epoch", "steps"] = "epoch"
    """When a checkpoint is written, from which an interrupted run goes on."""
    save_steps: int = Field(500, ge=1)
    """Steps between checkpoints, with strategy ``steps``."""
    save_total_limit: int = Field(2, ge=1)
    """Checkpoints that are kept, the best evaluation's among them; older ones are deleted once a newer one was read and
    found whole."""
    logging_strategy: Literal["no", "epoch", "steps"] = "steps"
    """When a progress line is said, besides the first and the last step's; with ``no``, evaluations have one only.
    `history.jsonl` has every step."""
    logging_steps: int = Field(10, ge=1)
    """Steps between progress lines, with strategy ``steps``."""
    report_to: list[Tracking] = Field(default_factory=lambda: [Tracking.TENSORBOARD])
    """Where curves go besides `history.jsonl`: tensorboard (event files in the artifact), mlflow, wandb."""
    resume_from_checkpoint: str = Field("auto", min_length=1)
    """``auto`` goes on from this run's newest whole checkpoint; a path starts from that checkpoint if it has none."""
    early_stopping_patience: int | None = Field(None, ge=1)
    """Stop after so many evaluations without a better `metric_for_best_model`; None never stops early."""

    num_workers: int = Field(1, ge=1)
    """Training processes; each takes an equal share of every batch."""
    use_gpu: bool | None = None
    """Whether each worker takes a GPU; by default if the cluster has any."""
    cpus_per_worker: float | None = Field(None, gt=0)
    """Logical CPUs, and at least as many threads, of a worker; by default one beside a GPU, else its share of all that
    are free."""
    zero_stage: int = Field(2, ge=0)
    """DeepSpeed ZeRO: 0 shards nothing over the workers, 1 the optimizer's state, 2 gradients, too, 3 also weights."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What waits in the CPUs' memory: the optimizer's state (its step is made there), or under stage 3 weights, too."""
    deepspeed_config: str | dict[str, Any] | None = None
    """A DeepSpeed JSON file (or its contents) for settings that have no name here; what it says of those that have one
    must be the same, or "auto"."""
    precision: Precision = Precision.AUTO
    """Number format of weights and activations; auto is bf16 on GPUs that do it well, fp32 on CPUs."""
    use_liger_kernel: bool | None = None
    """Whether norms, activations, rotations and losses are computed by Liger's kernels; by default on GPUs, where it is
    installed and has kernels for the model."""
    max_failures: int = Field(2, ge=0)
    """How often lost workers are replaced before the run fails."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.early_stopping_patience is not None and self.eval_strategy == "no":
            raise ValueError("early_stopping_patience needs evaluations: set eval_strategy to epoch or steps")
        if self.precision is Precision.FP16 and self.use_gpu is False:
            raise ValueError("precision fp16 needs a GPU; take bf16 or fp32 on CPUs")
        if self.use_liger_kernel and self.use_gpu is False:
            raise ValueError(
                "use_liger_kernel: Liger's kernels run on GPUs, and use_gpu is false; leave one of them out"
            )
        if self.use_dora and self.use_rslora:
            raise ValueError("use_dora and use_rslora: choose one (DoRA learns the size that rsLoRA only scales)")
        if not self.lora_target_modules:
            raise ValueError("lora_target_modules: must name at least one linear layer, or be all-linear (got [])")
        if self.prompt_tuning_init_text is not None and self.method is not FineTuningMethod.PROMPT_TUNING:
            raise ValueError(f"prompt_tuning_init_text belongs to method prompt_tuning (got {self.method})")
        if self.adapter_path is not None and not self.uses_adapter:
            raise ValueError("adapter_path: method full trains no adapter; merge it first (raytune-ft merge), or lora")
        if self.eval_generation_rows and self.zero_stage == 3:
            raise ValueError(
                "eval_generation_rows wants the whole weights on every worker, which zero_stage 3 shards; take "
                "zero_stage 2, or 0 rows and `raytune-ft evaluate` afterwards"
            )
        refused = matrix.verdict(self.cell)
        if refused is not None:
            raise ValueError(refused)
        if isinstance(self.deepspeed_config, dict):
            refuse_contradictions(self, self.deepspeed_config)
        return self

    @model_validator(mode="after")
    def _measurable(self) -> Self:
        if self.eval_generation_metric not in OF_ANSWERS:
            known = ", ".join(metric for metric in EvaluationMetric if metric in OF_ANSWERS)
            raise ValueError(
                f"eval_generation_metric: {self.eval_generation_metric} is not measured on answers alone; take one of "
                f"{known}"
            )
        if self.differs("bleu_tokenizer") and self.metric_of_answers is not EvaluationMetric.BLEU:
            measured = f"answers are measured by {self.metric_of_answers}" if self.metric_of_answers else "none are"
            raise ValueError(f"bleu_tokenizer: has no effect without answers measured by bleu, and {measured}")
        if self.metric_for_best_model not in self.evaluated_metrics:
            raise ValueError(
                f"metric_for_best_model: {self.metric_for_best_model} is not among what is measured "
                f"({', '.join(self.evaluated_metrics)}); name one of these, or say what answers are measured by: "
                "eval_generation_rows, eval_generation_metric"
            )
        return self

    def identity(self) -> dict[str, Any]:
        """What decides the run's result; how a global batch is laid out over workers does not."""
        return {**super().identity(), "global_batch_size": self.global_batch_size}

    @property
    def idle(self) -> Collection[str]:
        """See `Config`."""
        from raytune_ft.training.without_effect import idle_beside

        return idle_beside(dict(self))

    def on_gpu(self, gpus: float) -> bool:
        """Whether a cluster with so many GPUs trains on them: as `use_gpu` says, else if there is one."""
        return self.use_gpu if self.use_gpu is not None else gpus > 0

    @property
    def metric_of_answers(self) -> EvaluationMetric | None:
        """What measures generated answers; None if nothing does."""
        return self.eval_generation_metric if self.eval_generation_rows else None

    @property
    def evaluated_metrics(self) -> tuple[str, ...]:
        """What an evaluation measures."""
        answers = (f"eval_{self.eval_generation_metric}",) if self.eval_generation_rows else ()
        return ("eval_loss", "eval_perplexity", *answers)

    @property
    def loss_has_level(self) -> bool:
        """Whether the loss tells by its height how much is learned."""
        return True

    @property
    def goal(self) -> Goal:
        """What evaluations are compared by."""
        return Goal.of(self.metric_for_best_model)

    @property
    def cell(self) -> matrix.Cell:
        """Where these settings stand in the matrix of what goes with what."""
        option: matrix.Option = "dora" if self.use_dora else "rslora" if self.use_rslora else "plain"
        return matrix.Cell(
            self.method.value,
            option,
            self.base_bits,
            self.zero_stage,
            self.gradient_checkpointing,
            offload=self.offload,
        )

    @property
    def base_bits(self) -> int | None:
        """Bits of the base's weights; None if they are not quantized."""
        return bits_of_base(self.method, self.bits)

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
    """Share of the usual loss on the dataset's tokens; the rest is the divergence from the teacher. With 1 the student
    learns without a teacher, as a point to compare with."""

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
        if self.zero_stage == 3:
            raise ValueError("zero_stage 3 shards one model, and a distillation has two; take zero_stage 2")
        return self

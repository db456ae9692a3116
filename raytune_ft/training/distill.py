"""Learning from a teacher: the loss that mixes its soft targets with the hard ones, and students made of its layers.

The soft part is the Kullback-Leibler divergence of the student's next-token distribution from the teacher's, both at a
temperature (Hinton et al. 2015, arXiv:1503.02531), over supervised tokens only, with both models' logits in chunks.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own convention
from torch.utils.checkpoint import checkpoint

from raytune_ft.core.errors import ModelError
from raytune_ft.core.storage import Location
from raytune_ft.models.adapters import merge_adapter
from raytune_ft.models.attention import SEGMENTS, use_attention
from raytune_ft.models.chunks import CHUNK
from raytune_ft.models.collate import PackedBatch
from raytune_ft.models.config import Precision
from raytune_ft.models.loading import LoadedModel, load_model, load_tokenizer
from raytune_ft.models.probe import check_computation
from raytune_ft.models.references import resolve_model
from raytune_ft.models.scoring import CausalParts, SummedLoss, target_losses, target_states


class DistillationLoss(SummedLoss):
    """A student as a module from a padding-free batch to its summed mixed loss; in eval mode, to its hard loss."""

    def __init__(self, student: Any, teacher: LoadedModel, *, temperature: float, hard_loss_weight: float) -> None:
        super().__init__(student)
        use_attention(teacher.model, SEGMENTS)
        # In tuples, so that neither the teacher nor the halves are the student's submodules.
        self._teacher = (CausalParts.of(teacher.model.requires_grad_(False)),)
        self.temperature, self.hard_loss_weight = temperature, hard_loss_weight

    def forward(self, batch: PackedBatch) -> Tensor:
        """Sum over the targets of w * cross-entropy + (1 - w) * T^2 * KL(teacher || student), in nats."""
        if not self.training:
            return target_losses(self.parts, batch).sum()
        with torch.no_grad():
            taught = target_states(self._teacher[0], batch)
        states = target_states(self.parts, batch)
        total = states.sum() * 0.0 if not len(batch.targets) else states.new_zeros(())
        for mine, theirs, targets in zip(
            *(torch.split(part, CHUNK) for part in (states, taught, batch.targets)), strict=True
        ):
            total = total + checkpoint(self._chunk, mine, theirs, targets, use_reentrant=False)
        return total

    def _chunk(self, mine: Tensor, theirs: Tensor, targets: Tensor) -> Tensor:
        logits = self.parts.head(mine).float()
        hard = F.cross_entropy(logits, targets, reduction="sum")
        soft = soft_loss(logits, self._teacher[0].head(theirs).float(), self.temperature)
        return self.hard_loss_weight * hard + (1 - self.hard_loss_weight) * soft


def soft_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(teacher || student), summed over targets; the factor keeps gradients of one size for every T.

    Args:
        student: [targets, vocabulary] logits.
        teacher: [targets, vocabulary] logits.
        temperature: T, which both are divided by.
    """
    log_p, log_q = ((logits / temperature).log_softmax(-1) for logits in (teacher, student))
    return temperature**2 * F.kl_div(log_q, log_p, reduction="sum", log_target=True)


def load_teacher(reference: str, precision: Precision, device: str, vocabulary: int) -> LoadedModel:
    """The teacher, if its tokens are the student's.

    Raises:
        ModelError: if the two vocabularies differ in size, or it is no model that `check_computation` takes.
    """
    teacher = load_model(reference, precision=precision, device=device)
    size = teacher.model.get_output_embeddings().weight.shape[0]
    if size != vocabulary:
        raise ModelError(
            f"{reference}: the teacher's vocabulary has {size} tokens, the student's {vocabulary}; logits can only be "
            "compared token by token. Take a student of the same family, or student_layers"
        )
    check_computation(teacher.model)
    return teacher


def refuse_other_tokens(teacher: str, student: str) -> None:
    """Checks that two models mean the same text by the same token ids.

    Raises:
        ModelError: if their vocabularies differ.
    """
    if load_tokenizer(teacher).get_vocab() != load_tokenizer(student).get_vocab():
        raise ModelError(
            f"{student}: its tokens are not those of the teacher {teacher}, so their logits cannot be compared. "
            "Take a student of the same family, or student_layers"
        )


def kept_layers(total: int, kept: int) -> list[int]:
    """Which layers a student of `kept` layers takes: the first, the last, and evenly spaced ones between.

    Raises:
        ModelError: if the teacher has no more than `kept`.
    """
    if kept >= total:
        raise ModelError(f"student_layers: must be below the teacher's {total} layers (got {kept})")
    if kept == 1:
        return [0]
    return [round(place * (total - 1) / (kept - 1)) for place in range(kept)]


def write_student(teacher: str, target: Location, layers: int) -> None:
    """Writes a model of some of the teacher's layers, with its embeddings, head and tokenizer, in fp32.

    Raises:
        ModelError: if the model keeps its layers elsewhere than in ``model.layers``, or has too few.
    """
    with tempfile.TemporaryDirectory(prefix="raytune-ft-student-") as scratch:
        source = teacher
        if resolve_model(teacher).adapter is not None:
            source = str(Path(scratch) / "merged")
            merge_adapter(teacher, Path(source))
        loaded = load_model(source, precision=Precision.FP32, device="cpu")
        decoder = CausalParts.of(loaded.model).decoder
        stack = getattr(decoder, "layers", None)
        if not isinstance(stack, torch.nn.ModuleList):
            raise ModelError(f"{teacher}: {type(loaded.model).__name__} has no list of layers to drop some of")
        chosen = kept_layers(len(stack), layers)
        decoder.layers = torch.nn.ModuleList([stack[number] for number in chosen])
        config = loaded.model.config
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[number] for number in chosen]
        folder = Path(scratch) / "student"
        loaded.model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
        target.upload(folder)

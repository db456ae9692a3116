"""Liger's kernels (Hsu et al., 2024) on GPUs: norms, gated activations, rotations and losses as one Triton kernel each.

transformers computes an RMSNorm in half a dozen passes over memory and keeps copies in fp32 for the backward pass. The
package liger-kernel is optional (``pip install raytune-ft[gpu]``). It puts its kernels in place for a whole process;
here only the given model gets them, so that others, on a CPU say, go on as before.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn

from raytune_ft.core.errors import ModelError

logger = logging.getLogger("raytune_ft")

_ROTATION = "apply_rotary_pos_emb"
_LOSSES = ("cross_entropy", "fused_linear_cross_entropy")
_heads: WeakSet[nn.Module] = WeakSet()


def use_liger(model: Any, device: str, *, wanted: bool | None) -> bool:
    """Puts Liger's kernels into a transformers model on a GPU, and says so; elsewhere transformers' own stay.

    Args:
        model: a causal language model, before any adapter.
        device: where it is.
        wanted: None takes them where there are any for this model; True insists.

    Returns:
        Whether they are in place.

    Raises:
        ModelError: if they are insisted on and cannot be used, with the reason.
    """
    if wanted is False or (wanted is None and not device.startswith("cuda")):
        return False
    reason = _why_not(model, device)
    if reason is None:
        _put_in_place(model)
        if (head := model.get_output_embeddings()) is not None:  # a reward model's gives one number
            _heads.add(head)
        logger.info("kernels: Liger %s for %s", importlib.metadata.version("liger-kernel"), type(model).__name__)
        return True
    if wanted:
        raise ModelError(f"use_liger_kernel: {reason}; leave it out to go on without")
    logger.info("kernels: transformers' own (%s)", reason)
    return False


def has_fused_loss(head: nn.Module, states: Tensor) -> bool:
    """Whether Liger computes the losses under this output head."""
    return states.is_cuda and head in _heads and type(head) is nn.Linear and states.dtype is head.weight.dtype


def fused_losses(head: Any, states: Tensor, targets: Tensor, rows: int, *, wanted: bool) -> tuple[Tensor, Any]:
    """Each target's loss under a frozen head, and its gradient by the target's state.

    Args:
        head: a linear layer from [targets, width] to [targets, vocabulary].
        states: [targets, width].
        targets: [targets] token ids.
        rows: targets whose logits may exist at the same time, about.
        wanted: whether gradients are.

    Returns:
        [targets] float32 in nats, and [targets, width] if they are wanted.
    """
    from liger_kernel.ops.fused_linear_cross_entropy import fused_linear_cross_entropy_forward

    # Liger holds the logits of `chunk_mem_const` x targets x width / vocabulary rows, to the next power of two.
    most = max(1, rows * head.out_features // max(1, states.numel()))
    losses, *_, gradient, _, _ = fused_linear_cross_entropy_forward(
        states, head.weight, targets, bias=head.bias, reduction="none", compute_gradients=wanted,
        weight_requires_grad=False, chunk_mem_const=most,
    )  # fmt: skip
    return losses, gradient if wanted else None


def _why_not(model: Any, device: str) -> str | None:
    if not device.startswith("cuda"):
        return f"Liger's kernels run on GPUs, and the model is on {device}"
    if importlib.util.find_spec("liger_kernel") is None:
        return "the package liger-kernel is not installed (pip install raytune-ft[gpu])"
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    kind = model.config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return f"liger-kernel {importlib.metadata.version('liger-kernel')} has none for models of type {kind}"
    return None


def _put_in_place(model: Any) -> None:
    """Liger's own way, and then back to what the model's module held before; rotations go by where the tensors are."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    put = MODEL_TYPE_TO_APPLY_LIGER_FN[model.config.model_type]
    known = inspect.signature(put).parameters
    module = sys.modules[type(model).__module__]
    before = dict(vars(module))
    put(model=model, **{name: False for name in _LOSSES if name in known})
    rotation = vars(module).get(_ROTATION)
    for name, value in before.items():
        if vars(module)[name] is not value:
            setattr(module, name, value)
    usual = before.get(_ROTATION)
    if rotation is not None and usual is not None and rotation is not usual and not isinstance(usual, _Rotation):
        setattr(module, _ROTATION, _Rotation(usual, rotation))


@dataclass(frozen=True)
class _Rotation:
    """Rotary embeddings: on a GPU by one kernel, elsewhere as the model's own module does it."""

    usual: Callable[..., tuple[Tensor, Tensor]]
    on_gpu: Callable[..., tuple[Tensor, Tensor]]

    def __call__(self, q: Tensor, *others: Any, **named: Any) -> tuple[Tensor, Tensor]:
        function = self.on_gpu if q.is_cuda else self.usual
        return function(q, *others, **named)

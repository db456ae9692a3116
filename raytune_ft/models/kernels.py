"""Liger's kernels (Hsu et al., 2024) on GPUs: norms and gated activations as one Triton kernel each.

transformers computes an RMSNorm in half a dozen passes over memory and keeps copies in fp32 for the backward pass. The
package liger-kernel is optional (``pip install raytune-ft[gpu]``); its losses are not used, since those here never
make all logits, and neither are its rotary embeddings, which would be put in place for a whole process.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
from typing import Any

from raytune_ft.core.errors import ModelError

logger = logging.getLogger("raytune_ft")

_NOT_TAKEN = ("rope", "cross_entropy", "fused_linear_cross_entropy")


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
        version = importlib.metadata.version("liger-kernel")
        logger.info("kernels: Liger %s for the norms and activations of %s", version, type(model).__name__)
        return True
    if wanted:
        raise ModelError(f"use_liger_kernel: {reason}; leave it out to go on without")
    logger.info("kernels: transformers' own (%s)", reason)
    return False


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
    import inspect

    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    put = MODEL_TYPE_TO_APPLY_LIGER_FN[model.config.model_type]
    known = inspect.signature(put).parameters
    put(model=model, **{name: False for name in _NOT_TAKEN if name in known})

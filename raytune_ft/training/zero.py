"""DeepSpeed's engine around a model, and models that are loaded as shards under ZeRO stage 3."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from raytune_ft.models.loading import torch_dtype
from raytune_ft.training.config import FineTuningConfig
from raytune_ft.training.deepspeed_settings import deepspeed_settings

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def deepspeed_on(device: str) -> Any:
    """DeepSpeed, set to the device, among the ranks of the process group that is there."""
    on_gpu = device.startswith("cuda")
    if not on_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    # Gloo reduces an adapter's gradients well; the shared-memory kernel would want a compiler and a 30 s build.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", dist_init_required=False, verbose=False)
    return deepspeed


@contextmanager
def sharded_loading(config: FineTuningConfig, device: str) -> Iterator[None]:
    """Within it, under stage 3, transformers loads each model as shards: no rank ever holds it whole."""
    if config.zero_stage != 3:
        yield
        return
    deepspeed_on(device)
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    known = HfDeepSpeedConfig(_settings(config, device))  # transformers has a weak reference to it only
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del known


def deepspeed_engine(model: Any, optimizer: torch.optim.Optimizer, config: FineTuningConfig, device: str) -> Any:
    """The engine that trains `model` as the settings want it; all ranks make theirs together."""
    deepspeed = deepspeed_on(device)
    with _frozen_stays_as_loaded(model):
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=_settings(config, device), dist_init_required=False
        )
    _undo_first_step(engine.optimizer)
    return engine


@contextmanager
def _frozen_stays_as_loaded(model: Any) -> Iterator[None]:
    """Within it DeepSpeed sends rank 0's trainable weights to the others, and not the frozen ones.

    All ranks read those from the same files. Sent, they would be written, and the ranks of a machine could share the
    files' pages no longer: each would hold a base of its own.
    """
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    for parameter in frozen:
        parameter.ds_optim_param = True  # DeepSpeed's mark of weights that are each rank's own affair
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.__dict__.pop("ds_optim_param", None)


def precision_of(config: FineTuningConfig, device: str) -> str:
    """What the weights are in on a device: ``fp32``, ``bf16`` or ``fp16``."""
    return _NAMES[torch_dtype(config.precision, device)]


def _settings(config: FineTuningConfig, device: str) -> dict[str, Any]:
    return deepspeed_settings(config, precision_of(config, device))


@torch.no_grad()
def _undo_first_step(optimizer: Any) -> None:
    """Stage 0 in half precision: DeepSpeed makes a step at once to fill Adam's state, which counts and decays."""
    if hasattr(optimizer, "fp32_groups"):
        optimizer.optimizer.state.clear()
        for halves, wholes in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for half, whole in zip(halves, wholes, strict=True):
                whole.copy_(half)

"""Checkpoints: trainable weights and optimizer moments as safetensors, the rest as JSON, a manifest last.

DeepSpeed's own checkpoints are pickles and are not used. A checkpoint is whole exactly when its manifest verifies;
resume asks storage for the newest whole one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from raytune_ft.core.errors import ArtifactError
from raytune_ft.core.manifest import MANIFEST
from raytune_ft.core.storage import Location
from raytune_ft.training.engine import LocalLearner, Trainee, ZeroLearner

logger = logging.getLogger("raytune_ft")

State = dict[str, Tensor]
_MOMENTS = ("exp_avg", "exp_avg_sq")
_WEIGHTS, _OPTIMIZER, _PROGRESS = "weights.safetensors", "optimizer.safetensors", "progress.json"


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on: full (not sharded) weights and moments by parameter name, and its progress."""

    step: int
    weights: State
    moments: State
    progress: dict[str, Any]


def write(folder: Location, checkpoint: Checkpoint, *, keep: int) -> Location:
    """Writes a checkpoint below `folder`, its manifest last; deletes all but the newest `keep`. Returns its folder."""
    target = folder / f"step-{checkpoint.step:08d}"
    target.delete()
    with tempfile.TemporaryDirectory() as scratch:
        local = Path(scratch)
        save_file(checkpoint.weights, local / _WEIGHTS)
        save_file(checkpoint.moments, local / _OPTIMIZER)
        (local / _PROGRESS).write_text(json.dumps({"step": checkpoint.step, **checkpoint.progress}), encoding="utf-8")
        files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(local.iterdir())}
        target.upload(local)
    (target / MANIFEST).write(json.dumps({"files": files}).encode())
    for name in folder.folders()[:-keep]:
        (folder / name).delete()
    return target


def newest(folder: Location) -> Checkpoint | None:
    """The newest whole checkpoint below `folder`; damaged ones are named and passed over."""
    for name in reversed(folder.folders()):
        target = folder / name
        if not (target / MANIFEST).exists():
            logger.warning("checkpoint %s: was not finished, passed over", target)
            continue
        try:
            return read(target)
        except (ArtifactError, ValueError, KeyError) as error:
            logger.warning("checkpoint %s: damaged (%s), passed over", target, error)
    return None


def read(target: Location) -> Checkpoint:
    """The checkpoint in a folder that `write` made.

    Raises:
        ValueError: if a file is not what the manifest says.
    """
    files = json.loads((target / MANIFEST).read())["files"]
    for name, digest in files.items():
        if (target / name).sha256() != digest:
            raise ValueError(f"{name} does not match the manifest")
    with tempfile.TemporaryDirectory() as scratch:
        target.download(Path(scratch))
        weights = load_file(Path(scratch) / _WEIGHTS)
        moments = load_file(Path(scratch) / _OPTIMIZER)
        progress = json.loads((Path(scratch) / _PROGRESS).read_text(encoding="utf-8"))
    return Checkpoint(progress.pop("step"), weights, moments, progress)


@dataclass(frozen=True)
class _Replicated:
    """Weights that the optimizer steps (fp32 copies, where the model has half precision), by parameter name."""

    optimizer: torch.optim.Optimizer
    masters: dict[str, Tensor]


def _replicated(learner: ZeroLearner | LocalLearner) -> _Replicated | None:
    """What one process, or every rank of ZeRO stage 0, holds whole; None where it is sharded."""
    optimizer = learner.optimizer if isinstance(learner, LocalLearner) else learner.engine.optimizer
    trainable = learner.trainee.trainable()
    if isinstance(optimizer, torch.optim.Optimizer):
        return _Replicated(optimizer, dict(trainable))
    if not hasattr(optimizer, "fp32_groups"):
        return None
    groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    masters = {id(half): whole for halves, wholes in groups for half, whole in zip(halves, wholes, strict=True)}
    return _Replicated(optimizer.optimizer, {name: masters[id(p)] for name, p in trainable.items()})


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def trainable_state(trainee: Trainee) -> State:
    """Copies of the trainable parameters on the CPU, by name."""
    return {name: _copy(p) for name, p in trainee.trainable().items()}


def take(learner: ZeroLearner | LocalLearner, step: int, progress: dict[str, Any]) -> Checkpoint:
    """The state of a learner after `step`; under ZeRO every rank has to call it (the shards are gathered)."""
    replicated = _replicated(learner)
    if replicated is not None:
        weights = {name: _copy(master) for name, master in replicated.masters.items()}
        moments = {
            f"{key}.{name}": _copy(replicated.optimizer.state[master][key])
            for name, master in replicated.masters.items()
            for key in _MOMENTS
        }
        return Checkpoint(step, weights, moments, progress)
    assert isinstance(learner, ZeroLearner)
    return _gathered_shards(learner, step, progress)


def restore(learner: ZeroLearner | LocalLearner, checkpoint: Checkpoint) -> None:
    """Sets weights, moments and step count of a learner that has made no step yet."""
    learner.trainee.load(checkpoint.weights)
    replicated = _replicated(learner)
    if replicated is not None:
        for name, master in replicated.masters.items():
            state = {key: checkpoint.moments[f"{key}.{name}"].to(master.device).clone() for key in _MOMENTS}
            replicated.optimizer.state[master] = {"step": torch.tensor(float(checkpoint.step)), **state}
            with torch.no_grad():
                master.copy_(checkpoint.weights[name])
        return
    assert isinstance(learner, ZeroLearner)
    _restore_shards(learner, checkpoint)


def _gathered_shards(learner: ZeroLearner, step: int, progress: dict[str, Any]) -> Checkpoint:
    """Every rank adds its part of each tensor to zeros, so that all have the whole."""
    weights: State = {}
    moments: State = {}
    for name, parameter in learner.trainee.trainable().items():
        whole = {key: torch.zeros(parameter.numel(), device=parameter.device) for key in ("weights", *_MOMENTS)}
        for key, (part, mine) in _shards(learner, parameter).items():
            whole[key].narrow(0, part.start, part.numel).copy_(mine)
        for tensor in whole.values():
            torch.distributed.all_reduce(tensor)
        weights[name] = whole["weights"].view_as(parameter).cpu()
        moments |= {f"{key}.{name}": whole[key].view_as(parameter).cpu() for key in _MOMENTS}
    return Checkpoint(step, weights, moments, progress)


def _restore_shards(learner: ZeroLearner, checkpoint: Checkpoint) -> None:
    zero = learner.engine.optimizer
    for flat in zero.single_partition_of_fp32_groups:
        moments = {key: torch.zeros_like(flat) for key in _MOMENTS}
        zero.optimizer.state[flat] = {"step": torch.tensor(float(checkpoint.step)), **moments}
    for name, parameter in learner.trainee.trainable().items():
        for key, (part, mine) in _shards(learner, parameter).items():
            full = checkpoint.weights[name] if key == "weights" else checkpoint.moments[f"{key}.{name}"]
            with torch.no_grad():
                mine.copy_(full.flatten().narrow(0, part.start, part.numel))


def _shards(learner: ZeroLearner, parameter: Any) -> dict[str, tuple[Any, Tensor]]:
    """This rank's part of a parameter's fp32 weights and moments, each with its address in the whole (flat) tensor.

    DeepSpeed notes both addresses in `_hp_mapping`, which is None where no part lies on this rank.
    """
    mapping = parameter._hp_mapping
    if mapping is None:
        return {}
    zero = learner.engine.optimizer
    flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
    whole, here = mapping.lp_fragment_address, mapping.hp_fragment_address
    slots = {"weights": flat, **{key: zero.optimizer.state[flat][key] for key in _MOMENTS}}
    return {key: (whole, slot.narrow(0, here.start, here.numel)) for key, slot in slots.items()}

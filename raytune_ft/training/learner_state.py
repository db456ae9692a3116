"""What a learner is made of, as slices: fp32 weights and Adam's moments by parameter name, wherever an engine has them.

Torch's AdamW and ZeRO stage 0 hold every parameter whole on every rank; stages 1 and 2 hold consecutive values of the
flattened parameters in one buffer a group, at addresses noted on each parameter; stage 3 holds an equal part of every
parameter on every rank, the last one padded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raytune_ft.training.checkpoint import BEST, MOMENTS, WEIGHTS, StoredCheckpoint
from raytune_ft.training.engine import LocalLearner, ZeroLearner, shape_of
from raytune_ft.training.peers import Peers
from raytune_ft.training.slices import Slice, share

Learner = LocalLearner | ZeroLearner
_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What fp16's loss scaling remembers, by DeepSpeed's names."""


@dataclass(frozen=True)
class Part:
    """The values of a parameter that this rank holds, as live one-dimensional tensors: writing to them changes it."""

    name: str
    shape: tuple[int, ...]
    start: int
    weights: Tensor
    buffer: Tensor
    """What the optimizer steps: the parameter, its fp32 copy, or the flat buffer that it lies in."""
    first: int
    """Where the values begin in the flattened buffer."""

    def state(self, optimizer: torch.optim.Optimizer, key: str) -> Tensor:
        """The values' own part of the optimizer's state; zeros before its first step, which fp16 may put off."""
        found: Tensor | None = optimizer.state[self.buffer].get(key)
        if found is None:
            return torch.zeros(len(self.weights))
        return found.view(-1).narrow(0, self.first, len(self.weights))


class LearnerState:
    """Reads and sets the state of a learner; under ZeRO every rank makes the same calls."""

    def __init__(self, learner: Learner) -> None:
        self._learner = learner
        self._zero: Any = learner.engine.optimizer if isinstance(learner, ZeroLearner) else learner.optimizer
        kinds: dict[str, Callable[[], Iterator[Part]]] = {
            "fp32_partitioned_groups_flat": self._of_stage_3,
            "single_partition_of_fp32_groups": self._of_stages_1_and_2,
            "fp32_groups": self._of_half_precision,
        }
        parts = next((kind for name, kind in kinds.items() if hasattr(self._zero, name)), self._of_full_precision)
        self.parts = list(parts())
        self.is_replicated = parts in (self._of_half_precision, self._of_full_precision)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all trainable parameters, by name."""
        return {name: shape_of(p) for name, p in self._learner.trainee.trainable().items()}

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Torch's own optimizer, under DeepSpeed's or by itself."""
        own: torch.optim.Optimizer = getattr(self._zero, "optimizer", self._zero)
        return own

    def snapshot(self, peers: Peers) -> dict[str, Slice]:
        """Copies, in this machine's memory, of what this rank is to write: each value is some rank's."""
        taken = {}
        for part in self.parts:
            start, count = self._written_here(part, peers)
            tensors = {WEIGHTS: part.weights} | {f"{key}.": part.state(self.optimizer, key) for key in MOMENTS}
            for kind, tensor in tensors.items():
                values = _copy(tensor.narrow(0, start, count))
                taken[kind + part.name] = Slice(part.shape, part.start + start, values)
        return taken

    def best_slices(self, best: dict[str, Tensor], peers: Peers) -> dict[str, Slice]:
        """Weights that `weights_here` gave earlier, as slices that this rank is to write."""
        taken = {}
        for part in self.parts:
            start, count = self._written_here(part, peers)
            values = best[part.name].narrow(0, start, count)
            taken[BEST + part.name] = Slice(part.shape, part.start + start, values)
        return taken

    def weights_here(self) -> dict[str, Tensor]:
        """Copies of the weights that this rank holds, by name."""
        return {part.name: _copy(part.weights) for part in self.parts}

    def best_in(self, stored: StoredCheckpoint) -> dict[str, Tensor] | None:
        """The best weights of a checkpoint, as `weights_here` gives this rank's; None if nothing was evaluated."""
        if not stored.shapes(BEST):
            return None
        return {part.name: stored.read(BEST + part.name, part.start, len(part.weights)) for part in self.parts}

    @torch.no_grad()
    def set_weights(self, values: dict[str, Tensor]) -> None:
        """Sets this rank's weights, and brings the model's copies of them up to date on all ranks."""
        for part in self.parts:
            part.weights.copy_(values[part.name])
        self._refresh()

    @torch.no_grad()
    def restore(self, stored: StoredCheckpoint) -> None:
        """Sets weights, moments and scalars of a learner that has made no step yet, from any number of ranks' files."""
        optimizer, made = self.optimizer, float(stored.progress["optimizer_steps"])
        for buffer in {id(part.buffer): part.buffer for part in self.parts}.values():
            moments = {key: torch.zeros_like(buffer, requires_grad=False) for key in MOMENTS}
            optimizer.state[buffer] = {"step": torch.tensor(made), **moments}
        for part in self.parts:
            part.weights.copy_(stored.read(WEIGHTS + part.name, part.start, len(part.weights)))
            for key in MOMENTS:
                values = stored.read(f"{key}.{part.name}", part.start, len(part.weights))
                part.state(optimizer, key).copy_(values)
        if self._scaler is not None:
            vars(self._scaler).update(stored.progress["loss_scale"])
        self._refresh()

    def scalars(self) -> dict[str, Any]:
        """Steps that Adam has made, and the state of fp16's loss scaling (empty without it)."""
        made = [float(state["step"]) for state in self.optimizer.state.values() if "step" in state]
        remembered = vars(self._scaler) if self._scaler is not None else {}
        scale = {name: remembered[name] for name in _SCALE if name in remembered}
        return {"optimizer_steps": max(made, default=0.0), "loss_scale": scale}

    @property
    def _scaler(self) -> Any:
        """What scales the loss under fp16: a part of DeepSpeed's optimizer, or itself."""
        if not isinstance(self._learner, ZeroLearner) or not self._learner.engine.fp16_enabled():
            return None
        return getattr(self._zero, "loss_scaler", self._zero)

    def _written_here(self, part: Part, peers: Peers) -> tuple[int, int]:
        """Which of a part's values this rank writes: all, or its share where every rank has the same."""
        count = len(part.weights)
        return share(count, peers.rank, peers.world_size) if self.is_replicated else (0, count)

    def _of_full_precision(self) -> Iterator[Part]:
        for name, parameter in self._learner.trainee.trainable().items():
            yield Part(name, tuple(parameter.shape), 0, parameter.data.view(-1), parameter, 0)

    def _of_half_precision(self) -> Iterator[Part]:
        groups = zip(self._zero.fp16_groups, self._zero.fp32_groups, strict=True)
        masters = {id(half): whole for halves, wholes in groups for half, whole in zip(halves, wholes, strict=True)}
        for name, parameter in self._learner.trainee.trainable().items():
            master = masters[id(parameter)]
            yield Part(name, tuple(parameter.shape), 0, master.data.view(-1), master, 0)

    def _of_stages_1_and_2(self) -> Iterator[Part]:
        for name, parameter in self._learner.trainee.trainable().items():
            mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]  # DeepSpeed's
            if mapping is None:  # no value of it lies on this rank
                continue
            flat = self._zero.single_partition_of_fp32_groups[mapping.param_group_index]
            whole, here = mapping.lp_fragment_address, mapping.hp_fragment_address
            values = flat.data.narrow(0, here.start, here.numel)
            yield Part(name, tuple(parameter.shape), whole.start, values, flat, here.start)

    def _of_stage_3(self) -> Iterator[Part]:
        rank = torch.distributed.get_rank()
        for name, parameter in self._learner.trainee.trainable().items():
            group, first, padded = self._zero.grad_position[self._zero.get_param_id(parameter)]
            shape = shape_of(parameter)
            start = rank * padded
            count = max(0, min(padded, math.prod(shape) - start))
            flat = self._zero.fp32_partitioned_groups_flat[group]
            yield Part(name, shape, min(start, math.prod(shape)), flat.data.narrow(0, first, count), flat, first)

    def _refresh(self) -> None:
        """Copies the fp32 weights to where the model computes with them."""
        zero = self._zero
        if hasattr(zero, "fp32_partitioned_groups_flat"):
            zero.checkpoint_event_prologue()
            for group in range(len(zero.fp32_partitioned_groups_flat)):
                zero._reassign_or_swap_out_partitioned_parameters(group)
            zero.checkpoint_event_epilogue()
        elif hasattr(zero, "single_partition_of_fp32_groups"):
            zero.update_lp_params()
        elif hasattr(zero, "fp32_groups"):
            for halves, wholes in zip(zero.fp16_groups, zero.fp32_groups, strict=True):
                for half, whole in zip(halves, wholes, strict=True):
                    half.data.copy_(whole.data)


def random_state(peers: Peers) -> dict[str, Slice]:
    """The states of this rank's random generators; each step draws from its own seed, so they matter between steps."""
    states = {f"rng.cpu.{peers.rank}": torch.get_rng_state()}
    if peers.device.startswith("cuda"):
        states[f"rng.cuda.{peers.rank}"] = torch.cuda.get_rng_state(peers.device)
    return {key: Slice(tuple(state.shape), 0, state) for key, state in states.items()}


def set_random_state(stored: StoredCheckpoint, peers: Peers) -> None:
    """Sets this rank's random generators as they were, if a rank of this number wrote them."""
    shapes = stored.shapes("rng.")
    cpu, cuda = f"cpu.{peers.rank}", f"cuda.{peers.rank}"
    if cpu in shapes:
        torch.set_rng_state(stored.read(f"rng.{cpu}", 0, math.prod(shapes[cpu])))
    if cuda in shapes and peers.device.startswith("cuda"):
        torch.cuda.set_rng_state(stored.read(f"rng.{cuda}", 0, math.prod(shapes[cuda])), peers.device)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()

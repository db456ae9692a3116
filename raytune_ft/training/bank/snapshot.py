"""A trial of a bank as a checkpoint, in the format of every training run: weights and moments by parameter name."""

from __future__ import annotations

from torch import Tensor

from raytune_ft.core.errors import ModelError
from raytune_ft.training.bank.slot import SlotState, State
from raytune_ft.training.bank.trial import Trial
from raytune_ft.training.checkpoint import Checkpoint


def snapshot_of(trial: Trial, state: SlotState) -> Checkpoint:
    """All that a trial needs to go on; its place in the data is its step."""
    moments = {
        **{f"exp_avg.{name}": tensor for name, tensor in state.exp_avg.items()},
        **{f"exp_avg_sq.{name}": tensor for name, tensor in state.exp_avg_sq.items()},
        **{f"best.{name}": tensor for name, tensor in (trial.best or {}).items()},
    }
    return Checkpoint(trial.step, state.weights, moments, {"config": trial.config.resolved(), **trial.remembered()})


def on_cpu(snapshot: Checkpoint) -> Checkpoint:
    """The same on the CPU; tensors that share memory make the way together."""
    homes: dict[int, Tensor] = {}

    def moved(tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in homes:
            homes[memory.data_ptr()] = tensor.new_empty(0).set_(memory).cpu()
        home = homes[memory.data_ptr()]
        return home.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    weights, moments = (
        {name: moved(tensor) for name, tensor in state.items()} for state in (snapshot.weights, snapshot.moments)
    )
    return Checkpoint(snapshot.step, weights, moments, snapshot.progress)


def slot_state(snapshot: Checkpoint, wanted: State, name: str) -> SlotState:
    """The tensors of a snapshot, for a slot with the tensors `wanted`.

    Raises:
        ModelError: if names or shapes differ, as they do between ranks or target modules.
    """
    shapes = [{key: tuple(tensor.shape) for key, tensor in state.items()} for state in (wanted, snapshot.weights)]
    if shapes[0] != shapes[1]:
        differing = sorted(key for key in {*shapes[0], *shapes[1]} if shapes[0].get(key) != shapes[1].get(key))
        raise ModelError(
            f"trial {name}: its snapshot is of another shape ({differing[0]}: wanted {shapes[0].get(differing[0])}, "
            f"got {shapes[1].get(differing[0])}); rank and target modules must stay as they were"
        )
    return SlotState(snapshot.weights, _chosen(snapshot, "exp_avg."), _chosen(snapshot, "exp_avg_sq."), snapshot.step)


def _chosen(snapshot: Checkpoint, prefix: str) -> State:
    """The tensors beside the weights whose names begin with `prefix`, without it."""
    return {key.removeprefix(prefix): tensor for key, tensor in snapshot.moments.items() if key.startswith(prefix)}

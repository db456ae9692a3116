"""Wanda: a weight matters by its size times that of its input, as calibration rows show it (Sun et al., 2023).

Blocks are pruned one after the other, each on what the pruned ones before it give, so that later blocks are weighed
by the inputs that they will see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from raytune_ft.core.errors import ModelError


@dataclass
class _Row:
    """One calibration row on its way: hidden states before the next block, and what else each block is called with."""

    hidden: Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)


@torch.no_grad()
def prune_by_inputs(
    model: Any,
    rows: Sequence[Sequence[int]],
    layers: Sequence[tuple[str, Tensor, int]],
    *,
    sparsity: float,
    pattern: tuple[int, int] | None = None,
) -> None:
    """Sets the weights that matter least to zero, in place: a share of every output's, or all but N of every M.

    Args:
        model: a causal language model of blocks in a row.
        rows: token ids of the calibration rows.
        layers: name, weight and input dimension of the matrices to prune.
        sparsity: share of each output's weights.
        pattern: N and M; `sparsity` is not looked at then.

    Raises:
        ModelError: if the model has no row of blocks that hold these layers, or a layer saw no token.
    """
    blocks = decoder_blocks(model)
    places = {id(weight): (name, input_dim) for name, weight, input_dim in layers}
    inside = {id(p) for block in blocks for p in block.parameters()}
    outside = [name for name, weight, _ in layers if id(weight) not in inside]
    if outside:
        raise ModelError(f"{type(model).__name__}: {outside[0]} lies outside the blocks, where inputs are not followed")
    followed = [_enter(model, blocks, ids) for ids in rows]
    for number, block in enumerate(blocks):
        pruned: list[Any] = [module for module in block.modules() if id(getattr(module, "weight", None)) in places]
        seen: dict[int, Tensor] = {}
        hooks = [_listen(module, seen) for module in pruned]
        for row in followed:
            _pass(block, row, number)
        for hook in hooks:
            hook.remove()
        for module in pruned:
            name, input_dim = places[id(module.weight)]
            if id(module.weight) not in seen:
                raise ModelError(f"{name}: no calibration token reached it; give more calibration rows")
            norms = seen[id(module.weight)].sqrt()
            zero_least(module.weight, norms, input_dim, sparsity=sparsity, pattern=pattern)
        for row in followed:
            row.hidden = _pass(block, row, number)


def decoder_blocks(model: Any) -> list[nn.Module]:
    """The blocks of a causal language model, in order.

    Raises:
        ModelError: if it has no list of blocks.
    """
    lists: list[nn.ModuleList] = [
        module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)
    ]
    if not lists:
        raise ModelError(
            f"{type(model).__name__}: has no list of blocks, so inputs cannot be followed from one to next"
        )
    sizes = [sum(parameter.numel() for parameter in found.parameters()) for found in lists]
    return list(lists[sizes.index(max(sizes))])


@torch.no_grad()
def zero_least(
    weight: Tensor, norms: Tensor, input_dim: int, *, sparsity: float, pattern: tuple[int, int] | None = None
) -> None:
    """Sets the weights with the smallest ``|weight| * norm of its input`` to zero, within each output, in place.

    Args:
        weight: [outputs, inputs], or the other way round.
        norms: [inputs].
        input_dim: which dimension of `weight` is the inputs'.
        sparsity: share of each output's weights.
        pattern: N and M, instead: the N that matter most of every M neighbouring inputs stay.
    """
    rows = weight.movedim(input_dim, -1)
    scores = rows.float().abs() * norms
    width = rows.shape[1]
    kept, group = pattern or (width - round(sparsity * width), width)  # without a pattern an output is one group
    groups = scores.reshape(len(rows), -1, group)
    least = groups.argsort(dim=-1, stable=True)[..., : group - kept]
    rows.masked_fill_(torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, least, True).view(rows.shape), 0)


def _enter(model: Any, blocks: Sequence[nn.Module], ids: Sequence[int]) -> _Row:
    """The row in front of the first block, with the arguments that the model calls each block with."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    first: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = dict(kwargs)
        hidden = args[0] if args else named.pop("hidden_states")
        if not first:
            first.append(hidden)
        calls.append((args[1:], named))

    hooks = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
    try:
        model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if len(calls) != len(blocks):
        raise ModelError(f"{type(model).__name__}: does not call its blocks one after the other")
    return _Row(first[0], calls)


def _pass(block: nn.Module, row: _Row, number: int) -> Tensor:
    args, kwargs = row.calls[number]
    out = block(row.hidden, *args, **kwargs)
    return out if isinstance(out, Tensor) else out[0]


def _listen(module: Any, seen: dict[int, Tensor]) -> Any:
    key = id(module.weight)

    def hear(module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].detach().float()
        squares = x.reshape(-1, x.shape[-1]).square().sum(0)
        seen[key] = seen[key] + squares if key in seen else squares

    return module.register_forward_pre_hook(hear)

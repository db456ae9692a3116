"""A model with zeros in it: the weights of the linear layers that matter least are set to zero.

Zeros are stored like any other number, so a pruned folder is as large as its source (unless it is stored compact) and
plain matrix products are as fast as before. What pruning gives is a model that sparse kernels (2:4 on GPU) or a sparse
format can make use of.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raytune_ft.compression.agreement import Agreement, compare, next_token_logits, text_ids
from raytune_ft.compression.calibration import calibration_rows
from raytune_ft.compression.config import PruningConfig, PruningMethod, PruningScope
from raytune_ft.compression.source import full_precision, refuse_quantized
from raytune_ft.compression.wanda import prune_by_inputs, zero_least
from raytune_ft.core.errors import ModelError
from raytune_ft.models.chat import Chat
from raytune_ft.models.loading import UNREADABLE, load_tokenizer
from raytune_ft.models.scoring import context_tokens
from raytune_ft.models.size import stored_bytes, weight_bytes
from raytune_ft.models.sparsity import MARK, fused_experts, write_compact

logger = logging.getLogger("raytune_ft")


@dataclass(frozen=True)
class Pruned:
    """What pruning made: shares of zeros as measured, sizes of the weights in bytes, and how alike the models answer.

    `sparsity` counts the pruned layers only, `sparsity_of_model` all parameters.
    """

    sparsity: float
    sparsity_of_model: float
    sparsity_by_layer: dict[str, float]
    weights_considered: int
    weights_total: int
    bytes_before: int
    bytes_after: int
    calibration_tokens: int
    agreement: Agreement


@dataclass(frozen=True)
class Layer:
    """The weight matrix of a linear layer and which of its dimensions is the input; or those of a mixture's experts."""

    name: str
    weight: torch.Tensor
    input_dim: int


def write_pruned(reference: str, folder: Path, config: PruningConfig, *, device: str = "cpu") -> Pruned:
    """Writes a pruned copy of a model, with its tokenizer and chat template, in the source's precision.

    Raises:
        ModelError: if the source is no model, is quantized, has an adapter that cannot merge, has no linear layer, or
            a layer's input is not a multiple of the pattern's group.
        RunError: if the pruned model's outputs are not finite.
    """
    with full_precision(reference) as source:
        model = source.load(device=device)
        tokenizer = load_tokenizer(source.path)
    ids = text_ids(tokenizer, context_tokens(model))
    expected = next_token_logits(model, ids)
    layers = prunable(model)
    if config.method is PruningMethod.MAGNITUDE:  # the others have to know which dimension is the input
        layers += [Layer(name, weight, input_dim=2) for name, weight in fused_experts(model).items()]
    else:
        warn_of_experts(f"prune: {config.method}", model, layers, "method: magnitude prunes them, too")
    if not layers:
        raise ModelError(f"{reference}: has no linear layer besides its head; there is nothing to prune")
    calibrated = 0
    if config.method is PruningMethod.WANDA:
        calibrated = _prune_by_inputs(model, Chat(tokenizer), layers, config)
    else:
        prune(layers, config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / MARK).write_text(json.dumps(config.model_dump(mode="json"), indent=1) + "\n", encoding="utf-8")
    total, zeros = _counts(list(model.parameters()))
    considered, pruned_zeros = _counts([layer.weight for layer in layers])
    return Pruned(
        sparsity=pruned_zeros / considered,
        sparsity_of_model=zeros / total,
        sparsity_by_layer={layer.name: _share(layer.weight) for layer in layers},
        weights_considered=considered,
        weights_total=total,
        bytes_before=weight_bytes(model),
        bytes_after=write_compact(folder) if config.storage == "compact" else stored_bytes(folder),
        calibration_tokens=calibrated,
        agreement=compare(expected, next_token_logits(model, ids)),
    )


def prunable(model: Any) -> list[Layer]:
    """The linear layers of a model in order, without the output head (embeddings and norms are not linear layers)."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    layers = []
    for name, module in model.named_modules():
        if module is head:
            continue
        if isinstance(module, torch.nn.Linear):
            layers.append(Layer(name, module.weight, input_dim=1))
        elif isinstance(module, Conv1D):  # GPT-2 keeps its weights as [input, output]
            layers.append(Layer(name, module.weight, input_dim=0))
    return layers


def warn_of_experts(what: str, model: Any, layers: Sequence[Layer], instead: str) -> None:
    """Says so where a mixture's experts, which are no linear layers, stay as they are, and what share is covered."""
    experts = sum(weight.numel() for weight in fused_experts(model).values())
    if experts:
        total = sum(parameter.numel() for parameter in model.parameters())
        logger.warning(
            "%s takes linear layers only, which hold %.1f%% of this model's weights; its experts (%.1f%%) stay as they "
            "are. %s",
            what,
            100 * sum(layer.weight.numel() for layer in layers) / total,
            100 * experts / total,
            instead,
        )


def _prune_by_inputs(model: Any, chat: Chat, layers: Sequence[Layer], config: PruningConfig) -> int:
    """Prunes by what calibration rows show; their number of tokens."""
    rows = calibration_rows(config, chat, context_tokens=context_tokens(model))
    _refuse_misfits(layers, config)
    prune_by_inputs(
        model.eval(),
        rows,
        [(layer.name, layer.weight, layer.input_dim) for layer in layers],
        sparsity=config.target_sparsity,
        pattern=config.kept_of_group,
    )
    return sum(map(len, rows))


def refuse_pattern(reference: str, config: PruningConfig) -> None:
    """Checks that the pattern, if there is one, fits a model's layers; by their shapes, no weights are loaded.

    Raises:
        ModelError: as `write_pruned`.
    """
    from transformers import AutoModelForCausalLM

    described = refuse_quantized(reference)
    if config.kept_of_group is None:
        return
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(described)
    except UNREADABLE:
        return  # it has no shapes without its weights, and is looked at when these are there
    _refuse_misfits(prunable(model), config)


def _refuse_misfits(layers: Sequence[Layer], config: PruningConfig) -> None:
    if config.kept_of_group is None:
        return
    _, group = config.kept_of_group
    for layer in layers:
        width = layer.weight.shape[layer.input_dim]
        if width % group:
            raise ModelError(
                f"{layer.name}: its input of {width} is not a multiple of {group}; "
                f"the pattern {config.pattern} does not fit this model"
            )


@torch.no_grad()
def prune(layers: Sequence[Layer], config: PruningConfig) -> None:
    """Sets the weights that `config` chooses to zero, in place.

    Raises:
        ModelError: if a layer's input is not a multiple of the pattern's group; no layer is changed then.
    """
    _refuse_misfits(layers, config)
    if config.kept_of_group is not None:
        for layer in layers:
            zero_in_groups(layer.weight, *config.kept_of_group, layer.input_dim)
    elif config.scope is PruningScope.GLOBAL:
        weights = [layer.weight for layer in layers]
        zero_smallest(weights, round(config.target_sparsity * sum(weight.numel() for weight in weights)))
    else:
        for layer in layers:
            zero_smallest([layer.weight], round(config.target_sparsity * layer.weight.numel()))


@torch.no_grad()
def zero_smallest(weights: Sequence[torch.Tensor], count: int) -> None:
    """Sets the `count` weights of smallest magnitude, over all tensors together, to zero; of equal ones the first.

    The bit pattern of a positive float grows with its value, so two histograms of half a pattern each find the
    threshold exactly without sorting or joining the tensors.
    """
    if count == 0:
        return
    high = torch.zeros(1 << 16, dtype=torch.int64)
    for weight in weights:
        high += torch.bincount((_pattern(weight) >> 16).flatten(), minlength=1 << 16).cpu()
    bucket, below = _reached(high, count)
    low = torch.zeros(1 << 16, dtype=torch.int64)
    for weight in weights:
        pattern = _pattern(weight)
        low += torch.bincount(pattern[pattern >> 16 == bucket] & 0xFFFF, minlength=1 << 16).cpu()
    rest, below_rest = _reached(low, count - below)
    threshold = (bucket << 16) | rest
    ties = count - below - below_rest
    for weight in weights:
        pattern = _pattern(weight)
        drop = pattern < threshold
        equal = (pattern == threshold).flatten().nonzero()[:ties, 0]
        ties -= len(equal)
        drop.view(-1)[equal] = True
        weight[drop] = 0


def _pattern(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().float().abs().contiguous().view(torch.int32)


def _reached(histogram: torch.Tensor, count: int) -> tuple[int, int]:
    """The bin in which the `count`-th item lies, and how many lie in the bins before it."""
    cumulative = histogram.cumsum(0)
    bin_ = int(torch.searchsorted(cumulative, count))
    return bin_, int(cumulative[bin_ - 1]) if bin_ else 0


@torch.no_grad()
def zero_in_groups(weight: torch.Tensor, kept: int, group: int, input_dim: int) -> None:
    """Sets all but the `kept` largest of every `group` neighbours along `input_dim` to zero, in place."""
    alike = torch.ones(weight.shape[input_dim], device=weight.device)
    zero_least(weight, alike, input_dim, sparsity=1 - kept / group, pattern=(kept, group))


def _counts(tensors: Sequence[torch.Tensor]) -> tuple[int, int]:
    """Numbers of weights and of zeros among them."""
    return sum(t.numel() for t in tensors), sum(int((t == 0).sum()) for t in tensors)


def _share(weight: torch.Tensor) -> float:
    return int((weight == 0).sum()) / weight.numel()

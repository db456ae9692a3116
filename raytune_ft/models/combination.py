"""Several adapters on one base: side by side, and as one weighted adapter."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from raytune_ft.core.errors import ModelError
from raytune_ft.models.adapters import PROMPT_METHODS, adapter_kind, adapter_weights, same_model, save_adapter
from raytune_ft.models.chat import Chat
from raytune_ft.models.config import Precision
from raytune_ft.models.loading import LoadedModel, load_model, load_tokenizer
from raytune_ft.models.references import ModelReference, resolve_adapter

CombinationType = Literal["cat", "linear", "svd"]
_NAME = re.compile(r"[A-Za-z0-9_-]+")


def load_adapters(
    adapters: Mapping[str, str], *, precision: Precision = Precision.AUTO, device: str | None = None
) -> LoadedModel:
    """One base with several adapters upon it; ``loaded.model.set_adapter(name)`` chooses, the first is chosen.

    Tokenizer and chat template are those of the first.

    Args:
        adapters: adapter references by name.
        precision: as in `load_model`.
        device: as in `load_model`.

    Raises:
        ModelError: if they are not adapters of one base and kind, or a name has other characters than A-Z 0-9 _ -.
    """
    from peft import PeftModel

    folders = _of_one_base(adapters)
    names = list(adapters)
    loaded = load_model(adapters[names[0]], precision=precision, device=device, with_adapter=False)
    model: Any = None
    for name, folder in folders.items():
        try:
            if model is None:
                model = PeftModel.from_pretrained(
                    loaded.model, str(folder), adapter_name=name, torch_device=loaded.device
                )
            else:
                model.load_adapter(str(folder), adapter_name=name, torch_device=loaded.device)
        except (ValueError, KeyError, RuntimeError) as error:
            raise ModelError(f"{adapters[name]}: this adapter does not fit beside the others: {error}") from None
    model.set_adapter(names[0])
    return LoadedModel(model.eval(), loaded.tokenizer, Chat(loaded.tokenizer), loaded.reference, loaded.device)


def combine_adapters(
    paths: Sequence[str],
    weights: Sequence[float],
    folder: Path,
    combination_type: CombinationType = "cat",
    *,
    rank: int | None = None,
) -> None:
    """Writes one LoRA adapter, a PEFT folder, that is the weighted sum of several on the same base.

    Args:
        paths: LoRA adapters.
        weights: one for each; negative ones take an adapter's effect away.
        folder: where the result and the first one's tokenizer go.
        combination_type: ``cat`` is the exact sum, of the ranks' sum; ``svd`` its best approximation of `rank`;
            ``linear`` sums the factors apart, which is rough and wants equal ranks.
        rank: of the ``svd`` result; by default the largest of the ranks.

    Raises:
        ModelError: if they are not LoRA adapters of one base, or cannot be combined in this way.
    """
    _check_combination(paths, weights, combination_type, rank)
    names = {f"part{number}": path for number, path in enumerate(paths)}
    folders = _of_one_base(names)
    for name, found in folders.items():
        kind = adapter_kind(found)
        if kind != "LORA":
            raise ModelError(f"{names[name]}: is {kind}; only LoRA adapters are sums that can be weighted")
    loaded = load_adapters(names, precision=Precision.FP32, device="cpu")
    configs = [loaded.model.peft_config[name] for name in names]
    dora = [path for path, config in zip(paths, configs, strict=True) if config.use_dora]
    if dora:
        raise ModelError(f"{dora[0]}: DoRA also rescales the base's weights, which has no weighted sum; merge it")
    ranks = sorted({config.r for config in configs})
    if combination_type == "linear" and len(ranks) > 1:
        raise ModelError(f"combination_type linear wants equal ranks, these are {ranks}; take cat or svd")
    layers = [module for module in loaded.model.modules() if hasattr(module, "lora_A")]
    narrowest = min(min(layer.in_features, layer.out_features) for layer in layers)
    if rank is not None and rank > narrowest:
        raise ModelError(f"rank: must be at most {narrowest}, the width of the narrowest layer (got {rank})")
    configs[0].use_rslora = False  # the result's alpha is its rank, which rsLoRA would scale once more
    try:
        with torch.no_grad():
            loaded.model.add_weighted_adapter(
                list(names), list(weights), "default", combination_type=combination_type, svd_rank=rank
            )
    except ValueError as error:
        raise ModelError(f"these adapters cannot be combined: {error}") from None
    for name in names:
        loaded.model.delete_adapter(name)
    loaded.model.peft_config["default"].base_model_name_or_path = loaded.reference.base
    save_adapter(loaded.model, load_tokenizer(paths[0]), folder)


def _check_combination(
    paths: Sequence[str], weights: Sequence[float], combination_type: CombinationType, rank: int | None
) -> None:
    if len(paths) < 2 or len(paths) != len(weights):
        raise ModelError(f"wanted two adapters or more and a weight for each, got {len(paths)} and {len(weights)}")
    if combination_type not in {"cat", "linear", "svd"}:
        raise ModelError(f"combination_type: must be cat, linear or svd (got {combination_type})")
    if rank is not None and combination_type != "svd":
        raise ModelError(f"rank: {combination_type} has its rank from the adapters; only svd takes one")
    if rank is not None and rank < 1:
        raise ModelError(f"rank: must be at least 1 (got {rank})")
    odd = [f"{path}={weight}" for path, weight in zip(paths, weights, strict=True) if not math.isfinite(weight)]
    if odd:
        raise ModelError(f"weights must be finite numbers (got {', '.join(odd)})")
    if not any(weights):
        raise ModelError("weights are all 0, which leaves the base alone; give one adapter at least another")


def _of_one_base(adapters: Mapping[str, str]) -> dict[str, Path]:
    if not adapters:
        raise ModelError("wanted one adapter at least, got none")
    found: dict[str, ModelReference] = {}
    for name, path in adapters.items():
        if not _NAME.fullmatch(name):
            raise ModelError(f"adapter name {name!r}: only letters, digits, _ and - are taken")
        found[name] = resolve_adapter(path)
    folders = {name: reference.adapter for name, reference in found.items() if reference.adapter is not None}
    first = next(iter(found))
    for name, reference in found.items():
        adapter_weights(folders[name])
        if not same_model(reference.base, found[first].base):
            raise ModelError(
                f"{adapters[name]} is upon {reference.base}, but {adapters[first]} upon {found[first].base}: "
                "adapters share a model only on the same base"
            )
    kinds = {name: adapter_kind(folder) for name, folder in folders.items()}
    mixed = set(kinds.values())
    if len(mixed) > 1 and mixed & PROMPT_METHODS:
        raise ModelError(f"adapters of {', '.join(sorted(mixed))} cannot be side by side; load them apart")
    return folders

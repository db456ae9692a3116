"""Which linear layers get no LoRA adapter: those that text never reaches, and routers of mixtures of experts."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

from torch import nn

from raytune_ft.core.errors import ModelError
from raytune_ft.core.grammar import agreeing, number_of

logger = logging.getLogger("raytune_ft")

ALL_LINEAR = "all-linear"


def left_out(model: Any, target_modules: list[str] | str) -> list[str]:
    """Dotted names of the linear layers that `target_modules` would fit and that get no adapter; says so once.

    Layers beside the text decoder of a model that also sees or hears have no gradient from text. Routers of experts
    are left out of ``all-linear`` only; a name given for itself is adapted.

    Args:
        model: a transformers causal language model, without an adapter.
        target_modules: names of linear layers, or ``all-linear``.
    """
    linear = {name: layer for name, layer in model.named_modules() if _is_linear(layer)}
    beside = [name for name in _beside_the_text(model, list(linear)) if _fits(name, target_modules)]
    routers = _routers(model, linear) if target_modules == ALL_LINEAR else []
    routers = [name for name in routers if name not in beside]
    if beside:
        _say(
            f"{number_of(len(beside), 'linear layer')} outside the text decoder {agreeing(len(beside), 'gets', 'get')} "
            f"no adapter ({beside[0]} is one)"
        )
    if routers:
        _say(f"all-linear leaves out the {len(routers)} layers that choose between experts ({routers[0]} is one)")
    return [*beside, *routers]


def refuse_routers(model: Any, target_modules: list[str]) -> None:
    """Checks that no layer is named that chooses experts besides scoring them: what it returns has no sum.

    Args:
        model: a transformers causal language model, without an adapter.
        target_modules: names of linear layers.

    Raises:
        ModelError: naming one that does.
    """
    named = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and _fits(name, target_modules)
    }
    for name in _routers(model, named):
        layer = named[name]
        if type(layer).forward is not nn.Linear.forward:
            raise ModelError(
                f"lora_target_modules: {name} ({type(layer).__name__}) returns more than a product, so that an adapter "
                "cannot be added to it; leave it out"
            )


def without_router_weights(config: Any, model: Any) -> None:
    """Takes routers that are bare parameters out of what PEFT makes of ``all-linear`` on a mixture of experts.

    Args:
        config: a PEFT LoRA configuration, changed in place; one with other target modules stays as it is.
        model: the transformers model that it is for.
    """
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    if config.target_modules != ALL_LINEAR:
        return
    convert_peft_config_for_transformers(config, model, None)
    if config.target_parameters and "gate.weight" in config.target_parameters:
        config.target_parameters = config.target_parameters - {"gate.weight"}
        _say("all-linear leaves out the routers (gate.weight), and takes the experts")


@functools.cache  # trials that are trained together ask once each
def _say(words: str) -> None:
    logger.info("lora_target_modules: %s", words)


def _is_linear(layer: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(layer, nn.Linear | Conv1D)


def _fits(name: str, target_modules: list[str] | str) -> bool:
    return isinstance(target_modules, str) or any(f".{name}".endswith(f".{end}") for end in target_modules)


def _beside_the_text(model: Any, names: list[str]) -> list[str]:
    settings = getattr(model, "config", None)
    if settings is None or settings.get_text_config() is settings or not hasattr(model, "get_decoder"):
        return []
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    if decoder is None or decoder is model:
        return []
    inside = {id(module) for module in decoder.modules()} | {id(head)}
    return [name for name in names if id(model.get_submodule(name)) not in inside]


def _routers(model: Any, layers: Mapping[str, Any]) -> list[str]:
    """The names of those linear layers that score experts."""
    counts = _expert_counts(model)
    return [name for name, layer in layers.items() if _routes(model, name, layer, counts)] if counts else []


def _routes(model: Any, name: str, layer: Any, counts: set[int]) -> bool:
    """Whether a layer scores experts, of which there are `counts`: by its place beside them, by its outputs or name."""
    above, _, own = name.rpartition(".")
    further, _, block = above.rpartition(".")
    if not above:
        return False
    if "router" in {own, block}:
        return True
    if _holds_experts(model.get_submodule(above)):
        return own == "gate" or getattr(layer, "out_features", 0) in counts | {1}
    return block == "gate" and _holds_experts(model.get_submodule(further))


def _expert_counts(model: Any) -> set[int]:
    settings = getattr(model, "config", None)
    found = settings.get_text_config().to_dict() if settings is not None else {}
    counts = {value for key, value in found.items() if key.endswith(("experts", "_expert_num")) and "shared" not in key}
    return {count for count in counts if type(count) is int and count > 1}


def _holds_experts(block: nn.Module) -> bool:
    return any("experts" in name and "shared" not in name for name, _ in block.named_children())

"""Adapters: new ones put upon a model, old ones gone on from, saved as PEFT folders, merged in full precision."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, Literal

import torch

from raytune_ft.core.errors import ModelError, first_line
from raytune_ft.models.config import Precision
from raytune_ft.models.loading import load_model, load_tokenizer, refuse_lost
from raytune_ft.models.lora_targets import left_out, refuse_routers, without_router_weights
from raytune_ft.models.references import resolve_adapter, resolve_model
from raytune_ft.models.sparsity import carry_mark, is_pruned, zero_again, zeros_of

logger = logging.getLogger("raytune_ft")

PROMPT_METHODS = {"PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING"}


def add_lora(
    model: Any,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    target_modules: list[str] | str,
    seed: int,
    base: str,
    use_rslora: bool = False,
    use_dora: bool = False,
    task: Literal["CAUSAL_LM", "SEQ_CLS"] = "CAUSAL_LM",
) -> Any:
    """A PEFT model with a new LoRA adapter upon `model`; only the adapter is trainable (and a scorer's head with it).

    Some layers that the names fit are left out (`lora_targets.left_out`).

    Args:
        model: a transformers causal language model; it is changed in place.
        rank: rank of the two factors.
        alpha: the product is scaled by alpha / rank.
        dropout: share of the adapter's inputs set to zero while training.
        target_modules: names of linear layers, or ``all-linear``.
        seed: of the initial values (PEFT's own initialization).
        base: what the saved adapter names as its base model.
        use_rslora: scales by alpha / sqrt(rank) instead.
        use_dora: learns the size of each weight column apart from its direction.
        task: PEFT's name of what the model does.

    Raises:
        ModelError: if no layer has one of the names: of each of them, since PEFT ignores those that fit nothing. If it
            is one that PEFT cannot adapt, or not with such options. Or if the adapter, once saved, could not be loaded
            whole.
    """
    from peft import LoraConfig

    _refuse_unknown(model, target_modules)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
        exclude_modules=left_out(model, target_modules) or None,
        use_rslora=use_rslora,
        use_dora=use_dora,
        task_type=task,
        base_model_name_or_path=base,
    )
    without_router_weights(config, model)
    adapted = _adapted(model, config, target_modules, seed)
    adapted.peft_config["default"].base_model_name_or_path = base
    _refuse_unloadable(adapted, target_modules)
    return adapted


def _refuse_unknown(model: Any, target_modules: list[str] | str) -> None:
    """Each name has to fit a layer, and none may choose between experts."""
    if isinstance(target_modules, str):
        return
    modules = [name for name, _ in model.named_modules()]
    unknown = [end for end in target_modules if not any(f".{name}".endswith(f".{end}") for name in modules)]
    if unknown:
        raise ModelError(f"lora_target_modules: {unknown} fit no layer of this model; {_linear_layers(model)}")
    refuse_routers(model, target_modules)


def _adapted(model: Any, config: Any, target_modules: list[str] | str, seed: int) -> Any:
    """PEFT's model by a `LoraConfig`, with the initial values of a seed."""
    from peft import get_peft_model

    layers = _linear_layers(model)
    torch.manual_seed(seed)
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        if config.target_parameters and (config.lora_dropout or config.use_dora):
            option, off = ("use_dora", "false") if config.use_dora else ("lora_dropout", "0")
            raise ModelError(
                f"{option}: is not there for experts or routers of {type(model).__name__}, whose weights LoRA adapts "
                f"as parameters; set {option}: {off}, or name layers of attention only (lora_target_modules)"
            ) from None
        raise ModelError(
            f"lora_target_modules: {target_modules} cannot be adapted ({first_line(error)}); {layers}"
        ) from None


def _refuse_unloadable(adapted: Any, target_modules: list[str] | str) -> None:
    """Takes the adapter's numbers out as they would be saved, and puts them in again: none may be lost."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    refuse_lost(
        set_peft_model_state_dict(adapted, state),
        adapted.peft_config["default"],
        f"lora_target_modules: {target_modules}: such an adapter of {type(adapted.get_base_model()).__name__} could be "
        "saved, but not loaded again; leave these layers out",
    )


def _linear_layers(model: Any) -> str:
    linear = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    return f"its linear layers are {', '.join(sorted(linear))}"


def add_virtual_tokens(
    model: Any,
    *,
    kind: Literal["prefix_tuning", "prompt_tuning"],
    count: int,
    seed: int,
    base: str,
    init_text: str | None = None,
) -> Any:
    """A PEFT model with `count` new virtual tokens before every row; only they are trainable.

    Args:
        model: a transformers causal language model.
        kind: prefix tuning learns keys and values of every layer, prompt tuning embeddings.
        count: number of virtual tokens.
        seed: of the initial values: PEFT's own for prefixes, embeddings of random tokens for prompts.
        base: what the saved adapter names as its base model, and whose tokenizer reads `init_text`.
        init_text: prompt tuning starts from its embeddings, repeated until all virtual tokens have one.

    Raises:
        ModelError: if `init_text` has more tokens than there are virtual tokens.
    """
    from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

    common = {"task_type": "CAUSAL_LM", "num_virtual_tokens": count, "base_model_name_or_path": base}
    if kind == "prefix_tuning":
        config = PrefixTuningConfig(**common)
    elif init_text is None:
        config = PromptTuningConfig(**common, prompt_tuning_init="SAMPLE_VOCAB")
    else:
        tokens = len(load_tokenizer(base)(init_text)["input_ids"])
        if tokens > count:
            raise ModelError(
                f"prompt_tuning_init_text: has {tokens} tokens, more than num_virtual_tokens ({count}); "
                f"shorten it, or set num_virtual_tokens: {tokens}"
            )
        start = {"prompt_tuning_init_text": init_text, "tokenizer_name_or_path": base}
        config = PromptTuningConfig(**common, prompt_tuning_init="TEXT", **start)
    torch.manual_seed(seed)
    adapted = get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = base
    return adapted


def go_on_from(model: Any, reference: str) -> None:
    """Sets a new adapter's weights to those of a saved one of the same shape, upon the same base.

    Args:
        model: a PEFT model that `add_lora` or `add_virtual_tokens` made.
        reference: the saved adapter.

    Raises:
        ModelError: naming each setting that differs, or the base, or what of the adapter was not taken.
    """
    from peft import PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    resolved = resolve_adapter(reference, "adapter_path")
    assert resolved.adapter is not None
    here, there = model.peft_config["default"], PeftConfig.from_pretrained(str(resolved.adapter))
    different = [
        f"{setting} is {getattr(there, name, None)} there and {getattr(here, name, None)} in the settings"
        for name, setting in _SHAPE.items()
        if getattr(there, name, None) != getattr(here, name, None)
    ]
    if different:
        raise ModelError(f"adapter_path: {reference} does not fit: {'; '.join(different)}")
    if not same_model(resolved.base, here.base_model_name_or_path):
        raise ModelError(
            f"adapter_path: {reference} belongs to the base {resolved.base}, but model_path is "
            f"{here.base_model_name_or_path}; train on its own base"
        )
    state, wanted = load_file(adapter_weights(resolved.adapter)), get_peft_model_state_dict(model)
    misfits = [name for name, tensor in wanted.items() if name not in state or state[name].shape != tensor.shape]
    misfits += [name for name in state if name not in wanted]
    if misfits:
        raise ModelError(
            f"adapter_path: {reference} does not fit: {len(misfits)} tensors are not those of the settings "
            f"({misfits[0]} is one); set lora_target_modules to its own: {getattr(there, 'target_modules', None)}"
        )
    result = set_peft_model_state_dict(model, state)
    refuse_lost(result, here, f"adapter_path: {reference}: parts of it were not loaded")


_SHAPE = {
    "peft_type": "method (PEFT's type)",
    "r": "lora_r",
    "lora_alpha": "lora_alpha",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "bias": "bias",
    "modules_to_save": "modules_to_save",
    "num_virtual_tokens": "num_virtual_tokens",
}


def same_model(one: str, other: str) -> bool:
    """Whether two references to base models lead to the same files, wherever they lie."""
    return one == other or resolve_model(one).digest == resolve_model(other).digest


def adapter_weights(folder: Path) -> Path:
    """The file that an adapter folder keeps its weights in.

    Raises:
        ModelError: if it has none in safetensors.
    """
    path = folder / "adapter_model.safetensors"
    if not path.exists():
        raise ModelError(f"{folder}: has no adapter_model.safetensors (pickled adapters are not loaded)")
    return path


def adapter_kind(folder: Path) -> str:
    """PEFT's type of the adapter in a folder, such as ``LORA`` or ``PREFIX_TUNING``."""
    return str(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("peft_type"))


def save_adapter(model: Any, tokenizer: Any, folder: Path, *, state: dict[str, torch.Tensor] | None = None) -> None:
    """Saves the adapter (from `state`, if given) with the tokenizer and chat template as a PEFT folder."""
    model.save_pretrained(folder, state_dict=state, safe_serialization=True, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card says nothing
    tokenizer.save_pretrained(folder)


def _zeros_under(adapted: Any) -> dict[str, torch.Tensor]:
    """As `zeros_of` the base below an adapter, by the names that its weights have without one."""
    base = adapted.get_base_model()
    head = next((name for name, module in base.named_modules() if module is base.get_output_embeddings()), None)
    found = {}
    for name, where in zeros_of(base).items():
        own, _, part = name.rpartition(".")
        owner, _, below = own.rpartition(".")
        if below in {"base_layer", "original_module"}:
            found[f"{owner}.{part}"] = where
        elif not any(piece.startswith(("lora_", "modules_to_save")) for piece in own.split(".")):
            found[name] = where
    found.pop(f"{head}.weight", None)
    return found


def merge_adapter(reference: str, folder: Path) -> None:
    """Writes the model of an adapter folder with the adapter merged into its weights, in fp32.

    A model without an adapter is copied as it is. Upon a pruned base its zeros stay zero, which takes a part of what
    the adapter learned; how much the answers change is said. The result is a Hugging Face folder with tokenizer and
    template.

    Raises:
        ModelError: for prompt methods (they have no merge), upon a quantized base, or if the merged model answers
            otherwise.
    """
    resolved = resolve_model(reference)
    if resolved.adapter is not None:
        kind = adapter_kind(resolved.adapter)
        if kind in PROMPT_METHODS:
            raise ModelError(
                f"{reference}: {kind} adds virtual tokens, not weights, and cannot be merged; serve the adapter"
            )
    loaded = load_model(reference, precision=Precision.FP32, device="cpu")
    model = loaded.model
    if resolved.adapter is not None:
        if getattr(model.config, "quantization_config", None) is not None:
            raise ModelError(
                f"{reference}: its base {resolved.base} is quantized, and a merge would round away what was learned; "
                "serve the adapter upon it, or name the base in full precision that it was made from in "
                "base_model_name_or_path of adapter_config.json"
            )
        model = _merged(model, reference, pruned=is_pruned(resolved.base))
    model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    carry_mark(resolved.base, folder)


@torch.no_grad()
def _merged(model: Any, reference: str, *, pruned: bool) -> Any:
    """The model with its adapter merged in, which answers as before; zeros of a pruned base are zero again.

    Raises:
        ModelError: if it answers otherwise.
    """
    zeros = _zeros_under(model) if pruned else {}
    probe = torch.arange(1, 9).unsqueeze(0) % model.config.get_text_config().vocab_size
    before = model(probe).logits

    def drift() -> float:
        return float((before - model(probe).logits).abs().max() / before.abs().max())

    model = model.merge_and_unload()
    if not (apart := drift()) < 1e-3:
        raise ModelError(
            f"{reference}: the merged model's logits differ from the adapter's by {apart:.1e} of their size, as where "
            "a layer that it changes shares its weights with another (a head with the embeddings); serve the adapter"
        )
    if zeros:
        changed, total = zero_again(model, zeros), sum(int(where.sum()) for where in zeros.values())
        logger.info(
            "%s: the base is pruned: %d of its %d zeros, which the adapter had filled, are zero again; logits differ "
            "by %.1e of their size",
            reference, changed, total, drift(),
        )  # fmt: skip
    return model

"""From model references to models and tokenizers, on their devices."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from raytune_ft.core.errors import ModelError, first_line
from raytune_ft.models.chat import Chat
from raytune_ft.models.config import Precision
from raytune_ft.models.references import ModelReference, model_json, refuse_scorer, resolve_model

logger = logging.getLogger("raytune_ft")

UNREADABLE = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)
"""What transformers raises where a model's files are missing, damaged, or of a kind that it does not know."""


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode with its tokenizer and chat template, on its device."""

    model: Any
    tokenizer: Any
    chat: Chat
    reference: ModelReference
    device: str

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: those of the chat, and those that the model itself names."""
        return tuple(sorted({*self.chat.stop_ids, *own_stop_ids(self.model)}))


def own_stop_ids(model: Any) -> tuple[int, ...]:
    """Tokens that end an answer by a model's generation settings, which may name several (end of turn, of a call)."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = getattr(getattr(causal, "generation_config", None), "eos_token_id", None)
    return tuple(found) if isinstance(found, list | tuple) else (() if found is None else (int(found),))


def load_tokenizer(reference: str) -> Any:
    """The tokenizer of a model (the adapter's own, if it brings one).

    Raises:
        ModelError: if it cannot be loaded.
    """
    from transformers import AutoTokenizer

    source = resolve_model(reference).tokenizer_source
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(_unreachable(source, "tokenizer", error)) from None


def load_model(
    reference: str, *, precision: Precision = Precision.AUTO, device: str | None = None, with_adapter: bool = True
) -> LoadedModel:
    """A model ready for scoring and generation.

    Args:
        reference: folder, artifact, URI, hub id or ``starter:``; quantized folders load as they were saved.
        precision: of the weights; auto takes what the device does well (bf16 on CUDA, fp32 on CPU).
        device: ``cpu``, ``cuda``, ``cuda:1``; by default CUDA where there is one.
        with_adapter: whether an adapter folder's adapter is put upon its base.

    Raises:
        ModelError: if it cannot be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM

    quiet_transformers()
    resolved = resolve_model(reference)
    refuse_scorer(resolved)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            resolved.base,
            dtype=torch_dtype(precision, device),
            device_map={"": device},
            trust_remote_code=False,
            use_safetensors=True,
        )
    except UNREADABLE as error:
        raise ModelError(model_problem(resolved.base, error)) from None
    if resolved.adapter is not None and with_adapter:
        model = put_adapter(model, resolved.adapter, device)
    tokenizer = load_tokenizer(reference)
    return LoadedModel(model.eval(), tokenizer, Chat(tokenizer), resolved, device)


def quiet_transformers() -> None:
    """Turns off the bars that transformers draws while it loads and saves; our own lines say what happens."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def torch_dtype(precision: Precision, device: str) -> Any:
    """The torch number format that `precision` means on `device`."""
    import torch

    fixed = {Precision.FP32: torch.float32, Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16}
    if precision in fixed:
        return fixed[precision]
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.float32


def put_adapter(model: Any, folder: Path, device: str) -> Any:
    """A PEFT model: the adapter in `folder` upon `model`.

    Raises:
        ModelError: if it is none in safetensors, does not fit, or holds something that the model has no place for.
    """
    from peft import PeftModel, set_peft_model_state_dict
    from safetensors.torch import load_file

    if not (folder / "adapter_model.safetensors").exists():
        raise ModelError(f"{folder}: has no adapter_model.safetensors (pickled adapters are not loaded)")
    try:
        adapted = PeftModel.from_pretrained(model, str(folder), torch_device=device)
        # Once more, for what it says: the first time PEFT only warns of what it left out.
        result = set_peft_model_state_dict(adapted, load_file(folder / "adapter_model.safetensors", device=device))
    except (ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder}: this adapter does not fit its base model: {error}") from None
    problem = f"{folder}: parts of this adapter were not loaded upon {type(model).__name__}"
    refuse_lost(result, adapted.peft_config["default"], problem)
    return adapted


def refuse_lost(result: Any, config: Any, problem: str) -> None:
    """Checks that an adapter's tensors and its places in a model are the same.

    Args:
        result: what PEFT says of an adapter that it loaded.
        config: the adapter's PEFT configuration.
        problem: what it means if something is left.

    Raises:
        ModelError: `problem`, with what was not loaded.
    """
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    if config.is_prompt_learning:  # learned tokens are loaded apart, whole or not at all
        return
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type]
    missing = [name for name in result.missing_keys if prefix in name or ".modules_to_save." in name]
    lost = sorted({_layer(name, prefix) for name in missing or result.unexpected_keys})
    if lost:
        raise ModelError(f"{problem} ({len(lost)}: {', '.join(lost[:4])}{', ...' if len(lost) > 4 else ''})")


def _layer(name: str, prefix: str) -> str:
    return name.partition(f".{prefix}")[0].removeprefix("base_model.model.")


def model_problem(source: str, error: Exception) -> str:
    """What keeps a model from loading, in words."""
    folder = Path(source)
    if (folder / "config.json").exists():
        if any(folder.glob("pytorch_model*.bin*")) and not any(folder.glob("*.safetensors")):
            return (
                f"{source}: holds its weights pickled (pytorch_model.bin), and pickled weights are not loaded, since "
                "they can run code; where you trust them, load the model once with transformers and save it with "
                "save_pretrained, which writes model.safetensors"
            )
        if model_json(folder / "config.json").get("is_encoder_decoder"):
            return (
                f"{source}: is an encoder and a decoder, no causal language model; give one that continues its text "
                "(its config.json names an architecture like LlamaForCausalLM)"
            )
    return _unreachable(source, "model", error)


def _unreachable(source: str, what: str, error: Exception) -> str:
    first = first_line(error)
    if Path(source).exists():
        return f"{source}: its {what} cannot be loaded: {first}"
    return (
        f"{source}: no {what} could be loaded under this name: {first} "
        "(Without network, give a local folder in Hugging Face layout.)"
    )

"""How large a model is: its parameters, told without loading its weights, and its bytes."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

from raytune_ft.core.errors import ModelError, first_line
from raytune_ft.models.references import resolve_model


def parameter_count(reference: str) -> int:
    """Parameters of a model's base: from the headers of its safetensors files, else counted on an empty model.

    Quantized weights are packed, so that there the configuration is what tells.

    Raises:
        ModelError: if `reference` leads to no causal language model.
    """
    base = resolve_model(reference).base
    folder = Path(base)
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if files:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not settings.get("quantization_config"):
            return sum(map(_header_count, files))
    return _empty_count(base)


def weight_bytes(model: Any) -> int:
    """Bytes of a loaded model's weights, tied ones counted once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def stored_bytes(folder: Path) -> int:
    """Bytes of the weight files in a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _header_count(file: Path) -> int:
    """Elements of all tensors of a safetensors file: 8 bytes say how long its JSON header is."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def _empty_count(base: str) -> int:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{base}: its parameters cannot be counted: {first_line(error)}") from None
    return int(model.num_parameters())

"""What is compressed: a full-precision folder or hub id, with an adapter merged in first."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytune_ft.core.errors import ModelError, first_line
from raytune_ft.models.adapters import merge_adapter
from raytune_ft.models.loading import UNREADABLE, model_problem
from raytune_ft.models.references import refuse_scorer, resolve_model


@dataclass(frozen=True)
class Source:
    """Full-precision weights: the folder or hub id that they lie in, and the torch dtype that the model is kept in."""

    path: str
    dtype: Any

    def load(self, *, device: str, **settings: Any) -> Any:
        """The model, through plain `from_pretrained`.

        Raises:
            ModelError: if it cannot be loaded.
        """
        from transformers import AutoModelForCausalLM

        try:
            return AutoModelForCausalLM.from_pretrained(
                self.path, dtype=self.dtype, device_map={"": device}, use_safetensors=True, **settings
            )
        except UNREADABLE as error:
            raise ModelError(model_problem(self.path, error)) from None


def refuse_quantized(reference: str) -> Any:
    """Checks that a model can be compressed at all, and returns its base's transformers configuration.

    Raises:
        ModelError: if it is not a model, gives scores and no text, or its weights (for an adapter: its base's) are
            quantized already.
    """
    from transformers import AutoConfig

    resolved = resolve_model(reference)
    refuse_scorer(resolved)
    base = resolved.base
    try:
        config = AutoConfig.from_pretrained(base)
    except UNREADABLE as error:
        raise ModelError(f"{base}: is not a model that transformers knows: {first_line(error)}") from None
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return config
    settings = quantization if isinstance(quantization, dict) else quantization.to_dict()
    raise ModelError(
        f"{reference}: is quantized already ({_named(settings)}); compression starts from full precision. "
        "Give the model that it was made from (its manifest names the parent)."
    )


@contextmanager
def full_precision(reference: str) -> Iterator[Source]:
    """The model in full precision; an adapter is merged (in fp32) into a scratch folder that lives as long as this.

    Raises:
        ModelError: as `refuse_quantized`, or if the adapter is of a kind that cannot be merged.
    """
    dtype = getattr(refuse_quantized(reference), "dtype", None) or "auto"
    resolved = resolve_model(reference)
    if resolved.adapter is None:
        yield Source(str(resolved.base), dtype)
        return
    with tempfile.TemporaryDirectory(prefix="raytune-ft-merge-") as scratch:
        merged = Path(scratch) / "merged"
        merge_adapter(reference, merged)
        yield Source(str(merged), dtype)


def _named(settings: dict[str, Any]) -> str:
    method = settings.get("quant_method", "unknown format")
    method = str(getattr(method, "value", method))
    if settings.get("load_in_4bit"):
        return f"{method}, 4 bits {settings.get('bnb_4bit_quant_type', '')}".rstrip()
    if settings.get("load_in_8bit"):
        return f"{method}, 8 bits"
    return method

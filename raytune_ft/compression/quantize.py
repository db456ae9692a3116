"""A model to fewer bits: linear layers through bitsandbytes or llm-compressor, everything else as it was.

The embeddings, the norms and the output head (`lm_head`) keep the precision that the source is stored in: they are
read once a token or decide every token's rank, and a head that is tied to the embeddings cannot be quantized alone.
"""

from __future__ import annotations

import json
import logging
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raytune_ft.compression import one_shot
from raytune_ft.compression.agreement import Agreement, compare, next_token_logits, text_ids
from raytune_ft.compression.calibration import calibration_rows
from raytune_ft.compression.config import QuantizationConfig, QuantizationMethod
from raytune_ft.compression.environment import quantizer_python
from raytune_ft.compression.prune import prunable, warn_of_experts
from raytune_ft.compression.source import full_precision
from raytune_ft.core.errors import ModelError, RunError, first_line
from raytune_ft.models.chat import Chat
from raytune_ft.models.config import Precision
from raytune_ft.models.loading import load_tokenizer
from raytune_ft.models.memory import is_out_of_memory
from raytune_ft.models.references import resolve_model
from raytune_ft.models.scoring import context_tokens
from raytune_ft.models.size import stored_bytes, weight_bytes

logger = logging.getLogger("raytune_ft")

_NO_EXPERTS = "A folder of this model is hardly smaller than its source"
_DTYPES = {Precision.FP32: torch.float32, Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16}


@dataclass(frozen=True)
class Quantized:
    """What quantization made: sizes of the weights in bytes, which layers, and how alike the models answer."""

    bytes_before: int
    bytes_after: int
    layers_quantized: int
    weights_quantized: int
    weights_kept: int
    agreement: Agreement
    calibration_tokens: int = 0


def write_quantized(reference: str, folder: Path, config: QuantizationConfig, *, device: str = "cpu") -> Quantized:
    """Writes a quantized copy of a model, with its tokenizer and chat template, that plain `transformers` loads.

    An adapter is merged in full precision first. The figures are measured on the folder as it is loaded back.

    Raises:
        ModelError: if the source is no model, is quantized already, has an adapter that cannot merge, or has no
            linear layer to quantize.
        DataError: if the calibration rows are none.
        RunError: if the quantized model's outputs are not finite, or llm-compressor fails.
    """
    if config.method is QuantizationMethod.COMPRESSED_TENSORS:
        return _by_one_shot(reference, folder, config, device)
    return _by_bitsandbytes(reference, folder, config, device)


def _by_one_shot(reference: str, folder: Path, config: QuantizationConfig, device: str) -> Quantized:
    """llm-compressor, as a program in its own environment."""
    from safetensors.torch import load_file

    python = quantizer_python()
    with full_precision(reference) as source, tempfile.TemporaryDirectory(prefix="raytune-ft-one-shot-") as scratch:
        place = Path(scratch)
        model = source.load(device=device)
        tokenizer = load_tokenizer(source.path)
        ids = text_ids(tokenizer, context_tokens(model))
        expected = next_token_logits(model, ids)
        warn_of_experts("quantize: compressed_tensors", model, prunable(model), _NO_EXPERTS)
        bytes_before, weights = weight_bytes(model), sum(parameter.numel() for parameter in model.parameters())
        rows = calibration_rows(config, Chat(tokenizer), context_tokens=context_tokens(model))
        warn_of_few(sum(map(len, rows)), model)
        del model
        (place / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
        arguments = {
            "model": str(resolve_model(source.path).base), "output": str(folder), "rows": str(place / "rows.json"),
            "scheme": "w8a8" if config.bits == 8 else "w4a16", "figures": str(place / "figures.json"), "ids": ids,
            "logits": str(place / "logits.safetensors"), "device": device,
        }  # fmt: skip
        (place / "arguments.json").write_text(json.dumps(arguments), encoding="utf-8")
        command = [str(python), str(Path(one_shot.__file__)), str(place / "arguments.json")]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            words = done.stderr.strip().splitlines()
            raise RunError(f"{reference}: llm-compressor failed: {words[-1] if words else 'without a word'}")
        tokenizer.save_pretrained(folder)
        figures = json.loads((place / "figures.json").read_text(encoding="utf-8"))
        got = load_file(place / "logits.safetensors")["logits"]
    if not torch.isfinite(got).all():
        raise RunError(f"{reference}: the quantized model's outputs are not finite: its weights are broken")
    return Quantized(
        bytes_before=bytes_before,
        bytes_after=stored_bytes(folder),
        layers_quantized=figures["layers_quantized"],
        weights_quantized=figures["weights_quantized"],
        weights_kept=weights - figures["weights_quantized"],
        agreement=compare(expected, got),
        calibration_tokens=sum(map(len, rows)),
    )


def warn_of_few(tokens: int, model: Any) -> None:
    """Says so where `model` has a layer with more inputs than there are `tokens`: GPTQ learns as many unknowns."""
    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    widest = max((layer.in_features for layer in layers), default=0)
    if tokens < widest:
        logger.warning(
            "quantize: %d tokens to calibrate with are fewer than the %d inputs of the widest layer, so much of it is "
            "rounded blindly; raise calibration_rows or calibration_tokens, or give longer rows",
            tokens,
            widest,
        )


def _by_bitsandbytes(reference: str, folder: Path, config: QuantizationConfig, device: str) -> Quantized:
    with full_precision(reference) as source:
        model = source.load(device=device)
        tokenizer = load_tokenizer(source.path)
        ids = text_ids(tokenizer, context_tokens(model))
        expected = next_token_logits(model, ids)
        warn_of_experts("quantize: bitsandbytes", model, prunable(model), _NO_EXPERTS)
        bytes_before = weight_bytes(model)
        settings = _bitsandbytes(config, head=head_names(model), dtype=model.dtype)
        del model
        model = source.load(device=device, quantization_config=settings)
    layers = _quantized_layers(model)
    _say_what_stays(reference, model, layers)
    kept = {id(p): p.numel() for p in model.parameters()}
    for layer in layers:
        kept.pop(id(layer.weight), None)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".quantized-", dir=folder) as scratch:
        # Saved before its first forward pass: some CPUs repack 4-bit weights then, into a layout for this machine only.
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        del model
        got = _answers(reference, scratch, ids, device)
        for path in Path(scratch).iterdir():
            path.replace(folder / path.name)
    return Quantized(
        bytes_before=bytes_before,
        bytes_after=stored_bytes(folder),
        layers_quantized=len(layers),
        weights_quantized=sum(layer.in_features * layer.out_features for layer in layers),
        weights_kept=sum(kept.values()),
        agreement=compare(expected, got),
    )


def _answers(reference: str, folder: str, ids: list[int], device: str) -> torch.Tensor:
    """What the saved model says of `ids`.

    Raises:
        ModelError: naming the layer that bitsandbytes cannot compute, or that the model cannot be loaded back.
    """
    from transformers import AutoModelForCausalLM

    other = "take method: compressed_tensors, which has kernels of its own, or quantize on another device"
    entered: list[str] = []
    try:
        loaded = AutoModelForCausalLM.from_pretrained(folder, device_map={"": device})
        _note_layers(loaded, entered)
        return next_token_logits(loaded, ids)
    except (AssertionError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        what = f"cannot compute the quantized layer {entered[-1]}" if entered else "cannot load what it quantized"
        raise ModelError(
            f"{reference}: bitsandbytes {what} on this device ({first_line(error)}); nothing was written; {other}"
        ) from None


def _note_layers(model: Any, entered: list[str]) -> None:
    """Keeps the names of the quantized layers that are being computed in `entered`."""
    layers = {id(layer) for layer in _quantized_layers(model)}
    for name, module in model.named_modules():
        if id(module) in layers:
            module.register_forward_pre_hook(lambda *_, name=name: entered.append(name))
            module.register_forward_hook(lambda *_: entered.clear())


def _say_what_stays(reference: str, model: Any, layers: list[Any]) -> None:
    """Warns of linear layers besides the head that bitsandbytes left as they were.

    Raises:
        ModelError: if it converted none.
    """
    done = {id(layer) for layer in layers}
    stay = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and id(m) not in done]
    stay = [module for module in stay if module is not model.get_output_embeddings()]
    kinds = ", ".join(sorted({type(module).__name__ for module in stay}))
    if layers and stay:
        logger.warning(
            "quantize: bitsandbytes converts no layers of the class %s: %d of %d linear layers keep their precision",
            kinds,
            len(stay),
            len(stay) + len(layers),
        )
    elif stay:
        raise ModelError(
            f"{reference}: bitsandbytes converts none of its {len(stay)} linear layers besides the head: they are of "
            f"the class {kinds}, which it does not know; there is nothing to quantize"
        )
    elif not layers:
        raise ModelError(f"{reference}: has no linear layer besides its head; there is nothing to quantize")


def _bitsandbytes(config: QuantizationConfig, *, head: list[str], dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if config.bits == 8:
        return BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_threshold=config.llm_int8_threshold, llm_int8_skip_modules=head
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=config.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=_DTYPES.get(config.bnb_4bit_compute_dtype, dtype),
        llm_int8_skip_modules=head,
    )


def head_names(model: Any) -> list[str]:
    """Dotted names of the output head's module (`lm_head` in most models)."""
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if head is not None and module is head]


def _quantized_layers(model: Any) -> list[Any]:
    import bitsandbytes

    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    return [module for module in model.modules() if isinstance(module, kinds)]

"""A program of its own: quantizes a model with llm-compressor, in an environment that has it (`environment`).

``python one_shot.py ARGUMENTS.json``, with the folders ``model`` and ``output``, the ``scheme``, as ``rows`` a JSON
file of token ids to calibrate with, and ``ids`` whose logits by the finished model are written to ``logits``. Nothing
of this package is imported: the environment has other versions.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

_GROUPS = (128, 64, 32, 16)


def main(arguments: dict[str, Any]) -> None:
    """Quantizes, saves, and writes what was done to ``figures`` (JSON)."""
    import datasets
    import torch
    from llmcompressor import oneshot
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    rows = json.loads(Path(arguments["rows"]).read_text(encoding="utf-8"))
    device = arguments["device"]
    model = AutoModelForCausalLM.from_pretrained(arguments["model"], dtype="auto", use_safetensors=True).to(device)
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    head = model.get_output_embeddings()
    ignored = [name for name, module in linear if module is head]
    widths = {module.in_features for name, module in linear if name not in ignored}
    group = next((size for size in _GROUPS if not any(width % size for width in widths)), None)
    if arguments["scheme"] == "w4a16" and group is None:
        sys.exit(f"w4a16: no group of {', '.join(map(str, _GROUPS))} weights divides all layers' inputs ({widths})")
    dataset = datasets.Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    oneshot(
        model=model,
        dataset=dataset,
        recipe=_recipe(arguments["scheme"], group, ignored),
        max_seq_length=max(map(len, rows)),
        num_calibration_samples=len(rows),
    )
    chosen = [module for name, module in linear if name not in ignored]
    figures = {
        "layers_quantized": len(chosen),
        "weights_quantized": sum(module.in_features * module.out_features for module in chosen),
    }
    model.save_pretrained(arguments["output"], save_compressed=True)
    del model
    loaded = AutoModelForCausalLM.from_pretrained(arguments["output"], use_safetensors=True).to(device).eval()
    with torch.no_grad():
        logits = loaded(input_ids=torch.tensor([arguments["ids"]], device=device), use_cache=False).logits[0]
    save_file({"logits": logits.float().cpu().contiguous()}, arguments["logits"])
    Path(arguments["figures"]).write_text(json.dumps(figures), encoding="utf-8")


def _recipe(scheme: str, group: int | None, ignored: list[str]) -> Any:
    """GPTQ (Frantar et al., 2023): each weight is rounded so that the later ones make up for its error."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.quantization import GPTQModifier

    common = {"symmetric": True, "type": "int"}
    if scheme == "w8a8":
        weights = QuantizationArgs(num_bits=8, strategy="channel", **common)
        inputs = QuantizationArgs(num_bits=8, strategy="token", dynamic=True, **common)
        layers = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
    else:
        weights = QuantizationArgs(num_bits=4, strategy="group", group_size=group, **common)
        layers = QuantizationScheme(targets=["Linear"], weights=weights)
    return GPTQModifier(config_groups={"linear": layers}, ignore=ignored)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))

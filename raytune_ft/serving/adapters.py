"""The adapters that an engine can answer with: loaded and dropped by name, each counted while requests have it."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytune_ft.core.errors import ModelError
from raytune_ft.models.adapter_slots import AdapterSlots
from raytune_ft.models.adapters import PROMPT_METHODS, adapter_kind, adapter_weights, same_model
from raytune_ft.models.decoding import Prefix
from raytune_ft.models.loading import LoadedModel, ModelReference, resolve_model
from raytune_ft.models.virtual import VirtualTokens


@dataclass(eq=False)
class Adapter:
    """A loaded adapter: its slot (0 for virtual tokens, which have none), and how many requests hold it."""

    slot: int
    prefix: Prefix | None
    users: int = 0
    dropped: bool = False


class AdapterSet:
    """Adapters of one base: LoRA mixed in a batch, prompt and prefix tuning as prompts of their own.

    `add`, `drop` and `give_back` belong to the engine's loop; `take` may be called from anywhere.
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

    def add(self, name: str, reference: str) -> None:
        """Loads an adapter under a name that is free.

        Raises:
            ModelError: saying what does not fit, and what would.
        """
        if name in self._by_name:
            raise ModelError(f"adapter {name!r}: this name is taken; drop it first")
        if self._loaded.reference.adapter is not None:
            raise ModelError(
                f"adapter {name!r}: the served model is an adapter itself; give its base "
                f"({self._loaded.reference.base}) as model_path, and both as adapters"
            )
        resolved = resolve_model(reference)
        if resolved.adapter is None:
            raise ModelError(f"adapter {name!r}: {reference} is a whole model, not an adapter; serve it as model_path")
        if not _is_base(resolved, self._loaded.reference):
            raise ModelError(
                f"adapter {name!r}: {reference} belongs to the base {resolved.base}, but what is served is "
                f"{self._loaded.reference.given}; serve it upon its own base"
            )
        adapter = self._put(resolved)
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

    def _put(self, resolved: ModelReference) -> Adapter:
        assert resolved.adapter is not None
        if adapter_kind(resolved.adapter) in PROMPT_METHODS:
            return Adapter(0, _prefix(self._loaded.model, resolved.adapter))
        if not self._free:
            raise ModelError(
                f"{resolved.given}: {self._most} LoRA adapters are loaded, which is the limit; drop one, or raise "
                "max_adapters"
            )
        self.slots.load(self._free[-1], resolved.adapter)
        return Adapter(self._free.pop(), None)


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
    """Whether the served model is the adapter's base, or was made from it (quantized, pruned)."""
    if same_model(adapter.base, served.base):
        return True
    digest = resolve_model(adapter.base).digest
    return served.artifact is not None and any(parent.digest == digest for parent in served.artifact.manifest.parents)

"""Which trials of a sweep can share a base: one pack for each combination of what a base decides."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from raytune_ft.core.errors import ConfigError
from raytune_ft.training import matrix
from raytune_ft.training.config import FineTuningConfig
from raytune_ft.training.without_effect import idle_beside
from raytune_ft.tuning.space import Domain, extremes

SHARED = (
    *("method", "use_dora", "adapter_path", "gradient_checkpointing"),
    *("precision", "max_length", "bits", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant"),
    "use_liger_kernel",
)
"""Settings that all trials on one base have in common."""


@dataclass(frozen=True)
class Packs:
    """The packs of a sweep: the `keys` of `SHARED` that it searches, and the training settings of each by its name.

    `targets` are all values of `lora_target_modules` that its trials have.
    """

    keys: tuple[str, ...]
    settings: Mapping[str, FineTuningConfig]
    targets: tuple[list[str] | str, ...] = ()

    @classmethod
    def of(cls, space: Mapping[str, Domain], training: FineTuningConfig) -> Packs:
        """The packs of a space.

        Raises:
            ConfigError: if values of several keys do not go together.
        """
        keys = tuple(key for key in SHARED if key in space)
        found = {}
        for values in product(*(extremes(space[key]) for key in keys)):
            chosen = dict(zip(keys, values, strict=True))
            idle = idle_beside(dict(with_values(training, chosen)))
            chosen = {key: value for key, value in chosen.items() if key not in idle}
            found[name_of(keys, {**dict(training), **chosen})] = with_values(training, chosen)
        return cls(keys, found, tuple(extremes(space.get("lora_target_modules", [training.lora_target_modules]))))

    def apart(self) -> dict[str, str]:
        """The packs whose trials cannot share a base, by their names, and why."""
        found = {}
        for name, training in self.settings.items():
            reason = matrix.refusal(replace(training.cell, packed=True))
            if reason is None and training.adapter_path is not None:
                reason = "adapter_path: the trials of a pack start from fresh adapters"
            if reason is not None:
                found[name] = reason
        return found

    def without(self, names: Collection[str]) -> Packs:
        """The other packs."""
        left = {name: training for name, training in self.settings.items() if name not in names}
        return Packs(self.keys, left, self.targets)

    def lengths(self) -> list[int]:
        """The row lengths for which data is needed."""
        return sorted({training.max_length for training in self.settings.values()})


def with_values(training: FineTuningConfig, chosen: Mapping[str, Any]) -> FineTuningConfig:
    """The settings with some values of a space.

    Raises:
        ConfigError: naming the values, if they do not go together.
    """
    try:
        return training.with_overrides(**chosen)
    except ConfigError as error:
        said = str(error).removeprefix(f"{type(training).__name__}: ")
        raise ConfigError(f"space: {name_of(tuple(chosen), chosen)} do not go together: {said}") from None


def name_of(keys: tuple[str, ...], settings: Mapping[str, Any]) -> str:
    """The name of the pack of a trial with these settings."""
    return ", ".join(f"{key} {settings[key]}" for key in keys) or "all trials"

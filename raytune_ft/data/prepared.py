"""A prepared dataset as `datasets` users know it: splits by name, memory mapped, opened when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

from raytune_ft.core.artifacts import Artifact
from raytune_ft.data.config import SPLITS


class PreparedDataset(Mapping[str, Any]):
    """Split name -> `datasets.Dataset`, over a dataset artifact; splits without rows are not there."""

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self._opened: dict[str, Any] = {}

    @cached_property
    def files(self) -> dict[str, list[str]]:
        """The Parquet files of each split, in order, relative to the artifact."""
        names = sorted(name for name in self.artifact.manifest.files if name.endswith(".parquet"))
        found = {split: [name for name in names if name.startswith(f"{split}/")] for split in SPLITS}
        return {split: files for split, files in found.items() if files}

    @property
    def uris(self) -> dict[str, list[str]]:
        """The same files as URIs, which any process reads."""
        return {split: [(self.artifact / name).uri for name in names] for split, names in self.files.items()}

    def __getitem__(self, split: str) -> Any:
        if split not in self.files:
            raise KeyError(f"{split!r}: this dataset has {', '.join(self.files)}")
        if split not in self._opened:
            import datasets

            folder = self.artifact.local()
            files = [str(folder / name) for name in self.files[split]]
            datasets.disable_progress_bars()
            self._opened[split] = datasets.Dataset.from_parquet(files, split=split)
            datasets.enable_progress_bars()
        return self._opened[split]

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def __repr__(self) -> str:
        rows = ", ".join(f"{split}: {self.artifact.numbers[f'rows_{split}']} rows" for split in self)
        return f"PreparedDataset({rows} at {self.artifact.location})"

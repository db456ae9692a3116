"""Datasets of the Hugging Face hub as sources: ``hf:org/name[:config][@split]``, streamed on the workers in shards.

Without ``@split`` it is the split ``train``; the other splits are read only when they are named.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytune_ft.core.errors import DataError
from raytune_ft.core.refusals import storage_errors

logger = logging.getLogger("raytune_ft")

SCHEME = "hf:"
_SOURCE = re.compile(
    r"hf:(?P<path>[^:@#]+)(?::(?P<config>[^:@#]+))?(?:@(?P<split>[^#@]+))?(?:#(?P<shard>\d+)-of-(?P<of>\d+))?"
)


@dataclass(frozen=True)
class HubSource:
    """A dataset of the hub (or a folder laid out like one), one of its splits, and which of its shards."""

    path: str
    config: str | None = None
    split: str = "train"
    shard: int = 0
    shards: int = 1

    @classmethod
    def parse(cls, text: str) -> HubSource:
        """The source that ``hf:org/name[:config][@split]`` names.

        Raises:
            DataError: if it is not of that form.
        """
        match = _SOURCE.fullmatch(text)
        if match is None:
            raise DataError(f"{text}: expected hf:org/name[:config][@split], for example hf:openai/gsm8k:main@train")
        shards = {"shard": int(match["shard"]), "shards": int(match["of"])} if match["shard"] else {}
        return cls(_nearby(match["path"]), match["config"], match["split"] or "train", **shards)

    def __str__(self) -> str:
        config = f":{self.config}" if self.config else ""
        return f"{SCHEME}{self.path}{config}@{self.split}"

    def part(self, number: int, count: int) -> str:
        """This source as text that names one of its `count` shards."""
        return f"{self}#{number}-of-{count}"


def _nearby(path: str) -> str:
    """As `datasets` does, a folder of that name comes before the hub; absolute, so that workers find the same."""
    folder = Path(path).expanduser()
    return str(folder.absolute()) if folder.is_dir() else path


def parts_of(source: str) -> list[str]:
    """The shards of a source, each as text; reads the names of its files, and no row.

    Raises:
        DataError: if the dataset cannot be reached, or has no such configuration or split.
    """
    wanted = HubSource.parse(source)
    count = int(_stream(wanted, _builder(wanted)).num_shards)
    return [wanted.part(number, count) for number in range(count)]


def content_of(source: str) -> str:
    """What changes when the files of the dataset do: their commit (of a local folder: names and times), as text."""
    wanted = HubSource.parse(source)
    builder = _builder(wanted)
    files = builder.config.data_files or {}
    origins = {str(split): getattr(found, "origin_metadata", None) for split, found in files.items()}
    return json.dumps([str(wanted), builder.hash, origins], default=str, sort_keys=True)


def hub_rows(source: str) -> Iterator[dict[str, Any]]:
    """The rows of one shard, in order, as they come.

    Raises:
        DataError: if they cannot be read.
    """
    wanted = HubSource.parse(source)
    rows = _stream(wanted, _builder(wanted))
    if wanted.shards > 1:
        rows = rows.shard(wanted.shards, wanted.shard)
    try:
        yield from rows
    except _errors() as error:
        raise DataError(f"{source}: cannot be read: {_first_line(error)}") from None


def _builder(source: HubSource) -> Any:
    import datasets

    for name in ("datasets", "huggingface_hub"):  # a line for each of its retries, else
        logging.getLogger(name).setLevel(logging.ERROR)
    logger.debug("%s: looking up its files", source)
    try:
        return datasets.load_dataset_builder(source.path, source.config)
    except ConnectionError as error:
        raise DataError(
            f"{source}: the Hugging Face hub cannot be reached ({_first_line(error)}). Without a network, put the "
            f"dataset's files into a folder named {source.path} below the working directory, or on a machine with a "
            "network run `datasets.load_dataset(...).save_to_disk(FOLDER)` and give FOLDER as the source"
        ) from None
    except _errors() as error:
        raise DataError(f"{source}: cannot be opened as a dataset: {_first_line(error)}") from None


def _stream(source: HubSource, builder: Any) -> Any:
    try:
        splits = builder.as_streaming_dataset()
    except _errors() as error:
        raise DataError(f"{source}: cannot be opened as a dataset: {_first_line(error)}") from None
    if source.split not in splits:
        raise DataError(f"{source}: has no split {source.split!r}; name one of {', '.join(splits)} behind an @")
    return splits[source.split]


def _errors() -> tuple[type[BaseException], ...]:
    return (*storage_errors(), ValueError, RuntimeError)


def _first_line(error: BaseException) -> str:
    lines = " ".join(str(error).split())
    return lines[:300] or type(error).__name__

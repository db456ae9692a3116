"""Safetensors files written as a stream and read by ranges, on every storage alike: no copy on a scratch disk.

The safetensors library writes to and maps local files only. The format is eight bytes with the header's length, a JSON
header (type, shape and place of every tensor, and strings of ours under ``__metadata__``), and the values.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raytune_ft.core.storage import Location

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.uint8: "U8",
}
_TYPES = {name: dtype for dtype, name in _NAMES.items()}
_METADATA = "__metadata__"


@dataclass(frozen=True)
class Written:
    """What was written: bytes, and their sha256."""

    size: int
    sha256: str


def write_tensors(where: Location, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Written:
    """Writes tensors of this machine's memory as one file, synced to the disk where it is a local one.

    Raises:
        OSError: if the storage takes no more.
    """
    header: dict[str, Any] = {_METADATA: dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    hasher, size = hashlib.sha256(), 0
    with _sink(where) as stream:
        for piece in (len(text).to_bytes(8, "little"), text, *map(_bytes, tensors.values())):
            stream.write(piece)
            hasher.update(piece)
            size += len(piece)
    return Written(size, hasher.hexdigest())


def _bytes(tensor: Tensor) -> Any:
    flat = tensor.contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""


@contextmanager
def _sink(where: Location) -> Iterator[Any]:
    if not where.is_local:
        with where.filesystem.open_output_stream(where.path) as stream:
            yield stream
        return
    path = Path(where.path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


class TensorFile:
    """The tensors of one file, of which only the values that are asked for are read; the file stays open."""

    def __init__(self, where: Location) -> None:
        self._stream = where.filesystem.open_input_file(where.path)
        length = int.from_bytes(self._stream.read_at(8, 0), "little")
        header = json.loads(self._stream.read_at(length, 8))
        self.metadata: dict[str, str] = header.pop(_METADATA, {})
        self._header, self._start = header, 8 + length

    def count(self, name: str) -> int:
        """Number of a tensor's values."""
        return math.prod(self._header[name]["shape"])

    def read(self, name: str, start: int, count: int) -> Tensor:
        """Values `start` to `start + count` of the flattened tensor.

        Raises:
            KeyError: if there is no such tensor.
        """
        entry = self._header[name]
        dtype = _TYPES[entry["dtype"]]
        if not count:
            return torch.empty(0, dtype=dtype)
        first = self._start + entry["data_offsets"][0] + start * dtype.itemsize
        return torch.frombuffer(bytearray(self._stream.read_at(count * dtype.itemsize, first)), dtype=dtype)

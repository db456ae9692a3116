"""TensorBoard's event file, written by whoever logs: records of a length, its checksum, an event and its checksum.

tensorboardX leaves the writing to a thread behind a short queue; a full disk ends that thread, and the next steps wait
for room in the queue for ever.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any


class EventFile:
    """A new event file in a folder; every row is in it, whole, when `add` returns."""

    def __init__(self, folder: Path) -> None:
        """Begins the file, and makes the folder if need be.

        Raises:
            OSError: if that cannot be.
        """
        from tensorboardX.proto.event_pb2 import Event

        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
        self._file = (folder / name).open("wb", buffering=0)
        self._append(_framed(Event(wall_time=time.time(), file_version="brain.Event:2")))

    def add(self, scalars: Mapping[str, float], step: int) -> None:
        """Adds the metrics of a step, all of them or, if they cannot be written, none.

        Raises:
            OSError: if they cannot.
        """
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        now = time.time()
        events = (Event(wall_time=now, step=step, summary=scalar(key, value)) for key, value in scalars.items())
        self._append(b"".join(map(_framed, events)))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _append(self, records: bytes) -> None:
        before, left = self._file.tell(), memoryview(records)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError:
            self._file.seek(before)
            with suppress(OSError):  # which says less than why they could not be written
                os.ftruncate(self._file.fileno(), before)  # readers end at half a record
            raise


def _framed(event: Any) -> bytes:
    from tensorboardX.record_writer import masked_crc32c

    data: bytes = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))

"""Files of object stores as training reads them: copied once into this machine's cache, for all of its workers."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

from raytune_ft.core.digest import short_hash
from raytune_ft.core.errors import ArtifactError
from raytune_ft.core.refusals import storage_errors, storage_reason
from raytune_ft.core.storage import Location, cache_folder

_IDLE_S = 3 * 24 * 3600


def local_copy(file: str) -> str:
    """The path of a file on this machine: its own, or that of a copy in the machine's cache, which is made once.

    Copies that nothing has opened for three days go when another is made.

    Raises:
        ArtifactError: if the file cannot be read.
    """
    where = Location.at(file)
    if where.is_local:
        return where.path
    if not where.is_file():
        raise ArtifactError(f"{where}: there is no such file")
    try:
        info = where.filesystem.get_file_info(where.path)
        version = short_hash(f"{where.uri} {info.size} {info.mtime_ns}")
        copy = cache_folder() / "tokens" / version / where.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        with (copy.parent / ".lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one of this machine's workers fetches it, and the others wait
            os.utime(copy.parent)
            if not copy.exists():
                _delete_idle(copy.parent.parent)
                where.parent.download(copy.parent, [where.name])
    except storage_errors() as error:
        raise ArtifactError(f"{where}: {storage_reason(error)}") from None
    return str(copy)


def _delete_idle(folder: Path) -> None:
    for copy in folder.iterdir():
        with suppress(OSError):  # another process may delete it, too
            if time.time() - copy.stat().st_mtime > _IDLE_S:
                shutil.rmtree(copy)

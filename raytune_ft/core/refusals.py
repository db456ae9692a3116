"""What storage refuses, told in words: errors of the system, of pyarrow and of the libraries that write files.

Apart from `storage`, which reads and writes, because also what others wrote is refused so.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pyarrow as pa

from raytune_ft.core.errors import ArtifactError, RaytuneError, StorageError

if TYPE_CHECKING:
    from raytune_ft.core.storage import Location

_DENIED = re.compile(r"ACCESS_DENIED|INVALID_ACCESS_KEY|INVALID_CLIENT_TOKEN|SIGNATURE_DOES_NOT_MATCH|PERMISSION_DENIED"
                     r"|UNAUTHENTICATED|OAuth2 access token|HTTP status 40[13]|\b40[13], message")  # fmt: skip
_OF_STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES}
"""What the system says where a disk is full or may not be written to."""
_MENDS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "Make room there"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "Make it writable"),
}
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")
"""How libraries in Rust, such as safetensors, say the system's number of an error."""


def storage_errors() -> tuple[type[BaseException], ...]:
    """What reading from storage may raise: aiohttp, which fsspec asks web servers with, has errors of its own."""
    aiohttp = sys.modules.get("aiohttp")
    return (OSError, pa.ArrowInvalid, *((aiohttp.ClientError,) if aiohttp else ()))


def storage_reason(error: BaseException) -> str:
    """What storage said, in one line."""
    text = " ".join(str(error).split())
    if isinstance(error, PermissionError) or _DENIED.search(text):
        return "no permission to read or write here; check the rights, and the credentials that this machine gives"
    return f"the storage refused: {text[:300] or type(error).__name__}"


def not_stored(error: BaseException | None) -> Exception | None:
    """What storage did not take, out of what Ray wraps around it; None if the error is another one."""
    cause = getattr(error, "cause", None) or error
    if not isinstance(cause, Exception) or (isinstance(cause, RaytuneError) and not isinstance(cause, StorageError)):
        return None
    # Where another error tells of a file that may not be opened, it may be one to read.
    known = _OF_STORAGE if isinstance(cause, OSError) else _OF_STORAGE - {errno.EACCES}
    return cause if system_number(cause) in known else None


def system_number(error: BaseException) -> int:
    """The system's number of an error; 0 if it has none."""
    if isinstance(error, OSError):
        return error.errno or 0
    if isinstance(error, StorageError):
        return error.number
    said = _RUST_ERROR.search(str(error))
    return int(said[1]) if said else 0


def refused(where: str | os.PathLike[str] | Location, error: Exception, then: str = "") -> ArtifactError:
    """What the system did not let us write at a place, in words; of a file that lies elsewhere, its own name.

    Args:
        where: the place.
        error: what the system said.
        then: a sentence on what the same command does once that is mended.
    """
    denied = error.filename if isinstance(error, PermissionError) else None
    told = str(error) if isinstance(error, StorageError) else f"{denied or where}: {storage_reason(error)}"
    mend = _MENDS.get(system_number(error), "Mend that")
    return ArtifactError(f"{told}. {mend}, or choose another folder.{then and ' ' + then}")


@contextmanager
def told_in_words(where: str | os.PathLike[str] | Location, then: str = "") -> Iterator[None]:
    """Within the block, what the system does not let us write is refused in words.

    Raises:
        ArtifactError: as `refused` makes it, with the sentence `then`.
    """
    try:
        yield
    except OSError as error:
        raise refused(where, error, then) from error

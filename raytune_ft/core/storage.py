"""Where things lie: one name for local paths and object stores, through pyarrow's file systems.

Apart from `artifacts` because sources, models and logs lie on storage, too, without being artifacts.
"""

from __future__ import annotations

import hashlib
import io
import os
import posixpath
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, unquote

import pyarrow as pa
from pyarrow import fs

from raytune_ft.core.config import masked
from raytune_ft.core.digest import short_hash
from raytune_ft.core.errors import ArtifactError, DataError, StorageError
from raytune_ft.core.grammar import more
from raytune_ft.core.refusals import storage_errors, storage_reason, system_number
from raytune_ft.core.s3 import Proxied, open_s3
from raytune_ft.core.web import open_web

_CHUNK = 1 << 22
_WEB = ("http://", "https://")
_IN_URI = "/:@!$&'()*+,;=-._~"
"""Signs that stand for themselves in the path of a URI."""
_LONE_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
_GCS_RETRY_S = 30
"""Else pyarrow retries for 15 minutes what can never succeed, such as a call without credentials."""


@dataclass(frozen=True)
class Location:
    """A folder or file on any storage that pyarrow knows: a local path or a URI.

    Bytes are moved as they are: pyarrow, unasked, packs and unpacks files named ``.gz``.
    """

    uri: str

    @classmethod
    def at(cls, where: str | os.PathLike[str] | Location) -> Location:
        """The location of a path, a URI or a location; local paths become absolute.

        Raises:
            ArtifactError: if it is empty, which as a path would be the current folder.
        """
        if isinstance(where, Location):
            return where
        text = os.fspath(where)
        if not text:
            raise ArtifactError("a path is empty; name a file or folder (the current folder is .)")
        if text.startswith("file://"):
            text = text.removeprefix("file://")
        if "://" not in text:
            return cls(str(Path(text).expanduser().absolute()))
        text = text.rstrip("/")
        if text.startswith(_WEB):
            return cls(text)
        return cls(_LONE_PERCENT.sub("%25", quote(text, safe=_IN_URI + "%?")))

    def __truediv__(self, name: str) -> Location:
        base, query = self._parts
        return Location(posixpath.join(base, quote(name, safe=_IN_URI) if self._is_quoted else name) + query)

    def __str__(self) -> str:
        return self._shown

    @cached_property
    def _shown(self) -> str:
        base, _ = self._parts
        plain = unquote(base) if self._is_quoted else base
        return str(masked(plain if Location.at(plain).uri == base else base))  # a string that leads here again

    @property
    def _parts(self) -> tuple[str, str]:
        """What is before the options of a URI, and these, with their ``?``."""
        base, question, query = (self.uri, "", "") if self.is_local else self.uri.partition("?")
        return base, question + query

    @property
    def _is_quoted(self) -> bool:
        """Whether names stand in `uri` as URIs have it (``%20`` for a blank), which pyarrow reads; on the web they are
        what a server makes of them."""
        return not self.is_local and not self.uri.startswith(_WEB)

    @property
    def is_local(self) -> bool:
        """Whether this is a path of a file system that this machine has mounted."""
        return "://" not in self.uri

    @property
    def name(self) -> str:
        """The last part of the path."""
        name = posixpath.basename(self._parts[0])
        return unquote(name) if self._is_quoted else name

    @property
    def parent(self) -> Location:
        """The folder that this lies in."""
        base, query = self._parts
        return Location(posixpath.dirname(base) + query)

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        if self.is_local:
            return fs.LocalFileSystem(), self.uri
        try:
            if self.uri.startswith(_WEB):
                return open_web(self.uri)
            if self.uri.startswith("s3://"):
                return open_s3(self._with_options())
            return fs.FileSystem.from_uri(self._with_options())  # type: ignore[no-any-return]
        except (pa.ArrowInvalid, OSError) as error:
            raise ArtifactError(f"{self}: this storage cannot be opened ({masked(str(error))})") from None

    def _with_options(self) -> str:
        """On S3 a small object is then one request, not a multipart upload of three; Google's retries have an end."""
        options = {"s3": "allow_delayed_open=true", "gs": f"retry_limit_seconds={_GCS_RETRY_S}"}
        option = options.get(self.uri.partition("://")[0])
        if option is None or option.partition("=")[0] in self.uri:
            return self.uri
        return self.uri + ("&" if "?" in self.uri else "?") + option

    @property
    def filesystem(self) -> Any:
        """The pyarrow file system."""
        return self._opened[0]

    @property
    def path(self) -> str:
        """The path inside `filesystem`."""
        return self._opened[1]

    @property
    def for_ray(self) -> tuple[str, Any]:
        """Path and file system as Ray takes them; without the second it reads a URI itself, and asks no proxy."""
        return (self.path, self.filesystem) if isinstance(self.filesystem, Proxied) else (self.uri, None)

    @property
    def _has_no_folders(self) -> bool:
        """On Google's storage pyarrow lists and deletes only folders that somebody put an object for, as we do not."""
        return bool(self.filesystem.type_name == "gcs")

    def exists(self) -> bool:
        """Whether a file or folder is here."""
        return bool(self._info().type != fs.FileType.NotFound)

    def is_file(self) -> bool:
        """Whether a file is here."""
        return bool(self._info().type == fs.FileType.File)

    def size(self) -> int:
        """Size of the file here, in bytes; -1 where a web server does not say."""
        size = self._info().size
        return -1 if size is None else int(size)

    def files(self) -> dict[str, int]:
        """Relative path and size in bytes of every file below this folder, sorted; empty if there is no folder."""
        selector = fs.FileSelector(self.path, recursive=True, allow_not_found=True)
        found = self._reach(lambda: self.filesystem.get_file_info(selector))
        root = self.path.rstrip("/") + "/"
        return dict(sorted((i.path.removeprefix(root), i.size) for i in found if i.type == fs.FileType.File))

    def broken_links(self) -> list[str]:
        """Relative path of every link below this folder that leads to nothing, sorted: `files` leaves them out."""
        seen, found = set(), list[str]()
        for base, folders, files in os.walk(self.path, followlinks=True) if self.is_local else ():
            if (place := os.path.realpath(base)) in seen:
                folders.clear()
                continue
            seen.add(place)
            found += (os.path.relpath(Path(base, name), self.path) for name in files if not Path(base, name).exists())
        return sorted(found)

    def folders(self) -> list[str]:
        """Names of the folders directly in this one, sorted."""
        if self._has_no_folders:
            return sorted({name.partition("/")[0] for name in self.files() if "/" in name})
        selector = fs.FileSelector(self.path, allow_not_found=True)
        found = self._reach(lambda: self.filesystem.get_file_info(selector))
        return sorted(info.base_name for info in found if info.type == fs.FileType.Directory)

    def read(self) -> bytes:
        """The bytes of the file here.

        Raises:
            ArtifactError: if there is none, or it cannot be read.
        """

        def read() -> bytes:
            with self.filesystem.open_input_stream(self.path, compression=None) as stream:
                return bytes(stream.read())

        return bytes(self._reach(read))

    def lines(self, *, errors: str = "strict") -> Iterator[str]:
        """The lines (UTF-8, ending with a newline) of the file here, of which one at a time is in memory.

        Args:
            errors: what to do about bytes that are no UTF-8, as `bytes.decode` has it.

        Raises:
            ArtifactError: if there is no file, or it cannot be read.
            UnicodeDecodeError: if a line is no UTF-8 and `errors` is strict.
        """

        def opened() -> Any:  # buffered: else each 8 KiB would be a request
            return self.filesystem.open_input_stream(self.path, compression=None, buffer_size=_CHUNK)

        stream = self._reach(opened)
        with stream, io.TextIOWrapper(stream, encoding="utf-8", errors=errors, newline="\n") as text:
            while line := self._reach(text.readline):
                yield line

    def write(self, content: bytes) -> None:
        """Puts a file here in one piece, also for those who read meanwhile; synced to the disk where it is local."""
        if self.is_local:
            with whole_file(Path(self.path)) as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            return

        def put() -> None:
            with self.filesystem.open_output_stream(self.path, compression=None) as stream:
                stream.write(content)

        self._reach(put)

    def delete(self) -> None:
        """Removes the file or folder here; nothing happens if there is none."""
        info = self._info()
        if info.type == fs.FileType.File:
            self._reach(lambda: self.filesystem.delete_file(self.path))
        elif info.type == fs.FileType.Directory and self._has_no_folders:
            self._reach(lambda: self.filesystem.delete_dir_contents(self.path, missing_dir_ok=True))
        elif info.type == fs.FileType.Directory:
            self._reach(lambda: self.filesystem.delete_dir(self.path))

    def sha256(self) -> str:
        """The sha256 of the file here, read in chunks."""

        def digest() -> str:
            hasher = hashlib.sha256()
            with self.filesystem.open_input_stream(self.path, compression=None) as stream:
                while chunk := stream.read(_CHUNK):
                    hasher.update(chunk)
            return hasher.hexdigest()

        return str(self._reach(digest))

    def upload(self, folder: Path) -> None:
        """Copies every file below the local `folder` here, keeping relative paths."""
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            target = self / file.relative_to(folder).as_posix()
            if self.is_local:
                Path(target.path).parent.mkdir(parents=True, exist_ok=True)
            target._receive(file)

    def _receive(self, file: Path) -> None:
        def copy() -> None:
            with file.open("rb") as source, self.filesystem.open_output_stream(self.path, compression=None) as stream:
                while chunk := source.read(_CHUNK):
                    stream.write(chunk)

        self._reach(copy)

    def download(self, folder: Path, names: Iterable[str] | None = None) -> None:
        """Copies files below this folder (by default every one) to the local `folder`, keeping relative paths.

        Raises:
            ArtifactError: if a name leads out of `folder`, as the keys of an object store may; nothing is copied then.
        """
        chosen = list(self.files() if names is None else names)
        for name in chosen:
            if not (folder / name).resolve().is_relative_to(folder.resolve()):
                raise ArtifactError(f"{self}: holds a file named {name!r}, which leads out of the folder: not copied")
        for name in chosen:
            with (
                whole_file(folder / name) as file,
                self.filesystem.open_input_stream((self / name).path, compression=None) as stream,
            ):
                shutil.copyfileobj(stream, file, _CHUNK)

    def _info(self) -> Any:
        return self._reach(lambda: self.filesystem.get_file_info(self.path))

    def _reach(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except FileNotFoundError:
            raise ArtifactError(f"{self}: there is no such file or folder") from None
        except storage_errors() as error:
            raise StorageError(f"{self}: {storage_reason(error)}", system_number(error)) from None


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A local file to write, which nobody finds by its name before all of it is there, as on an object store."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        with partial.open("wb") as file:
            yield file
        partial.replace(path)
    except BaseException:
        with suppress(OSError):  # a disk that may not be written to
            partial.unlink(missing_ok=True)
        raise


def is_hidden(name: str) -> bool:
    """Whether a file, by its relative path, is or lies in what is no data by convention: ``.git``, ``_SUCCESS``."""
    return any(part.startswith((".", "_")) for part in name.split("/"))


def refuse_broken_links(folder: Location, names: Sequence[str]) -> None:
    """Refuses a folder with links that lead to nothing: what they led to would be missing without a word.

    Raises:
        DataError: if there are any `names`.
    """
    if names:
        listed = sorted(names)
        raise DataError(
            f"{folder}: holds links that lead nowhere: {', '.join(listed[:5])}{more(listed)}; put back what they lead "
            "to, or remove them"
        )


def source_digest(where: str | os.PathLike[str] | Location) -> str:
    """What identifies an input file: its sha256 up to 64 MiB, else its size and time of change; 16 hex digits."""
    location = Location.at(where)
    info = location._info()
    if info.type == fs.FileType.File and info.size <= 64 << 20:
        return location.sha256()[:16]
    return short_hash(f"{info.size} {info.mtime_ns}")


def cache_folder() -> Path:
    """This machine's cache: ``$XDG_CACHE_HOME/raytune_ft``, by default ``~/.cache/raytune_ft``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "raytune_ft"

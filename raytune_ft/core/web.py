"""Files of web servers as a file system of pyarrow's."""

from __future__ import annotations

from email.utils import parsedate_to_datetime
from typing import Any

from pyarrow import fs


def open_web(uri: str) -> tuple[Any, str]:
    """The file system of an ``http://`` or ``https://`` address, and the path in it."""
    import fsspec

    # trust_env: the proxies that HTTP_PROXY, HTTPS_PROXY and NO_PROXY name
    return fs.PyFileSystem(_Http(fsspec.filesystem("http", client_kwargs={"trust_env": True}))), uri


class _Http(fs.FSSpecHandler):  # type: ignore[misc]
    """Files of a web server: fsspec's own reports every status but success as a missing file."""

    def get_file_info(self, paths: list[str]) -> list[Any]:
        return [self._info_of(path) for path in paths]

    def _info_of(self, path: str) -> Any:
        try:
            info = self.fs.info(path)
        except FileNotFoundError as error:
            status = getattr(error.__cause__, "status", None)
            if status in {404, 410}:
                return fs.FileInfo(path, fs.FileType.NotFound)
            if error.__cause__ is None:
                raise
            raise (PermissionError if status in {401, 403} else OSError)(str(error.__cause__)) from None
        changed = info.get("Last-Modified")
        when = parsedate_to_datetime(changed) if changed else None
        return fs.FileInfo(path, fs.FileType.File, size=info["size"], mtime=when)

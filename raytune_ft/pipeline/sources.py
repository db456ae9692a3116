"""The data that ships with the package, put where every node of a cluster can read it."""

from __future__ import annotations

import difflib
from importlib import resources

from raytune_ft.core.errors import DataError
from raytune_ft.core.storage import Location

SCHEME = "quickstart:"


def placed(source: str, storage: Location) -> str:
    """A source as workers can read it: ``quickstart:NAME`` is copied below `storage`, others stay as they are.

    Raises:
        DataError: if no file of that name ships with the package.
    """
    if not source.startswith(SCHEME):
        return source
    name = source.removeprefix(SCHEME)
    folder = resources.files("raytune_ft.quickstart") / "data"
    shipped = sorted(file.name for file in folder.iterdir())
    if name not in shipped:
        near = difflib.get_close_matches(name, shipped, n=1) or shipped
        raise DataError(f"{source}: no such file ships with the package; did you mean {SCHEME}{near[0]}?")
    content = (folder / name).read_bytes()
    target = storage / "sources" / name
    if not target.is_file() or target.read() != content:
        target.write(content)
    return target.uri

"""Pages: HTML files that need nothing else, in which whatever models and data say stays text.

In core, as a file of its own, because most rooms leave one.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from functools import cache
from typing import Any


@cache
def template(name: str, **filters: Callable[[Any], str]) -> Any:
    """The template at a path in this package, such as ``evaluation/report.html.j2``; it may extend any other.

    Args:
        name: the path.
        filters: that it uses beside jinja's own.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("raytune_ft", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    return environment.get_template(name)


def image(svg: str) -> str:
    """An SVG document as the address of an image, so that nothing in it can run."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()

"""Servers for this machine alone: which addresses are its own, and which requests no other site's page can have made.

In core, as a file of its own, because two rooms listen so (the judging page, endpoints), and neither knows the other.
"""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit


def is_local(host: str) -> bool:
    """Whether an address is reached from this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def asked_by_own_name(host: str | None, origin: str | None, *, port: int | None = None) -> bool:
    """Whether a request names this machine, and no page of another site makes it in the browser of somebody here.

    Such a page is named by ``Origin``; where it has its own name lead to this machine (DNS rebinding), by ``Host``.

    Args:
        host: the header; None where there is none, which no browser leaves out.
        origin: the header; None where there is none, as of programs.
        port: what both have to name; None takes any, since tunnels and containers map it.
    """
    if origin is not None and not origin.startswith(("http://", "https://")):
        return False
    return all(_is_own(name, port) for name in (host, origin and origin.partition("://")[2]) if name is not None)


def _is_own(authority: str, port: int | None) -> bool:
    try:
        parts = urlsplit(f"//{authority}")
        name, given = parts.hostname or "", parts.port
    except ValueError:
        return False
    own = is_local(name) or name.endswith(".localhost") or name in {"0.0.0.0", "::"}
    return own and (port is None or (given or 80) == port)

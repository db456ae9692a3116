"""The address of an endpoint: whether it can be listened on, its URL, and whether it serves."""

from __future__ import annotations

import errno
import socket
import time
import urllib.error
import urllib.request

from raytune_ft.core.errors import ServingError

_EVERY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def free_port(host: str, port: int) -> int:
    """`port`, or a free one for 0, after checking that it can be listened on.

    Raises:
        ServingError: naming the address, and how to choose another.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
            return int(probe.getsockname()[1])
    except socket.gaierror:
        raise ServingError(f"host: {host!r} is no address of this machine; 127.0.0.1 is this machine only") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ServingError(
                f"port {port} on {host} is in use by another program; choose another (port={port + 1}), or 0 for a "
                "free one"
            ) from None
        raise ServingError(f"{host}:{port} cannot be listened on: {error.strerror}; change host or port") from None


def wait_until_free(host: str, port: int, limit_s: float) -> None:
    """Returns when the port can be listened on again, or the time is over: a process that ends may hold it a moment."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        try:
            free_port(host, port)
        except ServingError:
            time.sleep(0.05)
        else:
            return


def root_url(host: str, port: int) -> str:
    """The URL that this machine reaches the endpoint by."""
    address = _EVERY_ADDRESS.get(host, host)
    return f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"


def wait_until_it_serves(root: str, limit_s: float) -> None:
    """Returns when the endpoint lists its models.

    Raises:
        ServingError: if it does not within `limit_s`.
    """
    deadline = time.monotonic() + limit_s
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # this machine's own address needs no proxy
    while True:
        try:
            # What both engines answer; a 401 says that it is up, too, and asks who we are.
            with direct.open(f"{root}/v1/models", timeout=10) as response:
                if response.status == 200:
                    return
        except urllib.error.HTTPError as error:
            if error.code == 401:
                return
        except (urllib.error.URLError, OSError) as error:
            if time.monotonic() > deadline:
                raise ServingError(f"{root} does not answer after {limit_s:g} seconds: {error}") from None
        if time.monotonic() > deadline:
            raise ServingError(f"{root} does not serve the model after {limit_s:g} seconds")
        time.sleep(0.05)

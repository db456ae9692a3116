"""S3 through the proxies that the environment names, as the web is reached: pyarrow's client asks none of itself.

Apart from `storage` because only what a URI means to S3 (endpoint, region) tells which host is asked.
"""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from pyarrow import fs

from raytune_ft.core.config import masked

_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
"""Variables of the environment that name another server than Amazon's."""
_PORTS = {"http": 80, "https": 443}
_TIMEOUT_S = 20


def open_s3(uri: str) -> tuple[Any, str]:
    """File system and path of an S3 URI; HTTPS_PROXY, HTTP_PROXY and NO_PROXY say by which proxy it is reached, if any.

    Raises:
        OSError: if the proxy is none that S3 can be reached by, or the bucket's region is not known there.
        pyarrow.ArrowInvalid: if the URI is none of S3's.
    """
    if not urllib.request.getproxies().keys() & _PORTS.keys():
        return fs.FileSystem.from_uri(uri)  # type: ignore[no-any-return]
    bucket, options = urlsplit(uri).hostname or "", parse_qs(urlsplit(uri).query)
    is_amazons = "endpoint_override" not in options and not any(map(os.environ.get, _ENDPOINTS))
    proxy = _proxy_to("https", f"{bucket}.s3.amazonaws.com")
    told = uri
    if is_amazons and proxy is not None and "region" not in options:  # pyarrow would ask for it without the proxy
        told += f"{'&' if '?' in uri else '?'}region={_region_of(bucket, proxy)}"
    opened, path = fs.FileSystem.from_uri(told)
    settings = opened.__reduce__()[1][0]  # as they are pickled: there is no other way to ask for them
    scheme, _, server = settings["endpoint_override"].rpartition("://")
    host = server.partition("/")[0] or f"{bucket}.s3.{settings['region']}.amazonaws.com"
    proxy = _proxy_to(scheme or settings["scheme"], host)
    return (opened if proxy is None else Proxied(uri, **{**settings, "proxy_options": _options(proxy)})), path


class Proxied(fs.S3FileSystem):  # type: ignore[misc]  # pyarrow's classes count as Any
    """S3 behind a proxy; sent elsewhere, it asks the proxy of the environment there, and takes no password along."""

    def __init__(self, uri: str, **settings: Any) -> None:
        super().__init__(**settings)
        self._uri = uri

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened, (self._uri,)


def _opened(uri: str) -> Any:
    return open_s3(uri)[0]


def _proxy_to(scheme: str, host: str) -> str | None:
    """The proxy by which the environment wants a host (``name`` or ``name:port``) to be reached; None without one."""
    proxy = urllib.request.getproxies().get(scheme)
    if not proxy or urllib.request.proxy_bypass(host):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def _options(proxy: str) -> dict[str, Any]:
    """A proxy as pyarrow has it."""
    url = urlsplit(proxy)
    try:
        port = url.port or _PORTS[url.scheme]
        if url.scheme not in _PORTS or not url.hostname:
            raise ValueError(url.scheme)
    except (KeyError, ValueError):
        raise OSError(
            f"the environment wants it reached by the proxy {masked(proxy)}, and only proxies of http://HOST:PORT and "
            "https://HOST:PORT can; name such a one in HTTPS_PROXY or HTTP_PROXY, or the host in NO_PROXY"
        ) from None
    return {
        **{"scheme": url.scheme, "host": url.hostname, "port": port},
        **{"username": unquote(url.username or ""), "password": unquote(url.password or "")},
    }


def _region_of(bucket: str, proxy: str) -> str:
    """The region of a bucket, which Amazon tells also those who may not read it."""
    asked = urllib.request.Request(f"https://{bucket}.s3.amazonaws.com", method="HEAD")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({"https": proxy}))
    try:
        with opener.open(asked, timeout=_TIMEOUT_S) as answer:
            headers = answer.headers
    except urllib.error.HTTPError as refused:
        headers = refused.headers
    except OSError as error:
        raise OSError(
            f"asked for its region, the proxy {masked(proxy)} gave no answer ({error}); say the region: "
            "s3://BUCKET/...?region=NAME"
        ) from None
    region = headers.get("x-amz-bucket-region")
    if region is None:
        raise OSError(f"Amazon knows no bucket {bucket}")
    return str(region)

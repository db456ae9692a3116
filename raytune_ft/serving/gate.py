"""Before every route: who may ask, how large a request may be, and the count of what was answered."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from raytune_ft.core.loopback import asked_by_own_name
from raytune_ft.serving.config import ServingConfig
from raytune_ft.serving.faults import GONE, ApiError
from raytune_ft.serving.keys import admits, known_by
from raytune_ft.serving.metrics import Metrics
from raytune_ft.serving.rates import Rates

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
_OPEN = {"/health", "/ready", "/playground"}
"""Paths that need no key, and any name will do: they tell nothing of what is served, and ask for nothing."""


_COUNTED = {"/v1/chat/completions", "/v1/completions"}
"""Paths whose requests are limited by key."""


class Gate:
    """ASGI middleware around the whole application."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], *, config: ServingConfig,
                 metrics: Metrics, rates: Rates) -> None:  # fmt: skip
        self._app, self._config, self._metrics, self._rates = app, config, metrics, rates
        self._for_this_machine = not (config.api_keys or config.allow_anyone)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request through, or answers it with what is wrong."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        scope.setdefault("state", {})
        started, status = 0, GONE  # until the answer's last piece is sent

        async def counted(message: MutableMapping[str, Any]) -> None:
            nonlocal started, status
            await send(message)
            if message["type"] == "http.response.start":
                started = message["status"]
            elif not message.get("more_body", False):
                status = started

        try:
            await self._answer(scope, receive, counted)
        except Exception as error:
            status = GONE if isinstance(error, ClientDisconnect) else 500
            raise
        finally:
            self._count(scope, status)
        return None

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._admit(scope)
            whole = await self._body(scope, receive)
        except ApiError as error:
            return await JSONResponse(error.body, error.status, headers=error.headers)(scope, receive, send)
        return await self._app(scope, whole, send)

    def _admit(self, scope: Scope) -> None:
        path = scope["path"]
        if self._for_this_machine and path not in _OPEN:
            self._refuse_other_sites(_header(scope, b"host"), _header(scope, b"origin"))
        header = _header(scope, b"authorization")
        if path.startswith("/admin/"):
            if not self._config.admin_keys:
                raise ApiError(403, "nobody may load adapters here: no admin_keys are set", kind="permission_error")
            if not admits(header, self._config.admin_keys):
                raise _unauthorized("an admin key")
            return
        if not self._config.api_keys or path in _OPEN or admits(header, self._config.admin_keys):
            return
        key = known_by(header, self._config.api_keys)
        if key is None:
            raise _unauthorized("an API key")
        if path in _COUNTED:
            self._rates.admit(key)

    def _refuse_other_sites(self, host: str | None, origin: str | None) -> None:
        if not asked_by_own_name(host, origin):
            raise ApiError(
                403, f"without api_keys this endpoint answers those who ask for localhost or {self._config.host}, and "
                f"no other site's pages (Host is {host!r:.200}, Origin {origin!r:.200}); behind a proxy that keeps "
                "the client's Host, set allow_anyone: true", kind="permission_error",
            )  # fmt: skip

    async def _body(self, scope: Scope, receive: Receive) -> Receive:
        """A `receive` that gives the whole body in one piece, which is read here up to the limit."""
        limit = int(self._config.max_request_mb * 1e6)
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if declared.isdigit() and int(declared) > limit:
            raise self._too_large()
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._config.request_timeout_s):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(GONE, "the body ended too early")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > limit:
                        raise self._too_large()
                    more = message.get("more_body", False)
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {self._config.request_timeout_s:g} seconds") from None
        body = b"".join(parts)
        pending: list[MutableMapping[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

        async def whole() -> MutableMapping[str, Any]:
            if pending:
                return pending.pop()
            try:
                return await receive()
            except Exception:  # noqa: BLE001 - Ray Serve's raises where the client went away, instead of saying so
                return {"type": "http.disconnect"}

        return whole

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the request is larger than {self._config.max_request_mb:g} MB", code="request_too_large")

    def _count(self, scope: Scope, status: int) -> None:
        """What a stream says of its end counts: it may be an error behind a 200, or read by a client that left then."""
        state = scope["state"]
        status = state.get("ended", status)
        route = getattr(scope.get("route"), "path", None) or "other"
        labels = (self._metrics.replica, state.get("model", ""), state.get("adapter", ""))
        self._metrics.requests.labels(*labels, route, str(status)).inc()
        if status == GONE:
            self._metrics.cancelled.labels(*labels).inc()


def _header(scope: Scope, wanted: bytes) -> str | None:
    return next((value.decode("latin-1") for name, value in scope["headers"] if name == wanted), None)


def _unauthorized(what: str) -> ApiError:
    return ApiError(
        401, f"{what} is needed: send it as 'Authorization: Bearer KEY'", kind="authentication_error",
        code="invalid_api_key",
    )  # fmt: skip

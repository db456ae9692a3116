"""Before every route: who may ask, how large a request may be, and the count of what was answered."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.responses import JSONResponse

from raytune_ft.serving.config import ServingConfig
from raytune_ft.serving.faults import ApiError
from raytune_ft.serving.keys import admits, known_by
from raytune_ft.serving.metrics import Metrics
from raytune_ft.serving.rates import Rates

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
_OPEN = {"/health", "/ready", "/playground"}
"""Paths that need no key: they tell nothing of what is served, and ask for nothing."""


_COUNTED = {"/v1/chat/completions", "/v1/completions"}
"""Paths whose requests are limited by key."""


class Gate:
    """ASGI middleware around the whole application."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], *, config: ServingConfig,
                 metrics: Metrics, rates: Rates) -> None:  # fmt: skip
        self._app, self._config, self._metrics, self._rates = app, config, metrics, rates

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request through, or answers it with what is wrong."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        scope.setdefault("state", {})
        statuses: list[int] = []

        async def counted(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])
            await send(message)

        try:
            self._admit(scope)
            whole = await self._body(scope, receive)
        except ApiError as error:
            await JSONResponse(error.body, error.status, headers=error.headers)(scope, receive, counted)
        else:
            await self._app(scope, whole, counted)
        finally:
            self._count(scope, statuses)
        return None

    def _admit(self, scope: Scope) -> None:
        path = scope["path"]
        header = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"authorization"), None)
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
                        raise ApiError(400, "the body ended too early")
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
            return pending.pop() if pending else await receive()

        return whole

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the request is larger than {self._config.max_request_mb:g} MB", code="request_too_large")

    def _count(self, scope: Scope, statuses: list[int]) -> None:
        state = scope["state"]
        route = getattr(scope.get("route"), "path", None) or "other"
        labels = (self._metrics.replica, state.get("model", ""), state.get("adapter", ""))
        if statuses:
            self._metrics.requests.labels(*labels, route, str(statuses[0])).inc()
        else:
            self._metrics.cancelled.labels(*labels).inc()


def _unauthorized(what: str) -> ApiError:
    return ApiError(
        401, f"{what} is needed: send it as 'Authorization: Bearer KEY'", kind="authentication_error",
        code="invalid_api_key",
    )  # fmt: skip

"""Errors that requests are answered with, in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

GONE = 499
"""The status of a request whose client went away."""


class ApiError(Exception):
    """A request that is answered with an HTTP error in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int = 1,
    ) -> None:
        super().__init__(_encodable(message))
        self.status, self.kind, self.code, self._retry_after_s = status, kind, code, retry_after_s
        self.param = _encodable(param) if param is not None else None

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body of the answer."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the answer: when to try again, or how to say who one is."""
        if self.status in {429, 503}:
            return {"Retry-After": str(self._retry_after_s)}
        return {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}


def validation_error(errors: Sequence[dict[str, Any]]) -> ApiError:
    """The 400 for a body that pydantic refused; what the client sent is not repeated."""
    first = errors[0]
    if first["type"] == "json_invalid":
        where = f" at character {first['loc'][-1]}" if isinstance(first["loc"][-1], int) else ""
        return ApiError(400, f"the body is not valid JSON{where}: {first.get('ctx', {}).get('error', first['msg'])}")
    # without the names of a union's members
    path = [str(part) for part in first["loc"] if part not in {"body", "str"} and "[" not in str(part)]
    param = ".".join(path) or None
    reason = str(first["msg"]).removeprefix("Value error, ")
    if param is None:
        no_object = first["type"] in {"missing", "model_attributes_type", "model_type", "dict_type"}
        return ApiError(400, "a JSON object is needed as the body" if no_object else reason)
    return ApiError(400, f"{param}: {reason[0].lower()}{reason[1:]}", param=param)


def _encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()

"""How often each key may ask: as often as the limit says in any sixty seconds (sliding window)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from time import monotonic

from raytune_ft.serving.faults import ApiError

_WINDOW_S = 60.0


class Rates:
    """The limit of one replica, for every key alike.

    The limit of the whole endpoint is shared out evenly, and each share rounded down: `replicas` of them, at most as
    many as the limit, together never let through more than it.
    """

    def __init__(self, per_minute: int | None, *, replicas: int = 1, clock: Callable[[], float] = monotonic) -> None:
        self._per_minute, self._clock = per_minute, clock
        self._admitted: dict[str, deque[float]] = {}
        """When the requests of each key were let through, within the window."""
        self.replicas = replicas

    def admit(self, key: str) -> None:
        """Counts a request of a key.

        Raises:
            ApiError: 429, with the seconds until the key may ask again.
        """
        if self._per_minute is None:
            return
        most = max(1, self._per_minute // self.replicas)
        now = self._clock()
        admitted = self._admitted.setdefault(key, deque())
        while admitted and now - admitted[0] >= _WINDOW_S:
            admitted.popleft()
        if len(admitted) >= most:
            wait_s = max(1, math.ceil(admitted[-most] + _WINDOW_S - now - 1e-9))
            raise ApiError(
                429, f"this key may ask {self._per_minute} times a minute; try again in {wait_s} seconds",
                kind="rate_limit_error", code="rate_limit_exceeded", retry_after_s=wait_s,
            )  # fmt: skip
        admitted.append(now)

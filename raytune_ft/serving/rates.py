"""How often each key may ask: a bucket of requests a key, refilled all the time (token bucket)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

from raytune_ft.serving.faults import ApiError


@dataclass
class _Bucket:
    left: float
    seen: float


class Rates:
    """The limit of one replica, for every key alike.

    The limit of the whole endpoint is shared out evenly: a replica lets through its share, `replicas` of them together
    never more than the limit.
    """

    def __init__(self, per_minute: int | None, *, clock: Callable[[], float] = monotonic) -> None:
        self._per_minute, self._clock = per_minute, clock
        self._buckets: dict[str, _Bucket] = {}
        self.replicas = 1

    def admit(self, key: str) -> None:
        """Counts a request of a key.

        Raises:
            ApiError: 429, with the seconds until the key may ask again.
        """
        if self._per_minute is None:
            return
        most = max(1.0, self._per_minute / self.replicas)
        per_second = self._per_minute / self.replicas / 60
        now = self._clock()
        bucket = self._buckets.setdefault(key, _Bucket(most, now))
        bucket.left = min(most, bucket.left + per_second * (now - bucket.seen))
        bucket.seen = now
        if bucket.left < 1:
            wait_s = math.ceil((1 - bucket.left) / per_second - 1e-9)
            raise ApiError(
                429, f"this key may ask {self._per_minute} times a minute; try again in {wait_s} seconds",
                kind="rate_limit_error", code="rate_limit_exceeded", retry_after_s=wait_s,
            )  # fmt: skip
        bucket.left -= 1

"""How often a key may ask."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import openai
import pytest

from raytune_ft.core.errors import ConfigError
from raytune_ft.serving.config import ServingConfig
from raytune_ft.serving.faults import ApiError
from raytune_ft.serving.keys import hashed
from raytune_ft.serving.rates import Rates


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_key_may_ask_its_share_in_any_minute():
    """6 a minute over two replicas: three at once, then none until the first is a minute old; by key."""
    clock = Clock()
    rates = Rates(6, clock=clock)
    rates.replicas = 2
    for _ in range(3):
        rates.admit("one")
    clock.now += 5
    with pytest.raises(ApiError, match="this key may ask 6 times a minute; try again in 55 seconds") as caught:
        rates.admit("one")
    assert (caught.value.status, caught.value.headers) == (429, {"Retry-After": "55"})
    rates.admit("other")
    clock.now += 55
    rates.admit("one")
    clock.now += 10
    rates.admit("one")
    rates.admit("one")
    with pytest.raises(ApiError, match="in 50 seconds"):
        rates.admit("one")


def test_no_minute_has_more_than_the_limit():
    """Asked ten times a second for two minutes: 60 in each, where a bucket refilled all the time let 119 through."""
    clock = Clock()
    rates = Rates(60, clock=clock)
    admitted = []
    for _ in range(1200):
        with suppress(ApiError):
            rates.admit("one")
            admitted.append(clock.now)
        clock.now += 0.1
    assert len(admitted) == 120
    assert all(later - first >= 60 - 1e-6 for first, later in zip(admitted, admitted[60:], strict=False))


def test_replicas_together_let_through_no_more_than_the_limit():
    shares = [Rates(7, replicas=3, clock=Clock()) for _ in range(3)]
    admitted = 0
    for rates in shares * 7:
        with suppress(ApiError):
            rates.admit("one")
            admitted += 1
    assert admitted == 6


def test_without_a_limit_nothing_is_counted():
    rates = Rates(None)
    for _ in range(10_000):
        rates.admit("one")


def test_a_limit_is_by_key_so_it_wants_keys():
    with pytest.raises(ConfigError, match="requests_per_minute: counts by key; set api_keys"):
        ServingConfig(model_path="m", requests_per_minute=5)


def test_a_limit_below_the_number_of_replicas_has_no_shares():
    keyed = {"model_path": "m", "api_keys": [hashed("a")], "num_replicas": 2, "max_replicas": 4}
    assert ServingConfig(**keyed, requests_per_minute=4).requests_per_minute == 4
    with pytest.raises(ConfigError, match=r"requests_per_minute: must be at least the number of replicas, 4, .*got 3"):
        ServingConfig(**keyed, requests_per_minute=3)


def test_a_key_that_asks_too_often_is_told_when_to_come_back_and_others_are_not_held_up(
    tiny_model: Path, serve_here: Any
):
    config = ServingConfig(
        model_path=str(tiny_model), name="tiny", requests_per_minute=2, api_keys=[hashed("a"), hashed("b")],
        admin_keys=[hashed("root")],
    )  # fmt: skip
    asked: dict[str, Any] = {"model": "tiny", "prompt": "red", "max_tokens": 1}
    with serve_here(config) as running:
        for _ in range(2):
            assert running.client("a").completions.create(**asked).choices
        with pytest.raises(openai.RateLimitError, match="this key may ask 2 times a minute") as caught:
            running.client("a").completions.create(**asked)
        assert 1 <= int(caught.value.response.headers["Retry-After"]) <= 60
        assert running.client("b").completions.create(**asked).choices
        assert list(running.client("a").models.list())
        for _ in range(3):
            assert running.client("root").completions.create(**asked).choices

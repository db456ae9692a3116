"""What serving settings accept."""

from __future__ import annotations

import pytest

from raytune_ft.core.errors import ConfigError
from raytune_ft.serving.config import ServingConfig


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("runs/tuned", "tuned"),
        ("runs/tuned/", "tuned"),
        ("org/model", "model"),
        ("starter:smollm2-135m", "smollm2-135m"),
        ("s3://bucket/run/tuned", "tuned"),
    ],
)
def test_the_served_name_is_the_last_part_of_the_path(path: str, name: str):
    assert ServingConfig(model_path=path).served_name == name


def test_a_given_name_counts():
    assert ServingConfig(model_path="runs/tuned", name="orders").served_name == "orders"


def test_only_this_machine_may_call_by_default():
    assert ServingConfig(model_path="m").host == "127.0.0.1"


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_that_is_none_is_refused(port: int):
    with pytest.raises(ConfigError, match="port: must be at"):
        ServingConfig(model_path="m", port=port)

"""What serving settings accept."""

from __future__ import annotations

import pytest

from raytune_ft.core.errors import ConfigError
from raytune_ft.serving.app import _scale
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


def test_replicas_scale_between_limits_only_where_that_is_asked_for():
    fixed = ServingConfig(model_path="m", num_replicas=2)
    assert (_scale(fixed), fixed.most_replicas) == ({"num_replicas": 2}, 2)
    scaled = ServingConfig(model_path="m", num_replicas=1, max_replicas=4, target_ongoing_requests=3)
    limits = {"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 3.0}
    assert (_scale(scaled), scaled.most_replicas) == ({"autoscaling_config": limits}, 4)
    with pytest.raises(ConfigError, match="max_replicas: must be at least num_replicas, 2"):
        ServingConfig(model_path="m", num_replicas=2, max_replicas=1)


@pytest.mark.parametrize("name", ["../a", "a/b", "", ".a", "a b"])
def test_an_adapters_name_is_never_a_path(name: str):
    with pytest.raises(ConfigError, match="is no name for an adapter"):
        ServingConfig(model_path="m", adapters={name: "somewhere"})


def test_records_are_appended_to_disks_only():
    with pytest.raises(ConfigError, match="object stores cannot append"):
        ServingConfig(model_path="m", feedback_path="s3://bucket/feedback")


@pytest.mark.parametrize(
    ("given", "words", "mended"),
    [
        ({"target_ongoing_requests": 2}, "no further replica is ever started", {"max_replicas": 2}),
        (
            {"num_replicas": 2, "max_replicas": 2, "target_ongoing_requests": 2},
            "no further replica is ever started",
            {"max_replicas": 3},
        ),
        ({"max_adapters": 2}, "no adapter is served", {"adapters": {"a": "x"}}),
        ({"max_lora_rank": 2}, "no adapter is served", {"adapters_path": "x", "admin_keys": ["0" * 64]}),
        ({"adapters_path": "x"}, "nobody may load adapters from there", {"admin_keys": ["0" * 64]}),
    ],
)
def test_a_setting_without_effect_is_refused(given: dict, words: str, mended: dict):
    name = list(given)[-1]
    with pytest.raises(ConfigError, match=f"ServingConfig: {name}: {words}"):
        ServingConfig(model_path="m", **given)
    assert ServingConfig(model_path="m", **{**given, **mended}).differs(name)

"""Who may ask: keys are known by their hash alone."""

from __future__ import annotations

import hashlib

import pytest
from typer.testing import CliRunner

from raytune_ft.cli import app
from raytune_ft.core.errors import ConfigError
from raytune_ft.core.loopback import is_local
from raytune_ft.serving.config import ServingConfig
from raytune_ft.serving.keys import admits, hashed, new_key


def test_a_key_is_admitted_by_its_hash_in_either_case_and_nothing_else():
    keys = [new_key(), new_key()]
    hashes = [hashed(keys[0]), hashed(keys[1]).upper()]
    assert hashes[0] == hashlib.sha256(keys[0].encode()).hexdigest()
    for key in keys:
        assert admits(f"Bearer {key}", hashes)
        assert admits(f"bearer  {key} ", hashes)
    for header in [
        None,
        "",
        "Bearer",
        "Bearer ",
        keys[0],
        f"Basic {keys[0]}",
        f"Bearer {keys[0]}x",
        f"Bearer {hashes[0]}",
    ]:
        assert not admits(header, hashes)
    assert not admits(f"Bearer {keys[0]}", [])
    assert not admits(None, [hashed("")])


def test_the_command_makes_a_key_and_its_hash():
    result = CliRunner().invoke(app, ["key"])
    key, digest = (line.split()[-1] for line in result.stdout.strip().splitlines())
    assert hashed(key) == digest
    assert ServingConfig(model_path="m", api_keys=[digest]).api_keys == (digest,)


def test_a_key_in_place_of_its_hash_is_refused_and_not_repeated():
    with pytest.raises(ConfigError, match="sha256 of a key, 64 hex digits; `raytune-ft key` makes both") as caught:
        ServingConfig(model_path="m", api_keys=["my-secret-key"])
    assert "my-secret-key" not in str(caught.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "gateway.example"])
def test_other_machines_are_let_in_only_with_keys_or_when_that_is_meant(host: str):
    assert not is_local(host)
    with pytest.raises(ConfigError, match=f"host: {host} lets other machines in, .*api_keys.*allow_anyone: true"):
        ServingConfig(model_path="m", host=host)
    assert ServingConfig(model_path="m", host=host, api_keys=["0" * 64]).host == host
    assert ServingConfig(model_path="m", host=host, allow_anyone=True).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.9.9.9"])
def test_this_machine_needs_no_key(host: str):
    assert is_local(host)
    assert ServingConfig(model_path="m", host=host).api_keys == ()

"""The cluster file: Ray's launcher takes it, it opens nothing, and its setup commands install a package that works."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

CHECKOUT = Path(__file__).parents[1]


@pytest.fixture
def settings():
    return yaml.safe_load((CHECKOUT / "cluster.yaml").read_text(encoding="utf-8"))


def test_rays_launcher_takes_the_file(settings):
    prepared = prepare_config(settings)
    validate_config(prepared)
    assert prepared["available_node_types"]["gpu"]["max_workers"] == 4


def test_every_node_type_says_what_it_brings(settings):
    types = settings["available_node_types"]
    assert {name: node["resources"] for name, node in types.items()} == {
        "head": {"CPU": 4, "GPU": 0},
        "gpu": {"CPU": 8, "GPU": 1},
    }
    assert types["gpu"]["min_workers"] == 0 < types["gpu"]["max_workers"] <= settings["max_workers"]
    assert settings["head_node_type"] == "head"


def test_nothing_is_open_to_the_world(settings):
    for node in settings["available_node_types"].values():
        assert node["node_config"]["SecurityGroupIds"]  # else Ray makes one that admits SSH from everywhere
    starts = [
        line for key in ("head", "worker") for line in settings[f"{key}_start_ray_commands"] if "ray start" in line
    ]
    assert len(starts) == 2 and all("RAY_AUTH_MODE=token" in line for line in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert "0.0.0.0" not in (CHECKOUT / "cluster.yaml").read_text(encoding="utf-8")
    assert settings["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"


def test_what_is_mounted_exists(settings):
    for source in settings["file_mounts"].values():
        assert source.startswith("~") or (CHECKOUT / source).exists(), source


def test_every_shell_command_is_valid_bash(settings):
    lists = [key for key in settings if key.endswith("_commands")]
    commands = [command for key in lists for command in settings[key]]
    assert len(lists) == 6 and len(commands) > 12
    for command in commands:
        subprocess.run(["bash", "-n", "-c", command], check=True)


@pytest.mark.soak  # downloads and installs everything once more; .ci/run runs it by its name
def test_the_setup_commands_make_a_working_environment(settings, tmp_path):
    for target, source in settings["file_mounts"].items():
        place = tmp_path / Path(target).relative_to("/home/ubuntu")
        place.parent.mkdir(parents=True, exist_ok=True)
        if source.startswith("~"):
            place.write_text("0" * 64)
        elif (CHECKOUT / source).is_dir():
            shutil.copytree(CHECKOUT / source, place, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(CHECKOUT / source, place)
    pip = {key: value for key, value in os.environ.items() if key.startswith("PIP_") or key.endswith("_proxy")}
    cache = os.environ.get("PIP_CACHE_DIR") or str(Path.home() / ".cache" / "pip")
    path = f"{sys.base_prefix}/bin:/usr/bin:/bin"
    clean = {**pip, "HOME": str(tmp_path), "PATH": path, "PIP_CACHE_DIR": cache}

    def run(command):
        done = subprocess.run(
            ["bash", "-c", command], env=clean, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    for key in ("setup_commands", "head_setup_commands", "worker_setup_commands"):
        for command in settings[key]:
            run(command)
    activate = 'source "$HOME/venv/bin/activate" && '
    assert run(f"{activate} which ray").strip() == str(tmp_path / "venv/bin/ray")
    assert run(f"{activate} RAY_AUTH_MODE=token ray --version").startswith("ray, version 2.")
    assert "missing" not in run(f"{activate} raytune-ft doctor --storage {tmp_path}")
    assert run(f"{activate} python -c 'import boto3, liger_kernel, raytune_ft; print(raytune_ft.__file__)'").startswith(
        str(tmp_path)
    )

"""The scripts of jobs/ and every shipped settings file: thin, loadable, and light enough to upload."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package

from raytune_ft.cli import VERBS
from raytune_ft.core.config import load_config

CHECKOUT = Path(__file__).parents[2]
BENCHMARKS = sorted((CHECKOUT / "jobs").glob("bench_*.py"))
SCRIPTS = sorted(set((CHECKOUT / "jobs").glob("*.py")) - set(BENCHMARKS))
SETTINGS = sorted((CHECKOUT / "jobs" / "configs").glob("*.yaml"))
QUICKSTART = sorted((CHECKOUT / "raytune_ft" / "quickstart").glob("*.yaml"))


def name(path):
    return path.stem


def run_script(script, *arguments, folder):
    environment = {key: value for key, value in os.environ.items() if key not in {"PYTHONPATH", "RAY_ADDRESS"}}
    return subprocess.run(
        [sys.executable, script, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_every_verb_has_a_script_and_a_settings_file():
    assert {path.stem for path in SCRIPTS} == set(VERBS)
    assert {path.stem for path in SETTINGS} == set(VERBS) | {"continual"}  # a further round is a pipeline


@pytest.mark.parametrize("path", SETTINGS, ids=name)
def test_a_shipped_settings_file_loads_and_opens_with_its_command(path):
    verb = "pipeline" if path.stem == "continual" else path.stem
    load_config(VERBS[verb].load_config_class(), path)
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first == f"# raytune-ft {verb} jobs/configs/{path.name}"


@pytest.mark.parametrize("path", QUICKSTART, ids=name)
def test_the_quickstart_loads_and_opens_with_its_command(path):
    load_config(VERBS["pipeline"].load_config_class(), path)
    assert path.read_text(encoding="utf-8").startswith("# raytune-ft quickstart\n")


@pytest.mark.parametrize("script", SCRIPTS, ids=name)
def test_a_script_is_thin(script):
    source = script.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 40
    assert not [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.For | ast.While)]
    assert "torch" not in source


@pytest.mark.parametrize("script", SCRIPTS, ids=name)
def test_a_script_tells_the_users_mistake_from_any_folder(script, tmp_path):
    done = run_script(script, "none.yaml", folder=tmp_path)
    assert (done.returncode, done.stderr) == (2, "raytune-ft: none.yaml: there is no such settings file\n")
    done = run_script(script, folder=tmp_path)
    assert done.returncode == 2 and "CONFIG.yaml" in done.stderr


@pytest.mark.parametrize("script", [path for path in BENCHMARKS if path.stem != "bench_machine"], ids=name)
def test_a_benchmark_says_how_it_is_run_and_can_measure_a_busy_machine_only_when_told(script, tmp_path):
    done = run_script(script, "--help", folder=tmp_path)
    assert done.returncode == 0
    assert f"python jobs/{script.name}" in done.stdout
    assert "--allow-busy" in done.stdout


def test_no_script_stands_in_for_a_package_of_its_name(tmp_path):
    program = (
        "import runpy, sys\n"
        "sys.path[0] = sys.argv[1]\n"  # as `python jobs/evaluate.py` sets it
        "sys.argv = [sys.argv[1] + '/evaluate.py']\n"
        "try:\n"
        "    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit:\n"
        "    from importlib.util import find_spec\n"
        "    print(find_spec('evaluate').origin)\n"
    )
    done = run_script("-c", program, str(CHECKOUT / "jobs"), folder=tmp_path)
    assert done.stdout.strip().endswith("site-packages/evaluate/__init__.py")


def test_what_a_job_uploads_stays_small(tmp_path):
    # What a working checkout holds beside the sources: an environment, caches, runs.
    copy = tmp_path / "checkout"
    shutil.copytree(CHECKOUT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "*_cache", "__pycache__"))
    for litter in (".git/objects/pack", ".venv/lib", "runs/quickstart", "raytune_ft/__pycache__", ".mypy_cache"):
        (copy / litter).mkdir(parents=True, exist_ok=True)
        (copy / litter / "big.bin").write_bytes(os.urandom(6_000_000))
    package = tmp_path / "package.zip"
    excludes = get_runtime_env_default_excludes()
    create_package(str(copy), package, include_gitignore=True, include_parent_dir=False, excludes=excludes)
    assert 50_000 < package.stat().st_size < 5_000_000

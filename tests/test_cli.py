"""The door: exit codes, messages without tracebacks, overrides, and help that loads nothing heavy."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

import raytune_ft
from raytune_ft import cli
from raytune_ft.core.config import Config
from raytune_ft.core.draft import begin
from raytune_ft.core.errors import DataError, RunError
from raytune_ft.core.manifest import ArtifactKind

HEAVY = ("torch", "ray", "transformers", "datasets", "pyarrow")


class Settings(Config):
    rows: int = 1
    """How many."""
    output_dir: str = "out"
    """Where to."""


@pytest.fixture(autouse=True)
def quiet_afterwards():
    """The command line takes over the logger; other tests listen to it."""
    logger = logging.getLogger("raytune_ft")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture
def verb(monkeypatch, tmp_path):
    """Puts a function in the place of every verb's; gives the path of a settings file."""

    def place(function):
        monkeypatch.setattr(cli.Verb, "load_config_class", lambda self: Settings)
        monkeypatch.setattr(cli.Verb, "load_function", lambda self: function)
        (tmp_path / "a.yaml").write_text("rows: 2\n")
        return str(tmp_path / "a.yaml")

    return place


def invoke(*arguments):
    return CliRunner().invoke(cli.app, arguments)


def python(program, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def command(*arguments, **environment):
    return python("from raytune_ft.cli import main; main()", *arguments, **environment)


def test_help_of_every_verb_loads_nothing_heavy():
    program = (
        "import json, sys\n"
        "from typer.testing import CliRunner\n"
        "from raytune_ft.cli import VERBS, app\n"
        "names = [command.name or command.callback.__name__ for command in app.registered_commands]\n"
        "codes = {name: CliRunner().invoke(app, [name, '--help']).exit_code for name in names}\n"
        "codes['top'] = CliRunner().invoke(app, ['--help']).exit_code\n"
        f"print(json.dumps([codes, [name for name in {HEAVY} if name in sys.modules]]))\n"
    )
    codes, loaded = json.loads(python(program).stdout)
    assert set(codes) == {
        *cli.VERBS,
        "quickstart",
        "schema",
        "key",
        "doctor",
        "inspect",
        "judge",
        "recommend",
        "runs",
        "merge",
        "combine",
        "top",
    }
    assert set(codes.values()) == {0}
    assert loaded == []


def test_a_verb_gets_its_settings_with_overrides_and_shows_what_it_made(verb, tmp_path):
    def make(config):
        draft = begin(tmp_path / "made", ArtifactKind.DATASET, settings=config.resolved())
        with draft:
            draft.numbers.update({"rows_out": config.rows, "rejected": {"empty": 6}, "share": 0.123456, "curve": [1]})
        return draft.artifact

    result = invoke("prepare", verb(make), "rows=7")
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0] == ["dataset", str(tmp_path / "made")]
    assert lines[1:] == [["rows_out", "7"], ["rejected.empty", "6"], ["share", "0.1235"]]


def test_the_users_mistake_is_a_message_and_exit_code_2(verb):
    def refuse(config):
        raise DataError("orders.jsonl:3: is not JSON")

    result = invoke("prepare", verb(refuse))
    assert (result.exit_code, result.stderr) == (2, "raytune-ft: orders.jsonl:3: is not JSON\n")


def test_a_failed_run_is_a_message_and_exit_code_1(verb):
    def fail(config):
        raise RunError("the loss is not a number since step 3")

    result = invoke("train", verb(fail))
    assert (result.exit_code, result.stderr) == (1, "raytune-ft: the loss is not a number since step 3\n")


def test_an_error_that_a_worker_raised_is_told_without_its_remote_traceback(verb):
    class RemoteError(DataError):
        cause = DataError("orders.jsonl:3: is not JSON")

    def fail(config):
        raise RemoteError("Traceback (most recent call last): ...")

    result = invoke("prepare", verb(fail))
    assert (result.exit_code, result.stderr) == (2, "raytune-ft: orders.jsonl:3: is not JSON\n")


def test_what_nobody_foresaw_keeps_its_traceback(verb):
    def break_down(config):
        raise ZeroDivisionError("no rows")

    result = invoke("train", verb(break_down))
    assert result.exit_code == 1
    assert isinstance(result.exception, ZeroDivisionError)


def test_ctrl_c_is_exit_code_130(verb):
    def interrupted(config):
        raise KeyboardInterrupt

    result = invoke("train", verb(interrupted))
    assert result.exit_code == 130
    assert "interrupted; the same command goes on from here" in result.stderr
    for name in ("prepare", "quantize", "prune", "serve"):  # these have nothing to go on from
        result = invoke(name, verb(interrupted))
        assert result.exit_code == 130
        assert "interrupted; the same command begins anew" in result.stderr


@pytest.mark.ray
@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_in_a_terminal_leaves_no_ray_process_behind(times, tmp_path):
    program = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # tests in the background ignore it
        "import ray\n"
        "from raytune_ft import cli\n"
        "from raytune_ft.core import cluster\n"
        "def wait(config):\n"
        "    cluster.connect(num_cpus=1)\n"
        "    print(ray._private.worker._global_node.get_session_dir_path(), flush=True)\n"
        "    time.sleep(600)\n"
        "cli.Verb.load_function = lambda self: wait\n"
        "sys.exit(cli.run_verb('prepare', [sys.argv[1]]))\n"
    )
    (tmp_path / "a.yaml").write_text("{sources: [x], output_path: out}")
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "a.yaml")],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "RAY_ADDRESS": "",
            "RAY_raylet_start_wait_time_s": "240",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    session = process.stdout.readline().strip()
    assert session and members(session), process.stderr.read()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole foreground group
    if times == 2:
        time.sleep(0.7)  # while Ray is ended
        os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "interrupted; the same command begins anew" in errors
    assert "Traceback" not in errors
    assert wait_until_gone(session) == []


def members(session):
    """Command lines of the processes of a Ray session."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = " ".join(process.info["cmdline"] or ())
        if session in line and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(line)
    return found


def wait_until_gone(session, seconds=30):
    """What is left of a Ray session after giving its processes time to end."""
    deadline = time.monotonic() + seconds
    while (left := members(session)) and time.monotonic() < deadline:
        time.sleep(0.5)
    return left


def test_settings_that_are_wrong_never_reach_the_verb(verb, tmp_path):
    path = verb(lambda config: pytest.fail("was called"))
    for arguments, message in [
        ([path, "row=3"], "a.yaml: row: there is no such setting; did you mean rows?"),
        ([path, "rows=many"], "a.yaml: rows: must be a whole number (got 'many')"),
        ([path, "rows"], "expected dotted.key=value"),
        ([str(tmp_path / "none.yaml")], "there is no such settings file"),
    ]:
        result = invoke("train", *arguments)
        assert result.exit_code == 2 and message in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["judge", "report", "--summary", "--max-pairs", "3"], "--port: --summary serves no page"),
        (["judge", "report", "--summary", "--port", "8000"], "--port: --summary serves no page"),
        (["judge", "report", "--summary", "--model", "a"], "--port: --summary serves no page"),
        (["doctor", "--matrix", "--storage", "here"], "--storage: the matrix writes no probe"),
        (["doctor", "--markdown", "--storage", "here"], "--storage: the matrix writes no probe"),
        (["runs", "here", "--storage", "there"], "`show NAME` looks"),
    ],
)
def test_options_without_effect_are_refused(arguments: list[str], message: str):
    result = invoke(*arguments)
    assert result.exit_code == 2 and message in " ".join(result.stderr.replace("│", " ").split())


def test_an_unknown_verb_and_a_missing_file_name_are_usage_errors():
    for arguments in (["trian", "a.yaml"], ["train"], ["schema", "trian"], ["runs", "show"]):
        result = invoke(*arguments)
        assert result.exit_code == 2 and "Traceback" not in result.output
    assert cli.run_verb("train", []) == 2


def test_a_job_refuses_to_write_where_ray_deletes(verb, tmp_path, monkeypatch):
    path = verb(lambda config: None)
    monkeypatch.chdir(tmp_path)
    assert invoke("train", path).exit_code == 0
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    result = invoke("train", path)
    assert result.exit_code == 2 and "output_dir: out lies in the job's working folder" in result.stderr
    assert invoke("train", path, "output_dir=s3://bucket/out").exit_code == 0
    assert invoke("train", path, f"output_dir={tmp_path.parent}/out").exit_code == 0
    assert invoke("train", path, "output_dir=~/out").exit_code == 0


def test_log_lines_outside_a_terminal_are_plain(verb):
    def talk(config):
        logger = logging.getLogger("raytune_ft")
        logger.debug("too much")
        logger.info("step %d of %d [bold]", 1, 2)
        logger.warning("row 3 was cut")

    lines = invoke("train", verb(talk)).stderr.splitlines()
    assert [line[8:] for line in lines] == [" step 1 of 2 [bold]", " warning: row 3 was cut"]
    assert all(len(line[:8].split(":")) == 3 for line in lines)


def test_the_schema_of_every_verb_is_json_and_loads_neither_torch_nor_ray():
    program = (
        "import json, sys\n"
        "from raytune_ft.cli import VERBS\n"
        "schemas = {name: verb.load_config_class().model_json_schema() for name, verb in VERBS.items()}\n"
        "print(json.dumps([{name: list(s['properties']) for name, s in schemas.items()},\n"
        "                  [name for name in ('torch', 'ray') if name in sys.modules]]))\n"
    )
    done = python(program)
    assert done.returncode == 0, done.stderr
    properties, loaded = json.loads(done.stdout)
    assert "sources" in properties["prepare"] and "learning_rate" in properties["train"]
    assert loaded == []
    shown = command("schema", "prepare")
    assert json.loads(shown.stdout)["properties"]["sources"]["description"]


def test_every_verb_has_its_function():
    for name, verb in cli.VERBS.items():
        assert callable(verb.load_function()), name


def test_runs_are_listed_and_told(tmp_path):
    for rank in (4, 8):
        draft = begin(tmp_path / f"r{rank}", ArtifactKind.MODEL, settings={"lora_r": rank, "seed": 1})
        with draft:
            draft.numbers["loss"] = 1 / rank
    with pytest.raises(RuntimeError), begin(tmp_path / "r16", ArtifactKind.MODEL, settings={"lora_r": 16, "seed": 1}):
        raise RuntimeError("out of memory")
    listed = invoke("runs", str(tmp_path))
    assert listed.exit_code == 0
    rows = {line.split()[0]: line for line in listed.stdout.splitlines() if line.strip()}
    assert "finished" in rows["r4"] and "lora_r=4" in rows["r4"] and "loss=0.25" in rows["r4"]
    assert "failed (1 failure kept)" in rows["r16"]
    assert "seed" not in listed.stdout
    told = invoke("runs", "show", "r16", "--storage", str(tmp_path))
    assert told.exit_code == 0 and "RuntimeError: out of memory" in told.stdout
    assert invoke("runs", "show", str(tmp_path / "r4")).exit_code == 0


def test_runs_of_a_path_without_any(tmp_path):
    assert f"no runs below {tmp_path}" in invoke("runs", str(tmp_path)).stdout
    missing = invoke("runs", str(tmp_path / "none"))
    assert missing.exit_code == 2 and "there is no such folder" in missing.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_standard_output_that_takes_no_more_is_one_line_or_silence(tmp_path, unbuffered):
    program = "from raytune_ft.cli import main; main()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": unbuffered}
    tables = (["runs", str(tmp_path)], ["schema", "train"], ["key"], ["doctor", "--matrix", "--markdown"])
    for arguments in (*tables, ["--help"], ["train", "--help"]):
        words = [sys.executable, "-c", program, *arguments]
        with Path("/dev/full").open("w") as full:
            ended = subprocess.run(words, env=environment, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        said = "raytune-ft: standard output cannot be written to: No space left on device\n"
        assert (ended.returncode, ended.stderr) == (1, said), arguments
        reading, writing = os.pipe()
        os.close(reading)
        ended = subprocess.run(words, env=environment, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
        os.close(writing)
        assert (ended.returncode, ended.stderr) == (1, ""), arguments
        closed = ["bash", "-c", '"$@" >&-', "bash", *words]
        ended = subprocess.run(closed, env=environment, stderr=subprocess.PIPE, text=True, check=False)
        assert (ended.returncode, ended.stderr) == (0, ""), arguments


def test_doctor_says_what_is_missing_and_fails_then(tmp_path):
    fine = command("doctor", "--storage", str(tmp_path), RAY_ADDRESS="")
    assert fine.returncode == 0, fine.stdout
    assert "a probe was written, read back and deleted" in fine.stdout
    missing = command("doctor", "--storage", str(tmp_path / "none"), RAY_ADDRESS="")
    assert missing.returncode == 1
    assert any(line.startswith("missing") and "shared storage" in line for line in missing.stdout.splitlines())


def test_the_quickstart_is_the_shipped_pipeline_with_overrides(verb, tmp_path, monkeypatch):
    seen = []
    verb(seen.append)
    monkeypatch.setattr(cli, "run_verb", lambda name, arguments: seen.append((name, arguments)) or 0)
    assert invoke("quickstart", "a.b=3", "--output-dir", "some where").exit_code == 0
    ((name, arguments),) = seen
    assert name == "pipeline" and Path(arguments[0]).name == "quickstart.yaml"
    assert arguments[1:] == ['storage_path="some where"', "a.b=3"]


def test_the_package_is_the_command_where_its_script_is_not_on_the_path():
    said = subprocess.run([sys.executable, "-m", "raytune_ft", "trian"], capture_output=True, text=True, check=False)
    assert said.returncode == 2 and "raytune-ft" in said.stderr


def test_the_version_is_told():
    assert invoke("--version").output == f"raytune-ft {raytune_ft.__version__}\n"

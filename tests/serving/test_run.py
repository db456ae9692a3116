"""A real endpoint, spoken to by the real `openai` client over HTTP."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from raytune_ft.core.errors import ModelError, ServingError
from raytune_ft.core.records import Message
from raytune_ft.evaluation.ab import analyse_ab_test
from raytune_ft.evaluation.config_ab import ABAnalysisConfig
from raytune_ft.models.config import DecodingConfig
from raytune_ft.models.generation import generate
from raytune_ft.models.loading import load_model
from raytune_ft.serving.address import free_port
from raytune_ft.serving.config import ServingConfig
from raytune_ft.serving.keys import hashed
from raytune_ft.serving.run import ModelServer, _running, serve

LIMITS = (3, 17, 40)
QUESTIONS = ["What is the capital of France?", "red", "The quick brown fox jumps over the lazy dog.", "0 1 2 3"]


@pytest.fixture(scope="module")
def server(
    ray_cluster: object, tiny_model: Path, adapters: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ModelServer]:
    kept = tmp_path_factory.mktemp("kept")
    settings = ServingConfig(
        model_path=str(tiny_model), name="tiny", port=0, max_new_tokens=64, max_batch_size=4, num_replicas=2,
        adapters={"b": str(adapters / "b")}, adapters_path=str(adapters), admin_keys=[hashed("root")],
        feedback_path=str(kept / "feedback"),
        ab_test={"name": "spring", "variants": {"base": 0.5, "b": 0.5}, "log_path": str(kept / "ab"), "model": "split"},
    )  # fmt: skip
    with ModelServer(settings) as running:
        yield running


@pytest.fixture
def client(server: ModelServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=60)


def ask(client: openai.OpenAI, text: str, *, model: str = "tiny", **options: Any) -> Any:
    settings = {"temperature": 0, "max_tokens": 12, **options}
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": text}], **settings)


def told(server: ModelServer, path: str, method: str = "GET", body: bytes | None = None, **headers: str) -> Any:
    """Status and body of a bare request."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://").removesuffix("/v1"), timeout=60)
    connection.request(method, path, body, {"Content-Type": "application/json", **headers})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


@pytest.fixture(scope="module")
def expected(tiny_model: Path) -> dict[tuple[str, int], str]:
    """What the bare model answers to each question with each limit."""
    loaded = load_model(str(tiny_model), device="cpu")
    return {
        (text, limit): generate(
            loaded, [loaded.chat.prompt_ids([Message("user", text)])], DecodingConfig(max_new_tokens=limit)
        )[0].text
        for text in QUESTIONS
        for limit in LIMITS
    }


@pytest.mark.ray
def test_concurrent_clients_get_the_bare_models_answers_streamed_or_not(
    client: openai.OpenAI, expected: dict[tuple[str, int], str]
):
    def answered(job: tuple[str, int, bool]) -> str:
        text, limit, stream = job
        found = ask(client, text, max_tokens=limit, stream=stream)
        if not stream:
            return found.choices[0].message.content
        return "".join(chunk.choices[0].delta.content or "" for chunk in found if chunk.choices)

    jobs = [(*key, stream) for key in expected for stream in (False, True)]
    with ThreadPoolExecutor(8) as pool:
        for job, text in zip(jobs, pool.map(answered, jobs), strict=True):
            assert text == expected[job[:2]]


@pytest.mark.ray
def test_mistakes_come_through_serve_in_openais_shape_and_the_server_lives_on(
    server: ModelServer, client: openai.OpenAI
):
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt", messages=[{"role": "user", "content": "hi"}])
    with pytest.raises(openai.BadRequestError):
        ask(client, "hi", temperature=-1)
    for path, method, body, status in [
        ("/v1/chat/completions", "POST", b'{"model": ', 400),
        ("/v1/chat/completions", "POST", b"x" * 9_000_000, 413),
        ("/v1/chat/completions", "GET", None, 405),
        ("/v1/nothing", "GET", None, 404),
        ("/admin/adapters", "POST", b"{}", 401),
    ]:
        code, text = told(server, path, method, body)
        assert (code, set(json.loads(text)["error"])) == (status, {"message", "type", "param", "code"})
    assert told(server, "/ready")[0] == 200


@pytest.mark.ray
def test_slow_readers_and_half_open_connections_hold_up_nobody(server: ModelServer, client: openai.OpenAI):
    host, _, port = server.url.removeprefix("http://").removesuffix("/v1").partition(":")
    body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "red"}], "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    with ExitStack() as stack:
        for number in range(24):
            half = stack.enter_context(socket.create_connection((host, int(port)), timeout=30))
            # a third says nothing further, a third promises a body, and a third never reads its answer
            said = [head, f"{head}Content-Length: 999\r\n\r\n", f"{head}Content-Length: {len(body)}\r\n\r\n"][
                number % 3
            ]
            half.sendall(said.encode() + (body if number % 3 == 2 else b""))
        for _ in range(4):
            assert ask(client, "red").choices[0].finish_reason
    assert told(server, "/ready")[0] == 200


@pytest.mark.ray
def test_clients_that_go_away_count_as_gone_through_serve(server: ModelServer):
    asked = {"model": "tiny", "prompt": "red", "n": 60, "max_tokens": 64, "temperature": 0}
    for stream in (True, False):
        connection = http.client.HTTPConnection(server.url.removeprefix("http://").removesuffix("/v1"), timeout=60)
        body = json.dumps({**asked, "stream": stream})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        if stream:
            assert connection.getresponse().read(6) == b"data: "
        time.sleep(0.5)
        connection.close()
    deadline, gone = time.monotonic() + 30, 0.0
    while gone < 2 and time.monotonic() < deadline:
        lines = [line for line in told(server, "/metrics")[1].splitlines() if 'route="/v1/completions"' in line]
        gone = sum(float(line.rpartition(" ")[2]) for line in lines if 'status="499"' in line)
        time.sleep(0.3)
    assert (gone, [line for line in lines if 'status="200"' in line]) == (2, [])


@pytest.mark.ray
def test_every_replica_loads_and_drops_adapters_and_is_counted(server: ModelServer, client: openai.OpenAI):
    key = {"Authorization": "Bearer root"}
    assert told(server, "/admin/adapters", "POST", b'{"name": "a"}', **key)[0] == 201
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, client, "red", model=name) for name in ("tiny:a", "tiny:b", "tiny") * 6]
        texts = [future.result().choices[0].message.content for future in asked]
    assert texts[:3] * 6 == texts
    assert len(set(texts)) == 3
    answers = 'raytune_ft_request_duration_seconds_count{adapter="a",model="tiny",replica="'
    replicas: set[str] = set()
    deadline = time.monotonic() + 20
    while len(replicas) < 2 and time.monotonic() < deadline:
        lines = told(server, "/metrics")[1].splitlines()
        replicas = {line.split('"')[5] for line in lines if line.startswith(answers)}
    assert len(replicas) == 2
    assert told(server, "/admin/adapters/a", "DELETE", **key)[0] == 200
    deadline = time.monotonic() + 20
    gone = 0
    while gone < 8 and time.monotonic() < deadline:
        gone = gone + 1 if told(server, "/v1/models/tiny:a")[0] == 404 else 0
    assert gone == 8, "a replica kept the adapter"


@pytest.mark.ray
def test_an_ab_test_keeps_users_with_their_variant_on_all_replicas_and_their_ratings_decide(
    server: ModelServer, client: openai.OpenAI, tmp_path: Path
):
    def answered(job: tuple[str, bool]) -> tuple[str, str]:
        user, stream = job
        found = ask(client, "red", model="split", user=user, stream=stream)
        answer = list(found)[-1] if stream else found
        return answer.model.removeprefix("tiny:"), answer.id

    users = [f"user-{number}" for number in range(60)]
    with ThreadPoolExecutor(8) as pool:
        rounds = [list(pool.map(answered, [(user, stream) for user in users])) for stream in (False, True)]
    variants = [[variant for variant, _ in found] for found in rounds]
    assert variants[0] == variants[1]
    assert set(variants[0]) == {"base", "b"}
    # The adapter's answers are liked, the model's own are not; the feedback names nothing but the answer.
    said = {"messages": [{"role": "user", "content": "red"}], "response": "?"}
    for variant, answer in rounds[1]:
        body = {**said, "rating": "up" if variant == "b" else "down", "id": answer}
        assert told(server, "/v1/feedback", "POST", json.dumps(body).encode())[0] == 201

    assert server.config.ab_test is not None
    logs = [file.read_text() for file in Path(server.config.ab_test.log_path).glob("exposures-*.jsonl")]
    assert len(logs) == 2, "both replicas had requests of the test"
    ids = [json.loads(line)["id"] for log in logs for line in log.splitlines()]
    assert sorted(ids) == sorted(answer for found in rounds for _, answer in found)
    assert not any("user-" in log for log in logs)

    settings = ABAnalysisConfig(
        exposures_path=server.config.ab_test.log_path, feedback_path=server.config.feedback_path, min_subjects=20,
        output_dir=str(tmp_path / "out"),
    )  # fmt: skip
    content = analyse_ab_test(settings).read_json("ab.json")
    counted = {one["name"]: (one["subjects"], one["requests"], one["ratings"]) for one in content["variants"]}
    of_b = variants[0].count("b")
    assert counted == {"base": (60 - of_b, 120 - 2 * of_b, 60 - of_b), "b": (of_b, 2 * of_b, of_b)}
    good = next(one for one in content["contrasts"] if one["measure"]["name"] == "good")
    assert (good["difference"], good["verdict"]) == (1.0, "better")
    assert content["decisions"][0]["action"] != "cannot conclude"


def under_load(server: ModelServer, expected: dict[tuple[str, int], str], act: Callable[[], None], *, retries: int,
               clients: int = 6, rounds: int = 1) -> tuple[int, list[str]]:  # fmt: skip
    """Asks again and again from `clients` threads until `act`, done meanwhile, is over; answers and what failed."""
    over = threading.Event()
    counted, failed = [0] * clients, []

    def keep_asking(number: int) -> None:
        client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=retries, timeout=120)
        jobs = list(expected.items())
        turn = number
        while not over.is_set():
            (text, limit), wanted = jobs[turn % len(jobs)]
            turn += 1
            try:
                found = ask(client, text, max_tokens=limit).choices[0].message.content
            except openai.APIError as error:
                failed.append(f"{type(error).__name__}: {error}")
                continue
            if found != wanted:
                failed.append(f"wrong answer to {text!r}: {found!r}")
            counted[number] += 1

    with ThreadPoolExecutor(clients) as pool:
        asking = [pool.submit(keep_asking, number) for number in range(clients)]
        try:
            for _ in range(rounds):
                time.sleep(1)
                act()
                time.sleep(1)
        finally:
            over.set()
        for future in asking:
            future.result()
    return sum(counted), failed


def replica_pids() -> dict[str, int]:
    """Process ids of the endpoint's running replicas; of this cluster, whatever others the machine has."""
    import ray
    from ray.util.state import list_actors

    here = ray.get_runtime_context().gcs_address
    actors = list_actors(here, filters=[("state", "=", "ALIVE")], limit=1000)
    return {actor.name: actor.pid for actor in actors if "Endpoint" in (actor.name or "")}


def kill_one_and_wait(replicas: int) -> None:
    """Kills a replica, and returns when another one is there in its place."""
    before = replica_pids()
    os.kill(next(iter(before.values())), signal.SIGKILL)
    deadline = time.monotonic() + 90
    while True:
        found = replica_pids()
        if len(found) >= replicas and set(found) != set(before):
            return
        assert time.monotonic() < deadline, "no replica came in the place of the killed one"
        time.sleep(0.3)


@pytest.mark.ray
def test_a_killed_replica_costs_a_retrying_client_nothing_and_is_replaced(
    server: ModelServer, expected: dict[tuple[str, int], str]
):
    answers, failed = under_load(server, expected, lambda: kill_one_and_wait(2), retries=8, clients=3)
    assert failed == []
    assert answers > 0
    assert told(server, "/ready")[0] == 200


@pytest.mark.ray
@pytest.mark.soak
def test_a_redeploy_under_load_fails_no_request(server: ModelServer, expected: dict[tuple[str, int], str]):
    changed = server.config.with_overrides(max_new_tokens=63)
    answers, failed = under_load(server, expected, lambda: server.update(changed), retries=0, clients=3)
    assert failed == []
    assert answers > 0
    assert "at most 63 here" in told(
        server, "/v1/completions", "POST", b'{"model": "tiny", "prompt": "a", "max_tokens": 64}'
    )[1]  # fmt: skip


def served_again(server: ModelServer, **changes: Any) -> subprocess.CompletedProcess[str]:
    """What becomes of ``raytune-ft serve`` with a running endpoint's settings, changed, in another program."""
    import ray

    config = server.config.with_overrides(**changes)
    program = (
        "import logging; logging.basicConfig(level=logging.INFO)\n"
        "from raytune_ft.serving.config import ServingConfig\n"
        "from raytune_ft.serving.run import serve\n"
        f"serve(ServingConfig.model_validate_json({config.model_dump_json()!r}))\n"
    )
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    return subprocess.run([sys.executable, "-c", program], env=environment, check=False, capture_output=True, text=True)


@pytest.mark.ray
@pytest.mark.soak
def test_serving_again_from_another_program_gives_the_endpoint_other_settings_and_fails_no_request(
    server: ModelServer, expected: dict[tuple[str, int], str]
):
    done = []
    act = lambda: done.append(served_again(server, max_new_tokens=62))  # noqa: E731 - one act of many
    answers, failed = under_load(server, expected, act, retries=0, clients=3)
    assert (done[0].returncode, failed) == (0, []), done[0].stderr
    assert "'tiny' is served with these settings" in done[0].stderr
    assert answers > 0
    asked = b'{"model": "tiny", "prompt": "a", "max_tokens": 63}'
    assert "at most 62 here" in told(server, "/v1/completions", "POST", asked)[1]
    refused = served_again(server, port=server.config.port + 1)
    assert "host and port: stay as they are" in refused.stderr
    assert told(server, "/ready")[0] == 200


@pytest.mark.soak
def test_kills_and_redeploys_for_minutes_lose_nothing(
    ray_cluster: object, server: ModelServer, expected: dict[tuple[str, int], str]
):
    rounds = int(os.environ.get("RAYTUNE_FT_SOAK_ROUNDS", "5"))
    limits = iter(range(1000, 2000))

    def act() -> None:
        kill_one_and_wait(2)
        server.update(server.config.with_overrides(max_new_tokens=next(limits)))

    answers, failed = under_load(server, expected, act, retries=8, rounds=rounds)
    print(f"{answers} answers in {rounds} rounds of kill and redeploy; failed or wrong: {failed}")
    assert failed == []


@pytest.mark.ray
def test_an_endpoint_whose_replicas_are_just_replaced_is_still_the_clusters(server: ModelServer):
    from ray import serve

    for pid in replica_pids().values():
        os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while serve.status().applications["raytune_ft"].status == "RUNNING":
        assert time.monotonic() < deadline, "nobody noticed"
        time.sleep(0.05)
    found = _running(90)
    assert found is not None
    assert (found.served_name, found.feedback_path) == ("tiny", server.config.feedback_path)


@pytest.mark.ray
def test_a_second_endpoint_on_the_same_cluster_is_refused(
    server: ModelServer, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(ServingError, match="has a Ray Serve endpoint already"):
        ModelServer(ServingConfig(model_path=str(tiny_model), port=0)).start()
    monkeypatch.setenv("RAY_ADDRESS", "auto")  # connected already; `serve` looks at the cluster that it names
    with pytest.raises(ServingError, match="has a Ray Serve endpoint already"):
        serve(ServingConfig(model_path=str(tiny_model), name="other", port=int(server.url.split(":")[2][:-3])))
    assert urllib.request.urlopen(server.url.replace("/v1", "/health"), timeout=30).status == 200


@pytest.mark.ray
def test_endpoints_follow_one_another_and_a_broken_model_is_a_model_error(
    server: ModelServer, tiny_model: Path, tmp_path: Path
):
    """Takes the shared endpoint down, so it stands behind the tests that use it."""
    port = int(server.url.split(":")[2].partition("/")[0])
    server.stop()
    assert free_port("127.0.0.1", port) == port

    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="broken") as caught:
        ModelServer(ServingConfig(model_path=str(broken), port=port)).start()
    assert "Traceback" not in str(caught.value)

    with ModelServer(ServingConfig(model_path=str(tiny_model), name="tiny", port=port)) as again:
        assert again.url == f"http://127.0.0.1:{port}/v1"
        assert ask(openai.OpenAI(base_url=again.url, api_key="none"), "red").choices
    assert free_port("127.0.0.1", port) == port


@pytest.mark.ray
def test_sigterm_answers_what_is_asked_takes_the_endpoint_down_and_ends_the_program_as_done(
    ray_cluster: object, server: ModelServer, tiny_model: Path
):
    import ray
    from ray import serve

    server.stop()
    program = (
        "import logging; logging.basicConfig(level=logging.INFO)\n"
        "from raytune_ft.serving.config import ServingConfig\n"
        "from raytune_ft.serving.run import serve\n"
        f"serve(ServingConfig(model_path={str(tiny_model)!r}, port=0))\n"
    )
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    said, answered = [], list[str | None]()
    for line in process.stderr:
        said.append(line)
        if "Ctrl-C stops it" in line:
            url = re.search(r"http://\S+/v1", "".join(said))
            assert url is not None
            client = openai.OpenAI(base_url=url[0], api_key="none", max_retries=0)
            asked = client.completions.create(
                model=client.models.list().data[0].id, prompt="red", max_tokens=400, stream=True
            )
            answered.append(next(asked).choices[0].finish_reason)
            process.send_signal(signal.SIGTERM)
            answered += [chunk.choices[0].finish_reason for chunk in asked if chunk.choices]
    assert process.wait(60) == 0, "".join(said)
    assert "Stopping" in "".join(said)
    assert answered[-1] in {"stop", "length"}, "the request in flight was cut"
    assert not serve.status().proxies, "Serve would outlive the program on a cluster that it joined"


def test_sigterm_while_the_endpoint_starts_ends_the_program_in_order(tiny_model: Path, tmp_path: Path):
    settings = tmp_path / "serve.yaml"
    settings.write_text(f"model_path: {tiny_model}\nport: 0\n")
    command = [sys.executable, "-c", "from raytune_ft.cli import main; main()", "serve", str(settings)]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if "Engine transformers" in line:
            children = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 143, "".join(said)
    assert "terminated; the same command begins anew" in said[-1]
    assert children
    assert not psutil.wait_procs(children, timeout=60)[1]


def test_a_port_in_use_is_refused_by_its_number_before_anything_starts():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ServingError, match=rf"port {port} on 127\.0\.0\.1 is in use.*port={port + 1}") as caught:
            ModelServer(ServingConfig(model_path="nowhere", port=port)).start()
    assert caught.value.exit_code == 2


def test_a_host_that_is_not_this_machine_is_refused():
    with pytest.raises(ServingError, match=r"no address of this machine|cannot be listened on"):
        free_port("no.such.host.invalid", 8000)
    with pytest.raises(ServingError, match="cannot be listened on"):
        free_port("203.0.113.7", 8000)


def test_a_folder_that_is_no_model_is_refused_before_anything_starts(tmp_path: Path):
    with pytest.raises(ModelError, match="is not a model"):
        ModelServer(ServingConfig(model_path=str(tmp_path), port=0)).start()

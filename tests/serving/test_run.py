"""A real endpoint, spoken to by the real `openai` client over HTTP."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from raytune_ft.core.errors import ModelError, ServingError
from raytune_ft.core.records import Message
from raytune_ft.models.config import DecodingConfig
from raytune_ft.serving.config import ServingConfig
from raytune_ft.serving.engines import GenerationRequest, TransformersEngine
from raytune_ft.serving.run import ModelServer, free_port

QUESTIONS = ["What is the capital of France?", "red", "The quick brown fox jumps over the lazy dog.", "0 1 2 3"]


@pytest.fixture(scope="module")
def server(ray_cluster: object, tiny_model: Path) -> Iterator[ModelServer]:
    settings = ServingConfig(model_path=str(tiny_model), name="tiny", port=0, max_new_tokens=64, max_batch_size=4)
    with ModelServer(settings) as running:
        yield running


@pytest.fixture
def client(server: ModelServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=60)


def ask(client: openai.OpenAI, text: str, **options: object) -> openai.types.chat.ChatCompletion:
    settings = {"temperature": 0, "max_tokens": 12, **options}
    return client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": text}], **settings)


@pytest.mark.ray
def test_the_model_is_listed(client: openai.OpenAI):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


@pytest.mark.ray
def test_concurrent_clients_get_the_answers_that_the_bare_engine_gives_alone(client: openai.OpenAI, tiny_model: Path):
    engine = TransformersEngine.load(str(tiny_model), device="cpu")
    expected = []
    for number, text in enumerate(QUESTIONS):
        prompt = engine.prompt_ids([Message("user", text)])
        expected.append(engine.answer([GenerationRequest(prompt, DecodingConfig(max_new_tokens=10 + number))])[0])
    with ThreadPoolExecutor(8) as pool:
        futures = [
            pool.submit(ask, client, text, max_tokens=10 + number)
            for _ in range(3)
            for number, text in enumerate(QUESTIONS)
        ]
        answers = [future.result() for future in futures]
    for place, answer in enumerate(answers):
        wanted = expected[place % len(QUESTIONS)]
        assert answer.choices[0].message.content == wanted.text
        assert answer.choices[0].finish_reason == wanted.finish_reason
        assert answer.usage is not None and answer.usage.completion_tokens == len(wanted.token_ids)


@pytest.mark.ray
def test_a_stream_carries_the_same_text_and_the_usage(client: openai.OpenAI):
    whole = ask(client, QUESTIONS[0])
    chunks = list(ask(client, QUESTIONS[0], stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage


@pytest.mark.ray
def test_the_same_seed_samples_the_same_answer(client: openai.OpenAI):
    texts = [
        ask(client, "red", temperature=1.0, seed=seed, max_tokens=24).choices[0].message.content for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.ray
def test_mistakes_are_answered_in_openais_shape(client: openai.OpenAI):
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt", messages=[{"role": "user", "content": "hi"}])
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as negative:
        ask(client, "hi", temperature=-1)
    assert (negative.value.type, negative.value.param) == ("invalid_request_error", "temperature")
    with pytest.raises(openai.BadRequestError) as long:
        ask(client, "yes " * 600)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as beyond:
        ask(client, "hi", max_tokens=65)
    assert "at most 64" in beyond.value.message
    with pytest.raises(openai.BadRequestError) as option:
        ask(client, "hi", logprobs=True)
    assert option.value.param == "logprobs"


@pytest.mark.ray
@pytest.mark.parametrize(
    ("method", "path", "body", "status", "message"),
    [
        ("POST", "/v1/chat/completions", b'{"model": ', 400, "the body is not valid JSON"),
        ("POST", "/v1/chat/completions", b"[]", 400, ""),
        ("POST", "/v1/chat/completions", b"\xff\xfe", 400, ""),
        ("GET", "/v1/chat/completions", None, 405, "Method Not Allowed"),
        ("GET", "/v1/nothing", None, 404, "Not Found"),
    ],
)
def test_broken_requests_are_answered_in_openais_shape_and_the_server_lives_on(
    server: ModelServer, method: str, path: str, body: bytes | None, status: int, message: str
):
    address = server.url.removeprefix("http://").removesuffix("/v1")
    connection = http.client.HTTPConnection(address, timeout=30)
    connection.request(method, path, body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    error = json.loads(answer.read())["error"]
    assert answer.status == status
    assert message in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    with urllib.request.urlopen(f"http://{address}/health", timeout=30) as health:
        assert health.status == 200


@pytest.mark.ray
def test_a_second_endpoint_on_the_same_cluster_is_refused(server: ModelServer, tiny_model: Path):
    with pytest.raises(ServingError, match="has a Ray Serve endpoint already"):
        ModelServer(ServingConfig(model_path=str(tiny_model), port=0)).start()
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
def test_sigterm_takes_the_endpoint_down_and_ends_the_program_as_done(
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
    said = []
    for line in process.stderr:
        said.append(line)
        if "Ctrl-C stops it" in line:
            process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0, "".join(said)
    assert "Stopping" in "".join(said)
    assert not serve.status().proxies, "Serve would outlive the program on a cluster that it joined"


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

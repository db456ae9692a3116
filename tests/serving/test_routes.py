"""One replica over real HTTP, asked by the real `openai` client and by bare requests; no Ray."""

from __future__ import annotations

import asyncio
import http.client
import json
import shutil
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from starlette.requests import ClientDisconnect

from raytune_ft.core.records import Message
from raytune_ft.models.config import DecodingConfig
from raytune_ft.models.generation import generate
from raytune_ft.serving.config import ServingConfig
from raytune_ft.serving.keys import hashed
from raytune_ft.serving.protocol import ChatRequest
from raytune_ft.serving.routes import _Stream

QUESTIONS = ["What is the capital of France?", "red", "The quick brown fox jumps over the lazy dog.", "0 1 2 3"]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def ask(client: openai.OpenAI, text: str, *, model: str = "tiny", **options: Any) -> Any:
    settings = {"temperature": 0, "max_tokens": 12, **options}
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": text}], **settings)


def send(root: str, method: str, path: str, body: bytes | str | None = None, **headers: str) -> tuple[int, bytes, Any]:
    connection = http.client.HTTPConnection(root.removeprefix("http://"), timeout=60)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json", **headers})
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.headers
    finally:
        connection.close()


def chat_body(**fields: Any) -> str:
    return json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, **fields})


def until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_concurrent_clients_get_the_bare_models_answers_none_mixed(endpoint):
    client, loaded = endpoint.client(), endpoint.service.engine.loaded
    jobs = [(text, 8 + 3 * place + turn, bool(turn % 2)) for turn in range(4) for place, text in enumerate(QUESTIONS)]

    def answered(job: tuple[str, int, bool]) -> str:
        text, limit, stream = job
        found = ask(client, text, max_tokens=limit, stream=stream)
        if not stream:
            return found.choices[0].message.content
        return "".join(chunk.choices[0].delta.content or "" for chunk in found if chunk.choices)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(answered, jobs))
    for (text, limit, _), answer in zip(jobs, found, strict=True):
        prompt = loaded.chat.prompt_ids([Message("user", text)])
        assert answer == generate(loaded, [prompt], DecodingConfig(max_new_tokens=limit))[0].text


def test_base_and_adapters_are_listed_and_asked_for_by_name(endpoint):
    client = endpoint.client()
    assert [card.id for card in client.models.list()] == ["tiny", "tiny:a", "tiny:b", "tiny:prefix", "tiny:prompt"]
    assert client.models.retrieve("tiny:b").model_dump()["parent"] == "tiny"
    with ThreadPoolExecutor(8) as pool:
        names = ["tiny", "tiny:a", "tiny:b", "tiny:prefix", "tiny:prompt"] * 2
        found = list(pool.map(lambda name: ask(client, QUESTIONS[0], model=name), names))
    texts = [answer.choices[0].message.content for answer in found]
    assert texts[:5] == texts[5:]
    assert len(set(texts[:5])) == 5
    assert [answer.model for answer in found] == names


@pytest.mark.parametrize("model", ["gpt", "tiny:", "tiny:c", "tiny:../a", "a", "tiny:a/b", ""])
def test_an_unknown_model_is_a_404_that_names_what_there_is(endpoint, model: str):
    with pytest.raises(openai.NotFoundError) as unknown:
        ask(endpoint.client(), "hi", model=model)
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    assert "'tiny:prefix'" in unknown.value.message


def test_several_choices_are_those_of_seeds_that_follow_one_another(endpoint):
    client = endpoint.client()
    both = ask(client, "red", n=2, seed=5, temperature=1.0)
    alone = [ask(client, "red", seed=seed, temperature=1.0).choices[0].message.content for seed in (5, 6)]
    assert [choice.message.content for choice in both.choices] == alone
    assert alone[0] != alone[1]
    streamed: dict[int, str] = {0: "", 1: ""}
    for chunk in ask(client, "red", n=2, seed=5, temperature=1.0, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert list(streamed.values()) == alone


def test_a_stream_ends_with_the_usage_of_the_whole_body(endpoint):
    client = endpoint.client()
    whole = ask(client, QUESTIONS[0], logprobs=True, top_logprobs=2)
    chunks = list(
        ask(client, QUESTIONS[0], logprobs=True, top_logprobs=2, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[-1].usage == whole.usage
    tokens = [t for c in chunks if c.choices for t in (c.choices[0].logprobs.content if c.choices[0].logprobs else [])]
    assert tokens == whole.choices[0].logprobs.content
    assert len(tokens) == whole.usage.completion_tokens


def test_a_completion_goes_on_from_text_or_its_tokens(endpoint):
    client, tokenizer = endpoint.client(), endpoint.service.engine.loaded.tokenizer
    text = "The quick brown fox"
    ids = tokenizer(text)["input_ids"]
    options = {"model": "tiny", "temperature": 0, "max_tokens": 5, "logprobs": 1, "echo": True}
    by_text = client.completions.create(prompt=text, **options)
    by_ids = client.completions.create(prompt=[ids, ids], **options)
    assert [choice.text for choice in by_ids.choices] == [by_text.choices[0].text] * 2
    assert by_text.choices[0].text.startswith(text)
    told = by_text.choices[0].logprobs
    assert "".join(told.tokens) == by_text.choices[0].text
    assert told.token_logprobs[0] is None
    # What lm-eval sums and compares: the context's tokens left out, and the one generated token.
    scored = client.completions.create(prompt=[ids], **{**options, "max_tokens": 1}).choices[0].logprobs
    assert scored.token_logprobs[1:-1] == pytest.approx(told.token_logprobs[1 : len(ids)], abs=1e-4)
    assert len(scored.token_logprobs) == len(ids) + 1
    assert by_ids.usage.prompt_tokens == 2 * len(ids)
    nothing = client.completions.create(prompt=text, **{**options, "max_tokens": 0})
    assert (nothing.choices[0].text, nothing.usage.completion_tokens) == (text, 0)


def test_a_completion_that_only_scores_tells_no_token_however_it_is_sent(endpoint):
    options = {"model": "tiny", "prompt": "red blue", "max_tokens": 0, "echo": True}
    whole = endpoint.client().completions.create(**options)
    chunks = list(endpoint.client().completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage == whole.usage
    assert whole.usage.completion_tokens == 0


def test_mistakes_are_answered_in_openais_shape_by_what_is_wrong(endpoint):
    client = endpoint.client()
    for options, param, said in [
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"max_tokens": 97}, "max_tokens", "at most 96 here"),
        ({"extra_body": {"logit_bias": {"1": 5}}}, "logit_bias", "not supported"),
        ({"extra_body": {"guided_json": {}}}, "guided_json", "not supported"),
        ({"n": 69}, "n", "at most 68 here"),
    ]:
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, "hi", **options)
        assert (caught.value.type, caught.value.param) == ("invalid_request_error", param)
        assert said in caught.value.message
    with pytest.raises(openai.BadRequestError) as long:
        ask(client, "yes " * 600)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="999 is no token of this model's"):
        client.completions.create(model="tiny", prompt=[1, 999])


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "message"),
    [
        ("POST", CHAT, b'{"model": ', 400, "the body is not valid JSON"),
        ("POST", CHAT, b"[]", 400, "a JSON object is needed"),
        ("POST", CHAT, b"\xff\xfe", 400, ""),
        ("POST", CHAT, b"[" * 100_000, 400, ""),
        ("POST", CHAT, b"", 400, ""),
        ("POST", COMPLETIONS, b'{"model": "tiny", "prompt": {}}', 400, "prompt"),
        ("POST", COMPLETIONS, b'{"model": "tiny", "prompt": "a", "\\ud800": 1}', 400, "nicode"),
        ("GET", CHAT, None, 405, "Method Not Allowed"),
        ("GET", "/v1/nothing", None, 404, "Not Found"),
        ("GET", "/../../etc/passwd", None, 404, "Not Found"),
        ("POST", "/admin/adapters", b"{}", 403, "no admin_keys"),
    ],
)
def test_broken_requests_are_answered_in_openais_shape_and_the_server_lives_on(
    endpoint, method: str, path: str, body: bytes | None, status: int, message: str
):
    code, text, _ = send(endpoint.root, method, path, body)
    error = json.loads(text)["error"]
    assert (code, set(error)) == (status, {"message", "type", "param", "code"})
    assert message in error["message"]
    assert send(endpoint.root, "GET", "/health")[0] == 200
    assert send(endpoint.root, "GET", "/ready")[0] == 200


def test_without_keys_other_sites_pages_are_refused_and_this_machines_are_not(endpoint):
    port = endpoint.root.rpartition(":")[2]
    for own in (f"localhost:{port}", f"127.0.0.1:{port}", "[::1]:9000"):
        assert send(endpoint.root, "POST", CHAT, chat_body(), Host=own)[0] == 200
        assert send(endpoint.root, "POST", CHAT, chat_body(), Host=own, Origin=f"http://{own}")[0] == 200
    for other in ({"Host": f"evil.example:{port}"}, {"Origin": "https://evil.example"}, {"Origin": "null"}):
        for method, path in (("POST", CHAT), ("POST", "/v1/feedback"), ("GET", "/v1/models")):
            code, text, _ = send(endpoint.root, method, path, chat_body(), **other)
            assert (code, json.loads(text)["error"]["type"]) == (403, "permission_error")
            assert "set allow_anyone: true" in json.loads(text)["error"]["message"]
        assert send(endpoint.root, "GET", "/health", **other)[0] == 200


@pytest.mark.parametrize("settings", [{"allow_anyone": True}, {"api_keys": [hashed("one")]}])
def test_with_keys_or_for_anyone_every_name_is_answered(tiny_model: Path, serve_here, settings: dict[str, Any]):
    headers = {"Host": "models.example", "Origin": "https://chat.example", "Authorization": "Bearer one"}
    with serve_here(ServingConfig(model_path=str(tiny_model), name="tiny", **settings)) as running:
        assert send(running.root, "POST", CHAT, chat_body(), **headers)[0] == 200


def test_plain_curl_gets_an_answer_and_a_stream(endpoint):
    command = ["curl", "-sN", f"{endpoint.root}{CHAT}", "-H", "Content-Type: application/json", "-d"]
    whole = json.loads(subprocess.check_output([*command, chat_body(temperature=0)], timeout=60))
    lines = subprocess.check_output([*command, chat_body(temperature=0, stream=True)], timeout=60, text=True).split(
        "\n\n"
    )
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == whole["choices"][0]["message"]["content"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_place(endpoint, stream: bool):
    engine = endpoint.service.engine
    connection = http.client.HTTPConnection(endpoint.root.removeprefix("http://"), timeout=60)
    body = chat_body(stream=stream, n=60, max_tokens=96, temperature=0)
    connection.request("POST", CHAT, body, {"Content-Type": "application/json"})
    until(lambda: sum(engine.load_now) >= 4)
    connection.sock.close()
    connection.close()
    until(lambda: engine.load_now == (0, 0))
    assert ask(endpoint.client(), "red").choices[0].finish_reason


def test_a_client_that_goes_away_before_the_first_event_frees_its_place(endpoint):
    """The stream's generator is never begun then, so its own end cannot take the tickets out."""

    async def gone() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def refused(message: Any) -> None:
        raise OSError("the client is gone")

    async def ask_and_go() -> None:
        service = endpoint.service
        body = ChatRequest.model_validate_json(chat_body(stream=True, n=60, max_tokens=96))
        job = await service.chat_job(body, SimpleNamespace())
        entered = service.enter(job)
        stream = _Stream(service.streamed(job, entered), partial(service.left, job, entered[1]), {})
        with suppress(OSError, ClientDisconnect):
            await stream({"type": "http", "asgi": {"spec_version": "2.4"}}, gone, refused)
        assert all(ticket.cancelled for ticket in entered[1])

    asyncio.run_coroutine_threadsafe(ask_and_go(), endpoint.loop).result(30)
    until(lambda: endpoint.service.engine.load_now == (0, 0))


def test_an_adapters_own_template_is_what_it_is_asked_with(
    tiny_model: Path, adapters: Path, tmp_path: Path, serve_here
):
    shutil.copytree(adapters / "a", tmp_path / "own")
    (tmp_path / "own" / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    config = ServingConfig(
        model_path=str(tiny_model), name="tiny", adapters={"a": str(adapters / "a"), "own": str(tmp_path / "own")}
    )
    with serve_here(config) as running:
        used = [ask(running.client(), "red", model=f"tiny:{name}").usage.prompt_tokens for name in ("a", "own")]
        loaded = running.service.engine.loaded
        assert used == [
            len(loaded.chat.prompt_ids([Message("user", "red")])),
            len(loaded.tokenizer("red")["input_ids"]),
        ]


def test_chat_template_kwargs_reach_the_template(tiny_model: Path, tmp_path: Path, serve_here):
    folder = Path(shutil.copytree(tiny_model, tmp_path / "thinks"))
    template = folder / "chat_template.jinja"
    unthinking = "assistant\n{% if enable_thinking is defined and not enable_thinking %}no{% endif %}"
    template.write_text(template.read_text().replace("assistant\n", unthinking))
    with serve_here(ServingConfig(model_path=str(folder), name="tiny")) as running:
        used = [
            ask(running.client(), "red", extra_body={"chat_template_kwargs": given}).usage.prompt_tokens
            for given in (None, {"enable_thinking": True}, {"enable_thinking": False})
        ]
        assert used == [used[0], used[0], used[0] + len(running.service.engine.loaded.tokenizer("no")["input_ids"])]
        with pytest.raises(openai.BadRequestError, match="'messages' is set by the endpoint itself") as refused:
            ask(running.client(), "red", extra_body={"chat_template_kwargs": {"messages": []}})
        assert refused.value.param == "chat_template_kwargs"


def test_too_many_at_once_get_429_with_retry_after_and_the_rest_is_answered(tiny_model: Path, serve_here):
    config = ServingConfig(model_path=str(tiny_model), name="tiny", max_batch_size=1, max_queued_requests=1)
    with serve_here(config) as running, ThreadPoolExecutor(6) as pool:
        body = chat_body(max_tokens=200, temperature=0)
        found = list(pool.map(lambda _: send(running.root, "POST", CHAT, body), range(6)))
        codes = sorted(code for code, _, _ in found)
        assert set(codes) == {200, 429}
        assert codes.count(200) >= 2
        refused = [(text, headers) for code, text, headers in found if code == 429]
        assert all(headers["Retry-After"] == "1" for _, headers in refused)
        assert all(json.loads(text)["error"]["type"] == "rate_limit_error" for text, _ in refused)


def test_limits_of_size_and_keys_and_adapters_loaded_later(tiny_model: Path, adapters: Path, serve_here):
    config = ServingConfig(
        model_path=str(tiny_model), name="tiny", max_request_mb=0.01, adapters_path=str(adapters), max_adapters=2,
        api_keys=[hashed("one"), hashed("two")], admin_keys=[hashed("root")],
    )  # fmt: skip
    with serve_here(config) as running:
        for key, code in [("one", 200), ("two", 200), ("root", 200), ("three", 401), ("", 401)]:
            header = {"Authorization": f"Bearer {key}"} if key else {}
            assert send(running.root, "GET", "/v1/models", **header)[0] == code
        assert send(running.root, "GET", "/health")[0] == 200
        assert send(running.root, "GET", "/metrics")[0] == 401
        with pytest.raises(openai.AuthenticationError, match="an API key is needed"):
            ask(running.client("wrong"), "hi")
        with pytest.raises(openai.APIStatusError, match=r"larger than 0\.01 MB") as large:
            ask(running.client("one"), "x" * 20_000)
        assert large.value.status_code == 413
        chunked = [b"x" * 6000] * 3
        assert send(running.root, "POST", CHAT, iter(chunked), Authorization="Bearer one")[0] == 413
        loads_and_drops(running, running.client("one"))


def test_an_answer_that_takes_too_long_is_given_up_and_frees_its_place(tiny_model: Path, serve_here):
    config = ServingConfig(
        model_path=str(tiny_model), name="tiny", request_timeout_s=0.3, max_new_tokens=400,
        max_batch_size=1,  # 60 answers one after the other take seconds on any machine
    )  # fmt: skip
    with serve_here(config) as running:
        for stream in (False, True):
            with pytest.raises(openai.APIError, match=r"no answer within 0\.3 seconds") as late:
                list(ask(running.client(), "hi", n=60, max_tokens=400, stream=stream))
            assert stream or late.value.status_code == 504
        until(lambda: running.service.engine.load_now == (0, 0))


def loads_and_drops(running: Any, client: openai.OpenAI) -> None:
    admin = {"Authorization": "Bearer root"}
    listed = json.loads(send(running.root, "GET", "/admin/adapters", **admin)[1])
    assert listed == {"loaded": [], "loadable": ["a", "b", "prefix", "prompt"]}
    assert send(running.root, "POST", "/admin/adapters", '{"name": "a"}', Authorization="Bearer one")[0] == 401
    for name, code in [("a", 201), ("a", 409), ("c", 404), ("../adapters/a", 400), ("prefix", 201)]:
        assert send(running.root, "POST", "/admin/adapters", json.dumps({"name": name}), **admin)[0] == code
    assert [card.id for card in client.models.list()] == ["tiny", "tiny:a", "tiny:prefix"]
    assert ask(client, "red", model="tiny:a", max_tokens=2).choices[0].message.content
    assert send(running.root, "DELETE", "/admin/adapters/a", **admin)[0] == 200
    assert send(running.root, "DELETE", "/admin/adapters/a", **admin)[0] == 404
    with pytest.raises(openai.NotFoundError):
        ask(client, "red", model="tiny:a")


def test_prompts_by_the_thousand_are_refused_unread(endpoint):
    body = json.dumps({"model": "tiny", "prompt": ["red"] * 500_000})  # to read them would take minutes
    code, text, _ = send(endpoint.root, "POST", COMPLETIONS, body)
    assert (code, json.loads(text)["error"]["param"]) == (400, "n")
    assert "500000 answers in one request: at most 68 here" in text.decode()


def test_a_ten_megabyte_prompt_is_refused_while_others_are_answered(tiny_model: Path, serve_here):
    config = ServingConfig(model_path=str(tiny_model), name="tiny", max_request_mb=16)
    with serve_here(config) as running, ThreadPoolExecutor(2) as pool:
        big = pool.submit(send, running.root, "POST", CHAT, chat_body(
            messages=[{"role": "user", "content": "red blue " * 1_150_000}]
        ))  # fmt: skip
        assert ask(running.client(), "red").choices[0].finish_reason
        code, text, _ = big.result()
        assert (code, json.loads(text)["error"]["code"]) == (400, "context_length_exceeded")

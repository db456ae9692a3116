"""What is counted is right, and what dashboards and alerts ask for exists."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import time
import urllib.request
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from raytune_ft.serving.config import ServingConfig
from raytune_ft.serving.metrics import Metrics, exposition
from raytune_ft.serving.routes import build_api

ASKED = ("raytune_ft_requests_total", "route=/v1/completions")
NAME = re.compile(r"\braytune_ft_\w+")


def samples(root: str) -> dict[tuple[str, ...], float]:
    with urllib.request.urlopen(f"{root}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    return {
        (sample.name, *(f"{key}={value}" for key, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def change(before: dict[tuple[str, ...], float], after: dict[tuple[str, ...], float], *wanted: str) -> float:
    return sum(
        value - before.get(key, 0.0) for key, value in after.items() if key[0] == wanted[0] and {*wanted} <= {*key}
    )


def until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_requests_tokens_and_latencies_are_counted_per_model_and_adapter(endpoint):
    client = endpoint.client()
    before = samples(endpoint.root)
    asked: Any = {"messages": [{"role": "user", "content": "red"}], "max_tokens": 6, "temperature": 0}
    found = [client.chat.completions.create(model=model, **asked) for model in ("tiny", "tiny:a", "tiny:a")]
    after = samples(endpoint.root)
    for adapter, answers in (("adapter=", found[:1]), ("adapter=a", found[1:])):
        labels = ("model=tiny", adapter)
        tokens = sum(answer.usage.completion_tokens for answer in answers)
        prompts = sum(answer.usage.prompt_tokens for answer in answers)
        assert change(before, after, "raytune_ft_completion_tokens_total", *labels) == tokens
        assert change(before, after, "raytune_ft_prompt_tokens_total", *labels) == prompts
        for latency in ("time_to_first_token", "time_per_output_token", "request_duration"):
            assert change(before, after, f"raytune_ft_{latency}_seconds_count", *labels) == len(answers)
        assert change(
            before, after, "raytune_ft_requests_total", *labels, "route=/v1/chat/completions", "status=200"
        ) == len(answers)
    assert after[("raytune_ft_ready", "replica=r1")] == 1
    assert after[("raytune_ft_adapters", "replica=r1")] == 4


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_counts_as_gone_not_as_answered(endpoint, stream: bool):
    engine = endpoint.service.engine
    before = samples(endpoint.root)
    body = {"model": "tiny", "prompt": "red", "n": 60, "max_tokens": 96, "temperature": 0, "stream": stream}
    connection = http.client.HTTPConnection(endpoint.root.removeprefix("http://"), timeout=60)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    if stream:
        assert connection.getresponse().read(20).startswith(b"data: ")
    else:
        until(lambda: sum(engine.load_now) > 0)
    connection.close()

    until(lambda: change(before, samples(endpoint.root), *ASKED, "status=499") == 1)
    assert change(before, samples(endpoint.root), *ASKED, "status=200") == 0
    assert change(before, samples(endpoint.root), "raytune_ft_cancelled_total", "model=tiny") == 1


def test_a_connection_that_breaks_while_it_is_watched_is_a_client_that_went_away(endpoint):
    """As Ray Serve's do: what is to tell of the client raises an error of its own."""
    before, api = samples(endpoint.root), build_api(endpoint.service)
    body = json.dumps({"model": "tiny", "prompt": "red", "n": 60, "max_tokens": 96, "stream": True}).encode()
    pending = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if pending:
            return pending.pop()
        raise RuntimeError("the task was cancelled")

    async def send(message: Any) -> None:
        await asyncio.sleep(0)

    headers = [(b"content-type", b"application/json"), (b"host", b"localhost")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": headers}
    asyncio.run_coroutine_threadsafe(api(scope, receive, send), endpoint.loop).result(30)
    assert change(before, samples(endpoint.root), *ASKED, "status=499") == 1
    until(lambda: endpoint.service.engine.load_now == (0, 0))


def test_a_client_that_leaves_with_the_last_event_was_answered(endpoint):
    before = samples(endpoint.root)
    for _ in range(20):
        stream = endpoint.client().completions.create(model="tiny", prompt="red", max_tokens=2, stream=True)
        assert list(stream)[-1].choices[0].finish_reason
    until(lambda: change(before, samples(endpoint.root), *ASKED, "status=200") == 20)
    assert change(before, samples(endpoint.root), "raytune_ft_cancelled_total") == 0


def test_a_stream_that_ends_with_an_error_counts_as_one(tiny_model: Path, serve_here):
    config = ServingConfig(
        model_path=str(tiny_model), name="tiny", request_timeout_s=0.3, max_new_tokens=400, max_batch_size=1
    )
    with serve_here(config) as running:
        before = samples(running.root)
        asked: Any = {"model": "tiny", "prompt": "red", "n": 60, "max_tokens": 400, "stream": True}
        with pytest.raises(openai.APIError, match="no answer within"):
            list(running.client().completions.create(**asked))
        until(lambda: change(before, samples(running.root), *ASKED, "status=504") == 1)
        assert change(before, samples(running.root), *ASKED, "status=200") == 0


def test_unknown_names_from_requests_make_no_series(endpoint):
    client = endpoint.client()
    for number in range(3):
        try:
            client.models.retrieve(f"nothing-{number}")
        except openai.NotFoundError as error:
            assert "nothing" in str(error)
    assert not [key for key in samples(endpoint.root) if "nothing" in "".join(key)]


def test_replicas_are_told_together_each_metric_once():
    one, other = Metrics("r1"), Metrics("r2")
    one.prompt_tokens.labels("r1", "m", "").inc(3)
    other.prompt_tokens.labels("r2", "m", "").inc(4)
    text = exposition([one.series(), other.series()]).decode()
    assert text.count("# TYPE raytune_ft_prompt_tokens_total counter") == 1
    families = {family.name: family for family in text_string_to_metric_families(text)}
    values = {sample.labels["replica"]: sample.value for sample in families["raytune_ft_prompt_tokens"].samples}
    assert values == {"r1": 3, "r2": 4}


def test_the_dashboard_and_the_alerts_ask_for_series_that_exist(endpoint):
    asked: Any = {"messages": [{"role": "user", "content": "red"}], "max_tokens": 2}
    endpoint.client().chat.completions.create(model="tiny", **asked)
    metrics = endpoint.service.metrics
    metrics.cancelled.labels("r1", "tiny", "").inc(0)
    metrics.feedback.labels("r1").inc(0)
    metrics.ab_requests.labels("r1", "spring", "base", "200").inc(0)
    metrics.ab_duration.labels("r1", "spring", "base")
    metrics.ab_feedback.labels("r1", "spring", "base", "good").inc(0)
    there = {key[0] for key in samples(endpoint.root)}
    package = files("raytune_ft.serving")
    dashboard = json.loads((package / "grafana.json").read_text(encoding="utf-8"))
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries += [variable["query"] for variable in dashboard["templating"]["list"]]
    rules = yaml.safe_load((package / "alerts.yaml").read_text(encoding="utf-8"))["groups"][0]["rules"]
    queries += [rule["expr"] for rule in rules]
    assert len(queries) > 15
    named = {name for query in queries for name in NAME.findall(query)}
    assert named <= there, named - there
    assert {"raytune_ft_time_to_first_token_seconds_bucket", "raytune_ft_queued"} <= named
    assert all({"alert", "expr", "for", "labels", "annotations"} <= set(rule) for rule in rules)

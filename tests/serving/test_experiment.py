"""An A/B test on one replica over real HTTP: who is answered by what, and what is written down of it."""

from __future__ import annotations

import http.client
import json
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from raytune_ft.cli import run_verb
from raytune_ft.core.errors import ConfigError, ServingError
from raytune_ft.serving.app import _placed
from raytune_ft.serving.assignment import assign
from raytune_ft.serving.choice import check_config
from raytune_ft.serving.config import ServingConfig
from raytune_ft.serving.experiment import Experiment
from raytune_ft.serving.keys import hashed
from raytune_ft.serving.metrics import Metrics
from raytune_ft.serving.run import _tell_test

ASKED: Any = [{"role": "user", "content": "What is the capital of France?"}]
SECRET = "ada@example.org"


@pytest.fixture(scope="module")
def tested(
    tiny_model: Path, adapters: Path, tmp_path_factory: pytest.TempPathFactory, serve_here: Any
) -> Iterator[Any]:
    config = ServingConfig(
        model_path=str(tiny_model),
        name="tiny",
        adapters={"a": str(adapters / "a"), "b": str(adapters / "b")},
        max_new_tokens=64,
        max_queued_requests=64,
        admin_keys=[hashed("root")],
        ab_test={
            "name": "spring",
            "variants": {"base": 0.5, "a": 0.5},
            "log_path": str(tmp_path_factory.mktemp("kept") / "ab"),
            "subject_header": "X-User",
        },
        feedback_path=str(tmp_path_factory.mktemp("feedback")),
    )
    with serve_here(config) as running:
        yield running


def ask(client: openai.OpenAI, *, model: str = "tiny", **options: Any) -> Any:
    settings = {"temperature": 0, "max_tokens": 8, **options}
    return client.chat.completions.create(model=model, messages=ASKED, **settings)


def lines(running: Any) -> list[dict[str, Any]]:
    folder = Path(running.service.config.ab_test.log_path)
    found = sorted(folder.glob("*.jsonl")) if folder.is_dir() else []
    return [json.loads(line) for file in found for line in file.read_text().splitlines()]


def until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def user_of(running: Any, variant: str) -> str:
    """A user that the test gives this variant."""
    test = running.service.config.ab_test
    return next(name for name in map(str, range(100)) if assign(test, name).variant == variant)


def test_both_variants_answer_in_one_endpoint_and_a_user_stays_with_one(tested: Any):
    client = tested.client()
    pinned = {name: ask(client, model=f"tiny:{name}").choices[0].message.content for name in ("base", "a")}
    assert pinned["base"] != pinned["a"]
    users = [str(number) for number in range(16)] * 2
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda user: ask(client, user=user), users))
    assert {answer.model for answer in found} == {"tiny:base", "tiny:a"}
    assert [answer.model for answer in found[:16]] == [answer.model for answer in found[16:]]
    for user, answer in zip(users, found, strict=True):
        variant = assign(tested.service.config.ab_test, user).variant
        assert answer.model == f"tiny:{variant}"
        assert answer.choices[0].message.content == pinned[variant]


def test_an_answers_headers_and_its_line_name_test_variant_and_no_user(tested: Any):
    before = len(lines(tested))
    raw = tested.client().chat.completions.with_raw_response.create(
        model="tiny", messages=ASKED, max_tokens=5, user=SECRET
    )
    answer, (line,) = raw.parse(), lines(tested)[before:]
    variant = answer.model.removeprefix("tiny:")
    assert (raw.headers["x-raytune-test"], raw.headers["x-raytune-variant"]) == ("spring", variant)
    assert set(line) == {
        "time", "test", "variant", "subject", "sticky", "status", "latency_s", "first_token_s", "control", "shares",
        "id", "finish_reason", "prompt_tokens", "completion_tokens",
    }  # fmt: skip
    assert (line["test"], line["variant"], line["status"], line["id"]) == ("spring", variant, 200, answer.id)
    assert (line["sticky"], line["control"], line["shares"]) == (True, "base", {"base": 0.5, "a": 0.5})
    assert (line["prompt_tokens"], line["completion_tokens"]) == (
        answer.usage.prompt_tokens, answer.usage.completion_tokens
    )  # fmt: skip
    assert line["finish_reason"] == answer.choices[0].finish_reason
    assert 0 < line["first_token_s"] <= line["latency_s"]
    written = json.dumps(lines(tested))
    assert SECRET not in written
    assert "capital" not in written


def test_a_newer_field_or_a_gateways_header_says_who_asks_where_user_is_not_given(tested: Any):
    client = tested.client()
    before = len(lines(tested))
    named = ({"user": "ada"}, {"extra_body": {"safety_identifier": "ada"}}, {"extra_headers": {"x-user": "ada"}})
    for options in (*named, {"user": "ada", "extra_headers": {"x-user": "eve"}}, {}, {}):
        ask(client, **options)
    *of_ada, fifth, sixth = lines(tested)[before:]
    assert len({line["subject"] for line in of_ada}) == 1
    assert [line["sticky"] for line in (*of_ada, fifth, sixth)] == [True] * 4 + [False] * 2
    assert len({fifth["subject"], sixth["subject"], of_ada[0]["subject"]}) == 3


def test_streams_and_completions_take_part(tested: Any):
    client = tested.client()
    before = len(lines(tested))
    variant = assign(tested.service.config.ab_test, "eve").variant
    stream = client.chat.completions.create(model="tiny", messages=ASKED, max_tokens=6, stream=True, user="eve")
    assert stream.response.headers["x-raytune-variant"] == variant
    chunks = list(stream)
    assert {chunk.model for chunk in chunks} == {f"tiny:{variant}"}
    text = client.completions.create(model="tiny", prompt=["red", "blue"], n=2, max_tokens=3, user="eve")
    one, other = lines(tested)[before:]
    assert [one["id"], other["id"]] == [chunks[0].id, text.id]
    assert [one["variant"], other["variant"]] == [variant, variant]
    assert other["completion_tokens"] == text.usage.completion_tokens


def test_requests_that_name_a_variant_or_another_adapter_are_outside_the_test(tested: Any):
    client = tested.client()
    before = len(lines(tested))
    for model in ("tiny:base", "tiny:a", "tiny:b"):
        answer = tested.client().chat.completions.with_raw_response.create(
            model=model, messages=ASKED, max_tokens=3, user=SECRET
        )
        assert answer.parse().model == model
        assert "x-raytune-variant" not in answer.headers
    assert len(lines(tested)) == before
    assert [card.id for card in client.models.list()] == ["tiny", "tiny:base", "tiny:a", "tiny:b"]
    assert client.models.retrieve("tiny:base").id == "tiny:base"


def test_a_request_that_fails_is_written_down_once_with_its_status(tested: Any):
    client = tested.client()
    before = len(lines(tested))
    user = user_of(tested, "a")
    with pytest.raises(openai.BadRequestError):
        ask(client, user=user, max_tokens=100_000)
    until(lambda: len(lines(tested)) > before)
    (line,) = lines(tested)[before:]
    assert (line["variant"], line["status"], line["first_token_s"]) == ("a", 400, None)
    assert "id" not in line
    with pytest.raises(openai.BadRequestError, match="user"):
        ask(client, extra_body={"user": 7})
    assert len(lines(tested)) == before + 1, "a body that is no request was given no variant"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_is_written_down(tested: Any, stream: bool):
    before = len(lines(tested))
    body = {"model": "tiny", "messages": ASKED, "max_tokens": 64, "stream": stream, "user": "u", "n": 60}
    connection = http.client.HTTPConnection(tested.root.removeprefix("http://"), timeout=30)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    until(lambda: sum(tested.service.engine.load_now) >= 4)
    connection.sock.close()
    connection.close()
    until(lambda: len(lines(tested)) > before)
    (line,) = lines(tested)[before:]
    assert (line["status"], "id" in line) == (499, False)
    until(lambda: tested.service.engine.load_now == (0, 0))


def test_a_variant_cannot_be_dropped_while_the_test_runs(tested: Any):
    request = urllib.request.Request(
        f"{tested.root}/admin/adapters/a", method="DELETE", headers={"Authorization": "Bearer root"}
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=30)
    assert refused.value.code == 409
    assert "is a variant of the A/B test" in refused.value.read().decode()


def counted(running: Any, name: str, **labels: str) -> float:
    """The sum of a metric's samples with these labels."""
    with urllib.request.urlopen(f"{running.root}/metrics", timeout=30) as answer:
        found = [line for line in answer.read().decode().splitlines() if line.startswith(f"raytune_ft_{name}_total")]
    wanted = [f'{label}="{value}"' for label, value in labels.items()]
    return sum(float(line.split()[-1]) for line in found if all(label in line for label in wanted))


def test_requests_are_counted_by_variant(tested: Any):
    before = counted(tested, "ab_requests", variant="a")
    ask(tested.client(), user=user_of(tested, "a"))
    ask(tested.client(), user=user_of(tested, "base"))
    ask(tested.client(), model="tiny:a")
    assert counted(tested, "ab_requests", variant="a") == before + 1


def test_feedback_is_counted_by_the_variant_that_the_answer_names(tested: Any):
    said = [
        {"rating": "up"}, {"rating": 5}, {"rating": 1}, {"rating": 3}, {"correction": "Paris."},
        {"preferred": "Paris", "rejected": "Rome"},
    ]  # fmt: skip
    answer = ask(tested.client(), user=user_of(tested, "a"))
    for judgement in said:
        for model in (answer.model, "tiny", "tiny:b", None):
            body = {"messages": ASKED, "response": "x", "model": model, **judgement}
            request = urllib.request.Request(
                f"{tested.root}/v1/feedback", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            assert urllib.request.urlopen(request, timeout=30).status == 201
    assert [counted(tested, "ab_feedback", verdict=verdict) for verdict in ("good", "bad", "neither")] == [2, 2, 2]
    assert counted(tested, "ab_feedback", variant="a", test="spring") == 6


def test_a_test_under_a_name_of_its_own_leaves_the_models_name_alone(
    tiny_model: Path, adapters: Path, tmp_path: Path, serve_here: Any
):
    test = {"name": "t", "variants": {"base": 0.5, "a": 0.5}, "log_path": str(tmp_path / "ab"), "model": "tiny-ab"}
    config = ServingConfig(model_path=str(tiny_model), name="tiny", adapters={"a": str(adapters / "a")}, ab_test=test)
    with serve_here(config) as running:
        client = running.client()
        assert ask(client, user="x").model == "tiny"
        assert ask(client, user="x", model="tiny-ab").model in {"tiny:base", "tiny:a"}
        assert [line["status"] for line in lines(running)] == [200]
        assert "tiny-ab" in [card.id for card in client.models.list()]


def test_an_answer_is_not_withheld_where_its_line_cannot_be_written(
    tiny_model: Path, adapters: Path, tmp_path: Path, serve_here: Any
):
    (tmp_path / "file").write_text("no folder")
    test = {"name": "t", "variants": {"base": 0.5, "a": 0.5}, "log_path": str(tmp_path / "file")}
    config = ServingConfig(model_path=str(tiny_model), name="tiny", adapters={"a": str(adapters / "a")}, ab_test=test)
    with serve_here(config) as running:
        assert ask(running.client()).choices
        with urllib.request.urlopen(f"{running.root}/metrics", timeout=30) as answer:
            assert 'raytune_ft_ab_lost_total{replica="r1"} 1.0' in answer.read().decode()


def serving(**changes: Any) -> ServingConfig:
    test = {"name": "t", "variants": {"base": 0.5, "new": 0.5}, "log_path": "log", **changes.pop("test", {})}
    return ServingConfig(**{"model_path": "m", "name": "m", "adapters": {"new": "x"}, "ab_test": test, **changes})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"adapters": {"other": "x"}}, r"variants: 'new' is not served here \(there is base, other\); add it to"),
        ({"adapters": {"new": "x", "base": "y"}}, "'base' names the model without an adapter"),
        ({"test": {"model": "m:new"}}, "'m:new' would ask for one adapter"),
        ({"test": {"log_path": ""}}, "ab_test.log_path: must not be empty"),
        ({"test": {"shares": {}}}, "ab_test.shares: there is no such setting"),
    ],
)
def test_a_test_of_what_is_not_served_is_refused_in_one_line(changes: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said) as refused:
        serving(**changes)
    assert refused.value.exit_code == 2
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("test", "said"),
    [
        ("{name: t, variants: {base: 0.5, new: 0.5}}", "ab_test.log_path: is required and was not given"),
        ("{name: t, variants: {base: 50, new: 50}, log_path: x}", "ab_test.variants: base: a share must be above 0"),
        ("{name: t, variants: {base: 0.5, newer: 0.5}, log_path: x}", "ab_test.variants: 'newer' is not served here"),
        ("{name: t, variant: {}, log_path: x}", "ab_test.variant: there is no such setting; did you mean variants?"),
    ],
)
def test_a_settings_file_with_a_mistake_is_told_and_exit_code_2(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, test: str, said: str
):
    monkeypatch.setattr("raytune_ft.exits.set_up_logging", lambda: None)
    (tmp_path / "serve.yaml").write_text(f"model_path: m\nadapters: {{new: x}}\nab_test: {test}\n")
    assert run_verb("serve", [str(tmp_path / "serve.yaml")]) == 2
    message = capfd.readouterr().err
    assert said in message and "Traceback" not in message


def test_vllm_runs_no_test(tiny_model: Path, adapters: Path):
    config = serving(model_path=str(tiny_model), adapters={"new": str(adapters / "a")}, engine="vllm")
    with pytest.raises(
        ServingError, match="engine: vllm knows no ab_test, adapters; set engine: transformers"
    ) as error:
        check_config(config)
    assert error.value.exit_code == 2


def test_a_replica_gets_an_absolute_folder_and_the_salt():
    placed = _placed(serving(test={"salt": "pepper"}))
    assert placed.ab_test is not None
    assert Path(placed.ab_test.log_path).is_absolute()
    assert placed.ab_test.salt.get_secret_value() == "pepper"
    assert "pepper" not in repr(placed)


def test_the_endpoint_says_what_it_splits_and_that_ratings_will_be_missing(caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO", logger="raytune_ft"):
        _tell_test(serving())
        _tell_test(ServingConfig(model_path="m"))
    assert caplog.messages == [
        "A/B test 't' splits requests for 'm': base 50%, new 50%; log in log",
        "feedback_path is not set: the A/B test will know errors and times, but no ratings",
    ]


def test_without_a_test_nobody_is_given_a_variant():
    experiment = Experiment(ServingConfig(model_path="m"), Metrics("r1"))
    assert experiment.enter("m", "ada", {}) is None
    assert experiment.headers(None) == {}

"""Whatever comes in, nothing is answered with a 500, and every error has OpenAI's shape."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raytune_ft.serving.config import ServingConfig
from raytune_ft.serving.keys import hashed

EXAMPLES = settings(
    max_examples=60, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TEXT = st.text(st.characters(codec=None), max_size=20)  # lone surrogates, too
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
KNOWN_WORDS = st.sampled_from(["tiny", "tiny:a", "user", "assistant", "system", "tool", "text", "red", ""])


@pytest.fixture(scope="module")
def fuzzed(
    tiny_model: Path, adapters: Path, tmp_path_factory: pytest.TempPathFactory, serve_here: Any
) -> Iterator[Any]:
    config = ServingConfig(
        model_path=str(tiny_model), name="tiny", max_new_tokens=4, max_queued_requests=8, max_request_mb=0.5,
        admin_keys=[hashed("root")], adapters={"a": str(adapters / "a")}, adapters_path=str(adapters), max_adapters=2,
        feedback_path=str(tmp_path_factory.mktemp("feedback")),
    )  # fmt: skip
    with serve_here(config) as running:
        yield running


@pytest.fixture(scope="module")
def schema(fuzzed: Any) -> dict[str, Any]:
    status, body = send(fuzzed.root, "GET", "/openapi.json")
    assert status == 200
    return json.loads(body)


def send(root: str, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(root.removeprefix("http://"), timeout=60)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json", **headers})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def fits(node: dict[str, Any], whole: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values that a node of the OpenAPI schema allows, near enough; what it forbids comes from `ANYTHING`."""
    if "$ref" in node:
        return fits(whole["components"]["schemas"][node["$ref"].rpartition("/")[2]], whole)
    if "anyOf" in node:
        return st.one_of([fits(choice, whole) for choice in node["anyOf"]])
    if "enum" in node or "const" in node:
        return st.sampled_from(node.get("enum", [node.get("const")]))
    match node.get("type"):
        case "string":
            return KNOWN_WORDS | TEXT
        case "integer":
            return st.integers(int(node.get("minimum", -5)), int(node.get("maximum", 400)))
        case "number":
            return st.floats(node.get("minimum", -1), node.get("maximum", 3), allow_nan=False)
        case "boolean":
            return st.booleans()
        case "array":
            return st.lists(fits(node["items"], whole), max_size=3)
        case "object":
            return fields(node, whole)
    return st.none()


def fields(node: dict[str, Any], whole: dict[str, Any]) -> st.SearchStrategy[Any]:
    needed = set(node.get("required", ()))
    every = {name: fits(inner, whole) for name, inner in node.get("properties", {}).items()}
    return st.fixed_dictionaries(
        {name: value for name, value in every.items() if name in needed},
        optional={name: value for name, value in every.items() if name not in needed},
    )


def answered(running: Any, method: str, path: str, body: bytes | None, **headers: str) -> int:
    status, text = send(running.root, method, path, body, **headers)
    assert status < 500, text
    if status >= 400:
        assert set(json.loads(text)["error"]) == {"message", "type", "param", "code"}
    return status


def asked_for(operation: dict[str, Any], whole: dict[str, Any]) -> st.SearchStrategy[Any]:
    return fits(operation["requestBody"]["content"]["application/json"]["schema"], whole)


TURNS = [{"role": "user", "content": "red"}]
RIGHT = {
    "/v1/chat/completions": {"model": "tiny", "messages": TURNS, "max_tokens": 2},
    "/v1/completions": {"model": "tiny", "prompt": "red", "max_tokens": 2},
    "/v1/feedback": {"messages": TURNS, "response": "blue", "rating": "up"},
    "/admin/adapters": {"name": "b"},
}


@pytest.mark.parametrize("path", RIGHT)
def test_bodies_by_the_schema_and_beside_it_are_answered(fuzzed: Any, schema: dict[str, Any], path: str):
    good = asked_for(schema["paths"][path]["post"], schema)
    found: set[int] = set()

    @EXAMPLES
    @given(st.data())
    def send_one(data: st.DataObject) -> None:
        body = dict(RIGHT[path]) if data.draw(st.booleans(), label="right but for one field") else data.draw(good)
        if data.draw(st.booleans(), label="beside the schema"):
            name = data.draw(st.sampled_from([*body, "unknown"]) | TEXT)
            body[name] = data.draw(ANYTHING)
        elif "model" in body:
            body["model"] = "tiny"
        headers = {"Authorization": "Bearer root"} if path.startswith("/admin") else {}
        found.add(answered(fuzzed, "POST", path, json.dumps(body).encode(), **headers))

    send_one()
    assert 400 in found
    assert found & {200, 201}, "nothing was ever accepted"
    assert send(fuzzed.root, "GET", "/ready")[0] == 200


def test_bytes_paths_and_methods_of_any_kind_are_answered(fuzzed: Any, schema: dict[str, Any]):
    paths = st.sampled_from(list(schema["paths"])) | st.text("abc/.%:{}", max_size=30).map(lambda text: "/" + text)

    @EXAMPLES
    @given(st.sampled_from(["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"]), paths, st.binary(max_size=200))
    def send_one(method: str, path: str, body: bytes) -> None:
        answered(fuzzed, method, path, body)

    send_one()
    assert send(fuzzed.root, "GET", "/ready")[0] == 200

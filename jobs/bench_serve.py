"""Measures an endpoint against the bare engine, an empty Serve endpoint and `transformers serve`, in one run.

python jobs/bench_serve.py [--part all|overhead|vllm] [--model starter:smollm2-135m] [--clients 1,8,32] [--tokens 32]
    [--requests 2] [--repeats 3] [--no-peer] [--allow-busy]

Every contestant has one thread for the model. Turns are interleaved; a figure is the median over the repeats.

Part `overhead` asks for one token: of the engine in this process (chat template and tokenizer included), of the
endpoint, and nothing of an empty FastAPI deployment on the same Ray Serve. What the endpoint takes beyond the sum of
the other two is its own: checks, JSON, the queue, the events. Part `vllm` sets vLLM behind Ray Serve against
`vllm serve`, in an environment that has it (.ci/vllm-env).
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # This checkout, in the place of jobs/, where evaluate.py would stand in for the package of that name.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from jobs.bench_machine import measured

QUESTIONS = [
    "Write a sentence about the sea.",
    "What is the capital of France, and what is it known for?",
    "Explain in plain words how a bicycle stays upright when it is moving.",
    "List three uses of a brick.",
    "Tell me about the history of bread, from the first ovens to the bakeries of our time, in a few sentences.",
]
Turn = Callable[[int], tuple[int, float]]
"""Asks with so many clients at a time; the tokens that came, and the seconds that it took."""


def messages(number: int) -> list[dict[str, str]]:
    """The conversation of request `number`; no two are the same."""
    return [{"role": "user", "content": f"{number}. {QUESTIONS[number % len(QUESTIONS)]}"}]


def bench(
    model: str, clients: list[int], tokens: int, requests: int, repeats: int, *, with_peer: bool
) -> dict[str, Any]:
    """Throughput of every contestant at each number of clients, and what an endpoint adds to one short request."""
    from raytune_ft.models.references import resolve_model
    from raytune_ft.serving.config import ServingConfig
    from raytune_ft.serving.run import ModelServer

    folder = resolve_model(model).base
    config = ServingConfig(model_path=folder, name="bench", port=0, max_batch_size=max(clients))
    with ExitStack() as stack:
        engine = stack.enter_context(bare_engine(folder, max(clients)))
        server = stack.enter_context(ModelServer(config))
        empty = start_empty(server.url)
        body = {"model": "bench", "temperature": 0, "max_tokens": tokens}
        turns: dict[str, Turn] = {
            "bare engine in process": lambda count: by_engine(engine, count, requests, tokens),
            "endpoint": lambda count: over_http(server.url, body, count, requests),
            "endpoint, streamed": lambda count: over_http(server.url, {**body, "stream": True}, count, requests),
        }
        if with_peer:
            other = stack.enter_context(peer(["transformers", "serve", "--device", "cpu"]))
            turns["transformers serve"] = lambda count: over_http(other, {**body, "model": folder}, count, requests)
        found = interleaved(turns, clients, repeats)
        added = overhead(engine, server.url, empty, repeats)
    show(found, clients)
    show_overhead(added)
    return {"model": model, "tokens": tokens, "requests": requests, "tokens_per_s": found, "short_request_ms": added}


def bench_overhead(model: str, repeats: int) -> dict[str, Any]:
    """What an endpoint adds to one short request, alone."""
    from raytune_ft.models.references import resolve_model
    from raytune_ft.serving.config import ServingConfig
    from raytune_ft.serving.run import ModelServer

    folder = resolve_model(model).base
    with (
        bare_engine(folder, 8) as engine,
        ModelServer(ServingConfig(model_path=folder, name="bench", port=0)) as server,
    ):
        added = overhead(engine, server.url, start_empty(server.url), repeats)
    show_overhead(added)
    return {"model": model, "short_request_ms": added}


def bench_vllm(model: str, clients: list[int], tokens: int, requests: int, repeats: int) -> dict[str, Any]:
    """Throughput of vLLM behind Ray Serve and of `vllm serve`, at each number of clients."""
    from raytune_ft.models.references import resolve_model
    from raytune_ft.serving.config import ServingConfig
    from raytune_ft.serving.run import ModelServer

    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}  # for both, and for Ray's workers
    folder = resolve_model(model).base
    body = {"model": "bench", "temperature": 0, "max_tokens": tokens}
    config = ServingConfig(model_path=folder, name="bench", port=0, engine="vllm", max_batch_size=max(clients))
    # What `vllm serve` runs; that command itself looks for a package named vllm, which the one for CPUs is not.
    served = ["python", "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--served-model-name", "bench"]
    served += ["--dtype", "float32", "--enforce-eager", "--max-num-seqs", str(max(clients))]
    with peer(served) as other, ModelServer(config) as server:
        turns: dict[str, Turn] = {
            "vllm serve": lambda count: over_http(other, body, count, requests),
            "vLLM behind Ray Serve": lambda count: over_http(server.url, body, count, requests),
        }
        found = interleaved(turns, clients, repeats)
    show(found, clients)
    return {"model": model, "tokens": tokens, "requests": requests, "tokens_per_s": found}


def interleaved(turns: dict[str, Turn], clients: list[int], repeats: int) -> dict[str, dict[int, list[float]]]:
    """Tokens per second of each turn; the order changes from repeat to repeat."""
    found: dict[str, dict[int, list[float]]] = {name: {count: [] for count in clients} for name in turns}
    for turn in turns.values():
        turn(1)
    for repeat in range(repeats):
        names = list(turns)
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            for count in clients:
                tokens, seconds = turns[name](count)
                found[name][count].append(tokens / seconds)
                print(f"  {repeat + 1}. {name}, {count} clients: {tokens / seconds:.1f} tokens/s", flush=True)
    return found


@contextmanager
def bare_engine(folder: str, batch: int) -> Iterator[Any]:
    """The engine of the endpoint, in this process."""
    from raytune_ft.serving.engines import TransformersEngine

    engine = TransformersEngine.load(folder, device="cpu", max_batch_size=batch)
    yield engine
    engine.close()


def by_engine(engine: Any, count: int, requests: int, tokens: int) -> tuple[int, float]:
    """`count` callers, each with `requests` requests one after another."""
    from raytune_ft.core.records import Message
    from raytune_ft.models.config import DecodingConfig
    from raytune_ft.serving.tickets import GenerationRequest

    async def caller(number: int) -> int:
        total = 0
        for place in range(requests):
            turn = [Message(**turn) for turn in messages(number * requests + place)]
            asked = GenerationRequest(engine.prompt_ids(turn), DecodingConfig(max_new_tokens=tokens))
            total += (await engine.answer(asked))[-1].tokens
        return total

    async def together() -> int:
        return sum(await asyncio.gather(*(caller(number) for number in range(count))))

    began = time.perf_counter()
    total = asyncio.run(together())
    return total, time.perf_counter() - began


def over_http(url: str, body: dict[str, Any], count: int, requests: int) -> tuple[int, float]:
    """As `by_engine`, each caller on a connection of its own."""

    def caller(number: int) -> int:
        connection = http.client.HTTPConnection(url.split("/")[2], timeout=600)
        total = sum(
            ask(connection, {**body, "messages": messages(number * requests + place)}) for place in range(requests)
        )
        connection.close()
        return total

    began = time.perf_counter()
    with ThreadPoolExecutor(count) as pool:
        total = sum(pool.map(caller, range(count)))
    return total, time.perf_counter() - began


def ask(connection: http.client.HTTPConnection, body: dict[str, Any]) -> int:
    """Tokens of one answer; of a stream, by the usage at its end."""
    if body.get("stream"):
        body = {**body, "stream_options": {"include_usage": True}}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    text = answer.read().decode()
    if answer.status != 200:
        raise SystemExit(f"HTTP {answer.status}: {text[:500]}")
    if not body.get("stream"):
        return int(json.loads(text)["usage"]["completion_tokens"])
    events = [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]
    return next(int(event["usage"]["completion_tokens"]) for event in reversed(events) if event.get("usage"))


def start_empty(url: str) -> str:
    """An endpoint on the same Ray Serve that does nothing; its URL."""
    from fastapi import FastAPI
    from ray import serve

    def build() -> FastAPI:
        api = FastAPI()

        @api.post("/")
        async def nothing() -> dict[str, str]:
            return {}

        return api

    deployment: Any = serve.deployment(serve.ingress(build)())
    serve.run(deployment.options(ray_actor_options={"num_cpus": 0}).bind(), name="empty", route_prefix="/empty")
    return url.removesuffix("/v1") + "/empty/"


def overhead(engine: Any, url: str, empty: str, repeats: int) -> dict[str, float]:
    """Medians, in ms, of a request for one token: by the engine, over the endpoint, and of an empty endpoint."""
    connection = http.client.HTTPConnection(url.split("/")[2], timeout=60)
    body = {"model": "bench", "temperature": 0, "max_tokens": 1}
    times: dict[str, list[float]] = {"engine": [], "endpoint": [], "empty endpoint": []}

    def nothing() -> None:
        connection.request("POST", "/" + empty.split("/", 3)[3], "{}", {"Content-Type": "application/json"})
        connection.getresponse().read()

    acts = {
        "engine": lambda: by_engine(engine, 1, 1, 1),
        "endpoint": lambda: ask(connection, {**body, "messages": messages(0)}),
        "empty endpoint": nothing,
    }
    for _ in range(20 * repeats):
        for name, act in acts.items():
            began = time.perf_counter()
            act()
            times[name].append(1000 * (time.perf_counter() - began))
    return {name: statistics.median(found) for name, found in times.items()}


@contextmanager
def peer(command: list[str]) -> Iterator[str]:
    """Another server, a program beside this interpreter, on a free port; its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    name, *settings = command
    program = [str(Path(sys.executable).with_name(name)), *settings, "--port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(program, env=environment, **quiet)  # type: ignore[call-overload]
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=5).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"{' '.join(command)} did not start; is it installed here?") from None
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(30)


def show(found: dict[str, dict[int, list[float]]], clients: list[int]) -> None:
    """Prints the table; shares are of the first contestant."""
    first = next(iter(found))
    print(f"\n{f'tokens/s (of {first})':32}" + "".join(f"{f'{count} clients':>18}" for count in clients))
    bare = found[first]
    for name, by_count in found.items():
        cells = []
        for count in clients:
            # The ratio within each repeat, then its median: the machine's speed differs between repeats.
            ratio = statistics.median(a / b for a, b in zip(by_count[count], bare[count], strict=True))
            cells.append(f"{statistics.median(by_count[count]):9.1f} ({ratio:5.0%})")
        print(f"{name:32}" + "".join(f"{cell:>18}" for cell in cells))


def show_overhead(added: dict[str, float]) -> None:
    """Prints what a request for one token takes."""
    beyond = added["endpoint"] - added["engine"] - added["empty endpoint"]
    print("\nA request for one token, median ms: " + ", ".join(f"{name} {ms:.1f}" for name, ms in added.items()))
    print(f"The endpoint adds {beyond:+.1f} ms to the engine and an empty endpoint")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["all", "overhead", "vllm"], default="all")
    parser.add_argument("--model", default="starter:smollm2-135m")
    parser.add_argument("--clients", default="1,8,32", help="numbers of clients at a time")
    parser.add_argument("--tokens", type=int, default=32, help="most tokens of an answer")
    parser.add_argument("--requests", type=int, default=2, help="requests of each client, one after another")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-peer", action="store_true", help="without transformers serve")
    parser.add_argument("--allow-busy", action="store_true", help="measure although other programs run")
    given = parser.parse_args()
    clients = [int(count) for count in given.clients.split(",")]
    sizes = (given.tokens, given.requests, given.repeats)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "all": lambda: bench(given.model, clients, *sizes, with_peer=not given.no_peer),
        "overhead": lambda: bench_overhead(given.model, given.repeats),
        "vllm": lambda: bench_vllm(given.model, clients, *sizes),
    }
    name = "bench_serve" if given.part == "all" else f"bench_serve_{given.part}"
    return measured(name, parts[given.part], allow_busy=given.allow_busy)


if __name__ == "__main__":
    sys.exit(main())

"""An endpoint without Ray: the service of one replica behind a real HTTP server in this process."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from raytune_ft.serving.board import Board
from raytune_ft.serving.config import ServingConfig
from raytune_ft.serving.service import Service

ENDPOINT_TOKENS = 96


@dataclass(frozen=True)
class Running:
    """A service, its base address, and the event loop that it answers in."""

    service: Service
    root: str
    loop: asyncio.AbstractEventLoop

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.root}/v1", api_key=key, max_retries=0, timeout=60)


@contextmanager
def serving(config: ServingConfig) -> Iterator[Running]:
    """The service of `config` on a free port, for as long as the block."""
    import uvicorn

    from raytune_ft.serving.routes import build_api
    from raytune_ft.serving.start import start_service

    service = start_service(config, config.model_path, "cpu", replica="r1", board=Board(config.adapters))
    server = uvicorn.Server(uvicorn.Config(build_api(service), log_level="error", timeout_graceful_shutdown=2))
    loop = asyncio.new_event_loop()
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=lambda: loop.run_until_complete(server.serve(sockets=[listening])))
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield Running(service, f"http://127.0.0.1:{listening.getsockname()[1]}", loop)
        finally:
            server.should_exit = True
            thread.join(30)
            service.close()
            loop.close()


def make_adapter(base: Path, folder: Path, *, seed: int = 0, rank: int = 4, kind: str = "lora") -> Path:
    """An adapter upon `base` whose random weights are large enough to change its answers."""
    import torch

    from raytune_ft.models.adapters import add_lora, add_virtual_tokens, save_adapter
    from raytune_ft.models.loading import load_model

    loaded = load_model(str(base), device="cpu")
    if kind == "lora":
        model = add_lora(
            loaded.model, rank=rank, alpha=2 * rank, dropout=0.0, target_modules="all-linear", seed=seed, base=str(base)
        )
    else:
        model = add_virtual_tokens(loaded.model, kind=kind, count=5, seed=seed, base=str(base))  # type: ignore[arg-type]
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                spread = 0.2 if "lora" in name else 1.0
                parameter.copy_(spread * torch.randn_like(parameter))
    save_adapter(model, loaded.tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with LoRA adapters ``a`` and ``b`` (other rank), ``prefix`` and ``prompt``, all upon the tiny model."""
    folder = tmp_path_factory.mktemp("adapters")
    make_adapter(tiny_model, folder / "a", seed=1)
    make_adapter(tiny_model, folder / "b", seed=2, rank=7)
    make_adapter(tiny_model, folder / "prefix", seed=3, kind="prefix_tuning")
    make_adapter(tiny_model, folder / "prompt", seed=4, kind="prompt_tuning")
    return folder


@pytest.fixture(scope="session")
def new_adapter() -> Callable[..., Path]:
    """See `make_adapter`."""
    return make_adapter


@pytest.fixture(scope="session")
def serve_here() -> Any:
    """See `serving`."""
    return serving


@pytest.fixture(scope="session")
def shared_endpoint(tiny_model: Path, adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The tiny model with adapters a, b, prefix and prompt; feedback and the request log are on."""
    kept = tmp_path_factory.mktemp("kept")
    config = ServingConfig(
        model_path=str(tiny_model),
        name="tiny",
        adapters={name: str(adapters / name) for name in ("a", "b", "prefix", "prompt")},
        max_new_tokens=ENDPOINT_TOKENS,
        max_batch_size=4,
        max_queued_requests=64,
        feedback_path=str(kept / "feedback"),
        request_log_path=str(kept / "log"),
    )
    with serving(config) as running:
        yield running


@pytest.fixture
def endpoint(shared_endpoint: Running) -> Running:
    """The shared endpoint, at rest: answers that another test left would be in this one's counts and places."""
    deadline = time.monotonic() + 60
    while sum(shared_endpoint.service.engine.load_now):
        assert time.monotonic() < deadline, "another test's requests do not end"
        time.sleep(0.01)
    return shared_endpoint

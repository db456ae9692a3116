"""The HTTP application of one replica; plain FastAPI, which runs under Ray Serve and in any ASGI server."""

# No `from __future__ import annotations` here: FastAPI reads the routes' annotations, which are names of this function.
import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from raytune_ft.serving.config import ADAPTER_NAME
from raytune_ft.serving.experiment import Exposure
from raytune_ft.serving.faults import GONE, ApiError, validation_error
from raytune_ft.serving.feedback import Feedback
from raytune_ft.serving.gate import Gate
from raytune_ft.serving.protocol import ChatRequest, CompletionRequest
from raytune_ft.serving.service import Job, Service

_IN_STEP_EVERY_S = 1.0
_EVENTS = "text/event-stream"
Make = Callable[[Any, Any, Exposure | None], Coroutine[Any, Any, Job]]
"""From a request's body, its state and its exposure to what it asks of the engine."""


class _Stream(StreamingResponse):
    """Server-sent events; `end` is called also where the client goes away before the first of them is made."""

    def __init__(self, events: AsyncIterator[str], end: Callable[[], None], headers: dict[str, str]) -> None:
        super().__init__(events, media_type=_EVENTS, headers=headers)
        self._end = end

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._end()


class AdapterName(BaseModel, extra="forbid"):
    """The body of ``POST /admin/adapters``: a name, never a path."""

    name: str = Field(pattern=f"^{ADAPTER_NAME}$")


def build_api(service: Service) -> FastAPI:
    """The routes of a replica's service."""

    @asynccontextmanager
    async def in_step(api: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(_stay_in_step(service))
        yield
        task.cancel()

    api = FastAPI(title="raytune_ft", docs_url=None, redoc_url=None, lifespan=in_step)
    api.add_middleware(Gate, config=service.config, metrics=service.metrics, rates=service.rates)
    _add_errors(api)
    _add_answers(api, service)
    _add_catalogue(api, service)
    _add_state(api, service)
    return api


async def _stay_in_step(service: Service) -> None:
    while True:
        try:
            await service.catalogue.keep_in_step()
        except Exception:  # noqa: BLE001 - the board may be starting again; the next report finds it
            service.metrics.ready.labels(service.replica).set(int(service.engine.alive))
        await asyncio.sleep(_IN_STEP_EVERY_S)


async def _unless_gone(work: Coroutine[Any, Any, dict[str, Any]], request: Request) -> dict[str, Any]:
    """The body, or an end of the work when the client goes away first."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(GONE, "the client went away")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _add_errors(api: FastAPI) -> None:
    @api.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status, headers=error.headers)

    @api.exception_handler(RequestValidationError)
    async def refused(request: Request, error: RequestValidationError) -> JSONResponse:
        return await api_error(request, validation_error(list(error.errors())))

    @api.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        return await api_error(
            request, ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
        )

    @api.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return await api_error(request, ApiError(500, "the server failed on this request", kind="server_error"))


def _add_answers(api: FastAPI, service: Service) -> None:
    async def answered(make: Make, body: Any, request: Request) -> Response:
        exposure = service.experiment.enter(body.model, body.subject, request.headers)
        headers = service.experiment.headers(exposure)
        with service.experiment.watched(exposure):
            job = await make(body, request.state, exposure)
            if body.stream:
                entered = service.enter(job)
                end = partial(service.left, job, entered[1])
                return _Stream(service.streamed(job, entered), end, headers)
            return JSONResponse(await _unless_gone(service.whole(job), request), headers=headers)

    @api.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """The answer to a conversation; with ``stream``, as server-sent events."""
        return await answered(service.chat_job, body, request)

    @api.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """What the model goes on with after a text, or after token ids."""
        return await answered(service.completion_job, body, request)

    @api.post("/v1/feedback", status_code=201)
    async def feedback(body: Feedback) -> dict[str, str]:
        """Keeps what is said of an answer."""
        await service.keep_feedback(body)
        return {"status": "kept"}


def _add_catalogue(api: FastAPI, service: Service) -> None:
    @api.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The base and its adapters."""
        return {"object": "list", "data": service.catalogue.cards(service.created)}

    @api.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        """One served model by its id."""
        await service.catalogue.adapter_of(model)
        return next(card for card in service.catalogue.cards(service.created) if card["id"] == model)

    @api.get("/admin/adapters")
    async def adapters() -> dict[str, Any]:
        """What is loaded, and what could be."""
        loadable = await asyncio.to_thread(service.catalogue.loadable)
        return {"loaded": service.engine.adapters.names, "loadable": loadable}

    @api.post("/admin/adapters", status_code=201)
    async def load(body: AdapterName) -> dict[str, Any]:
        """Loads an adapter of `adapters_path`."""
        await service.catalogue.load(body.name)
        return {"loaded": service.engine.adapters.names}

    @api.delete("/admin/adapters/{name}")
    async def drop(name: str) -> dict[str, Any]:
        """Drops an adapter; requests that have it are answered."""
        await service.catalogue.drop(name)
        return {"loaded": service.engine.adapters.names}


def _add_state(api: FastAPI, service: Service) -> None:
    @api.get("/health")
    async def health() -> dict[str, str]:
        """200 while the engine's loop runs."""
        if not service.engine.alive:
            raise ApiError(503, "the engine's loop has ended", kind="server_error")
        return {"status": "ok"}

    @api.get("/ready")
    async def ready() -> dict[str, str]:
        """200 when the model is loaded and answers as it was trained."""
        return await health()

    @api.get("/metrics")
    async def metrics() -> Response:
        """Counters and latencies in Prometheus' text format."""
        return Response(service.catalogue.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    if service.config.playground:
        page = (files("raytune_ft.serving") / "playground.html").read_text(encoding="utf-8")

        @api.get("/playground", response_class=HTMLResponse)
        async def playground() -> HTMLResponse:
            """A page to chat, compare and give feedback."""
            return HTMLResponse(page)

"""The HTTP application: one Ray Serve deployment that holds the model, batches requests and speaks OpenAI's protocol.

Prompts and answers are never logged.
"""

# No `from __future__ import annotations` here: Serve sends the class by value, without the names that only quoted
# annotations use, and FastAPI would not find the type of a request's body in the replica.
import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray import serve
from starlette.exceptions import HTTPException

from raytune_ft.core.errors import DataError, RaytuneError
from raytune_ft.serving.config import ServingConfig
from raytune_ft.serving.protocol import Answer, ApiError, ChatRequest, model_card, validation_error

if TYPE_CHECKING:  # the driver imports this file, too, and needs neither torch nor transformers
    from raytune_ft.models.generation import Completion
    from raytune_ft.serving.engines import GenerationRequest, TransformersEngine

api = FastAPI(title="raytune_ft", docs_url=None, redoc_url=None)


@api.exception_handler(ApiError)
async def _api_error(request: Request, error: ApiError) -> JSONResponse:
    headers = {"Retry-After": "1"} if error.status in {429, 503} else None
    return JSONResponse(error.body, error.status, headers=headers)


@api.exception_handler(RequestValidationError)
async def _validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
    return await _api_error(request, validation_error(list(error.errors())))


@api.exception_handler(HTTPException)
async def _http_error(request: Request, error: HTTPException) -> JSONResponse:
    message = f"{request.method} {request.url.path}: {error.detail}"
    return await _api_error(request, ApiError(error.status_code, message))


@api.exception_handler(Exception)
async def _server_error(request: Request, error: Exception) -> JSONResponse:
    return await _api_error(request, ApiError(500, "the server failed on this request", kind="server_error"))


def _engine(config: ServingConfig, reference: str, device: str) -> "TransformersEngine":
    from raytune_ft.serving.engines import TransformersEngine

    return TransformersEngine.load(reference, precision=config.precision, device=device, num_threads=config.num_cpus)


@serve.deployment(graceful_shutdown_timeout_s=10, graceful_shutdown_wait_loop_s=0.2, max_constructor_retry_count=1)
@serve.ingress(api)
class Endpoint:
    """One replica: the engine, the queue before it, and the routes."""

    def __init__(self, config: ServingConfig, reference: str, device: str) -> None:
        self.config = config
        self.created = int(time.time())
        self.waiting = 0
        self.engine: TransformersEngine | None = None
        self.failure: RaytuneError | None = None
        self._completed.set_max_batch_size(config.max_batch_size)
        self._completed.set_batch_wait_timeout_s(config.batch_wait_timeout_s)
        try:
            self.engine = _engine(config, reference, device)
        except RaytuneError as error:
            # Kept for `why_not_loaded`: raised here, it would come to the user as Serve's traceback, after retries.
            self.failure = error

    def why_not_loaded(self) -> RaytuneError | None:
        """The error that loading the model ended with; None when it is loaded."""
        return self.failure

    @api.get("/health")
    async def health(self) -> dict[str, str]:
        """200 when the model is loaded."""
        self._loaded()
        return {"status": "ok"}

    @api.get("/v1/models")
    async def models(self) -> dict[str, Any]:
        """The served model."""
        return {"object": "list", "data": [model_card(self.config.served_name, self.created)]}

    @api.get("/v1/models/{model:path}")
    async def model(self, model: str) -> dict[str, Any]:
        """One served model by its id."""
        self._known(model)
        return model_card(model, self.created)

    @api.post("/v1/chat/completions")
    async def chat_completions(self, request: ChatRequest) -> Response:
        """The answer to a conversation; with ``stream``, as server-sent events with the text in one piece."""
        self._known(request.model)
        request.refuse_unsupported()
        answer = await self._answer(request)
        if request.stream:
            include_usage = request.stream_options is not None and request.stream_options.include_usage
            return StreamingResponse(answer.events(include_usage=include_usage), media_type="text/event-stream")
        return JSONResponse(answer.body())

    async def _answer(self, request: ChatRequest) -> Answer:
        from raytune_ft.serving.engines import GenerationRequest

        engine = self._loaded()
        try:
            prompt_ids = engine.prompt_ids([message.to_message() for message in request.messages])
        except DataError as error:
            raise ApiError(400, str(error), param="messages") from None
        decoding = request.decoding(
            len(prompt_ids), context_tokens=engine.context_tokens, max_new_tokens=self.config.max_new_tokens
        )
        completion = await self._queued(GenerationRequest(prompt_ids, decoding, seeded=request.seed is not None))
        return Answer(
            model=request.model,
            text=completion.text,
            finish_reason=completion.finish_reason,
            prompt_tokens=len(prompt_ids),
            completion_tokens=len(completion.token_ids),
        )

    async def _queued(self, request: "GenerationRequest") -> "Completion":
        if self.waiting >= self.config.max_queued_requests + self.config.max_batch_size:
            raise ApiError(429, "too many requests are waiting; try again later", kind="rate_limit_error")
        self.waiting += 1
        try:
            async with asyncio.timeout(self.config.request_timeout_s):
                return await self._completed(request)  # type: ignore[no-any-return]
        except TimeoutError:
            limit = self.config.request_timeout_s
            raise ApiError(504, f"no answer within {limit:g} seconds", kind="timeout_error") from None
        finally:
            self.waiting -= 1

    @serve.batch  # type: ignore[untyped-decorator]
    async def _completed(self, requests: "Sequence[GenerationRequest]") -> "list[Completion]":
        # In a thread, so that health checks and new requests are answered while tokens are made.
        return await asyncio.to_thread(self._loaded().answer, requests)

    def _loaded(self) -> "TransformersEngine":
        if self.engine is None:
            raise ApiError(503, f"the model is not loaded: {self.failure}", kind="server_error")
        return self.engine

    def _known(self, model: str) -> None:
        if model != self.config.served_name:
            raise ApiError(
                404,
                f"the model {model!r} is not served here; there is {self.config.served_name!r}",
                param="model",
                code="model_not_found",
            )

"""The Ray Serve deployments: replicas of the service, and the board that they agree by."""

# No `from __future__ import annotations` here: Serve sends the classes by value, without the names that only quoted
# annotations use.
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from ray import serve

from raytune_ft.core.errors import RaytuneError, ServingError
from raytune_ft.serving.board import Board, Posted
from raytune_ft.serving.config import ServingConfig
from raytune_ft.serving.metrics import Series


@serve.deployment(
    name="Board",
    ray_actor_options={"num_cpus": 0},
    health_check_period_s=2,
    graceful_shutdown_wait_loop_s=0.1,
    graceful_shutdown_timeout_s=2,
)
class BoardDeployment(Board):
    """The one board of an endpoint, in a process of its own."""


class Notices:
    """The board as a replica reaches it."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def report(self, replica: str, epoch: str | None, adapters: dict[str, str], series: Series) -> Posted:
        """See `Board.report`."""
        return await self._handle.report.remote(replica, epoch, adapters, series)  # type: ignore[no-any-return]

    async def post(self, name: str, reference: str) -> None:
        """See `Board.post`."""
        await self._handle.post.remote(name, reference)

    async def take_down(self, name: str) -> None:
        """See `Board.take_down`."""
        await self._handle.take_down.remote(name)


@serve.deployment(graceful_shutdown_wait_loop_s=0.2, max_constructor_retry_count=1, health_check_period_s=2)
@serve.ingress()
class Endpoint:
    """One replica: the service, and its routes."""

    def __init__(self, config: ServingConfig, reference: str, device: str, board: Any) -> None:
        from raytune_ft.serving.start import start_service

        self.service, self._config = None, config
        self.failure: RaytuneError | None = None
        replica = serve.get_replica_context().replica_id.unique_id
        try:
            self.service = start_service(config, reference, device, replica=replica, board=Notices(board))
        except RaytuneError as error:
            # Kept for `why_not_loaded`: raised here, it would come to the user as Serve's traceback, after retries.
            self.failure = error

    def __serve_build_asgi_app__(self) -> FastAPI:
        from raytune_ft.serving.routes import build_api

        return build_api(self.service) if self.service else _refusing(self.failure)

    def why_not_loaded(self) -> RaytuneError | None:
        """The error that loading the model ended with; None when it is loaded."""
        return self.failure

    def settings(self) -> ServingConfig:
        """What it was started with, paths made absolute."""
        return self._config

    def check_health(self) -> None:
        """Serve replaces a replica whose loop has ended.

        Raises:
            ServingError: if it has.
        """
        if self.service is not None and not self.service.engine.alive:
            raise ServingError("the engine's loop has ended")


def _refusing(failure: RaytuneError | None) -> FastAPI:
    """What answers in the moments until an endpoint that did not load is taken down."""
    api = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    body = {"error": {"message": f"the model is not loaded: {failure}", "type": "server_error", "param": None,
                      "code": None}}  # fmt: skip

    @api.api_route("/{path:path}", methods=["GET", "POST", "DELETE"])
    async def refuse(path: str) -> JSONResponse:
        return JSONResponse(body, 503, headers={"Retry-After": "1"})

    return api

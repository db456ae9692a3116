"""The Ray Serve applications: replicas of the service with the board that they agree by, or of vLLM."""

# No `from __future__ import annotations` here: Serve sends the classes by value, without the names that only quoted
# annotations use.
import json
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from ray import serve

from raytune_ft.core.digest import short_hash
from raytune_ft.core.errors import RaytuneError, ServingError
from raytune_ft.core.storage import Location
from raytune_ft.models.references import resolve_model
from raytune_ft.serving.board import Board, Posted, Posting
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

    async def report(self, replica: str, epoch: str | None, known: dict[str, Posting], series: Series) -> Posted:
        """See `Board.report`."""
        return await self._handle.report.remote(replica, epoch, known, series)  # type: ignore[no-any-return]

    async def post(self, name: str, reference: str) -> Posting:
        """See `Board.post`."""
        return await self._handle.post.remote(name, reference)  # type: ignore[no-any-return]

    async def take_down(self, name: str) -> Posting:
        """See `Board.take_down`."""
        return await self._handle.take_down.remote(name)  # type: ignore[no-any-return]


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


def own_application(config: ServingConfig, *, gpus: int) -> Any:
    """Replicas of our own engine, each with `gpus`, and the board that they agree by."""
    here = _placed(config)
    deployment: Any = Endpoint
    board: Any = BoardDeployment
    board = board.options(logging_config=quiet())
    return deployment.options(
        **_scale(config),
        max_ongoing_requests=2 * (config.max_queued_requests + config.max_batch_size),
        graceful_shutdown_timeout_s=config.drain_timeout_s,
        ray_actor_options={"num_cpus": config.num_cpus, "num_gpus": gpus},
        logging_config=quiet(),
    ).bind(here, here.model_path, "cuda" if gpus else "cpu", board.bind(here.adapters, _digest(here)))


def vllm_application(config: ServingConfig, *, gpus: int) -> Any:
    """vLLM replicas, each with `gpus`, behind Ray Serve's own OpenAI-compatible ingress."""
    from ray.serve.llm import LLMConfig, build_openai_app

    precision = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}.get(config.precision, "auto")
    engine_kwargs: dict[str, Any] = {"dtype": precision, "max_num_seqs": config.max_batch_size}
    bundle = {"CPU": config.num_cpus, "GPU": gpus} if gpus else {"CPU": config.num_cpus}
    if not gpus:
        engine_kwargs |= {"enforce_eager": True, "dtype": "float32" if precision == "auto" else precision}
    llm = LLMConfig(
        model_loading_config={"model_id": config.served_name, "model_source": _vllm_source(config)},
        engine_kwargs=engine_kwargs,
        placement_group_config={"bundles": [bundle]},
        deployment_config={
            **_scale(config),
            "graceful_shutdown_timeout_s": config.drain_timeout_s,
            "ray_actor_options": {"num_cpus": 0},  # the bundle holds what the engine takes
            "logging_config": quiet().model_dump(),
        },
        runtime_env={"env_vars": {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}},
    )
    # The ingress only passes on.
    light = {"ray_actor_options": {"num_cpus": 0}, "num_replicas": 1, "logging_config": quiet().model_dump()}
    return build_openai_app({"llm_configs": [llm], "ingress_deployment_config": light})


def _vllm_source(config: ServingConfig) -> str:
    """What vLLM can load itself: a folder in Hugging Face layout, a hub id, or a URI that Ray's nodes copy."""
    given = _placed(config).model_path
    return given if "://" in given else resolve_model(given).base


def _placed(config: ServingConfig) -> ServingConfig:
    """The settings with absolute paths: a replica has another working folder."""

    def absolute(where: str) -> str:
        given = Location.at(where)
        return given.uri if given.exists() else where

    folders = {
        name: Location.at(where).uri
        for name in ("adapters_path", "feedback_path", "request_log_path")
        if (where := getattr(config, name)) is not None
    }
    adapters = {name: absolute(where) for name, where in config.adapters.items()}
    changes: dict[str, Any] = {
        "model_path": absolute(config.model_path), "name": config.served_name, "adapters": adapters
    }  # fmt: skip
    if config.ab_test is not None:
        changes["ab_test"] = config.ab_test.with_overrides(log_path=Location.at(config.ab_test.log_path).uri)
    return config.with_overrides(**changes, **folders)


def _digest(config: ServingConfig) -> str:
    """16 hex digits that change with the settings."""
    return short_hash(json.dumps(config.resolved(), sort_keys=True))


def _scale(config: ServingConfig) -> dict[str, Any]:
    if config.max_replicas is None:
        return {"num_replicas": config.num_replicas}
    return {
        "autoscaling_config": {
            "min_replicas": config.num_replicas,
            "max_replicas": config.max_replicas,
            "target_ongoing_requests": config.target_ongoing_requests,
        }
    }


def quiet() -> Any:
    """What keeps a line per request out of the logs."""
    from ray.serve.schema import LoggingConfig

    return LoggingConfig(log_level="WARNING", enable_access_log=False)


def _refusing(failure: RaytuneError | None) -> FastAPI:
    """What answers in the moments until an endpoint that did not load is taken down."""
    api = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    body = {"error": {"message": f"the model is not loaded: {failure}", "type": "server_error", "param": None,
                      "code": None}}  # fmt: skip

    @api.api_route("/{path:path}", methods=["GET", "POST", "DELETE"])
    async def refuse(path: str) -> JSONResponse:
        return JSONResponse(body, 503, headers={"Retry-After": "1"})

    return api

"""Where serving meets Ray: an endpoint is started on Ray Serve, waited for, and taken down again."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from raytune_ft.core.cluster import Cluster, Demand, ResourcePlan, connect
from raytune_ft.core.errors import RaytuneError, ServingError
from raytune_ft.core.storage import Location
from raytune_ft.models.loading import resolve_model
from raytune_ft.serving.address import free_port, root_url, wait_until_it_serves
from raytune_ft.serving.choice import check_config, choose_engine
from raytune_ft.serving.config import Engine, ServingConfig

logger = logging.getLogger("raytune_ft")

_APPLICATION = "raytune_ft"


class ModelServer:
    """A model behind an OpenAI-compatible endpoint, for as long as the ``with`` block (or until `stop`).

    ```
    with ModelServer(ServingConfig(model_path="tuned")) as server:
        client = openai.OpenAI(base_url=server.url, api_key="none")
    ```
    """

    def __init__(self, config: ServingConfig) -> None:
        self.config = config
        self.url = ""
        self._started = False
        self._ended = threading.Event()

    def start(self) -> str:
        """Starts the endpoint and returns its base URL (``http://127.0.0.1:8000/v1``) when it answers.

        Raises:
            ServingError: if the address is taken or not this machine's, the cluster has an endpoint already, or the
                endpoint does not come up in time.
            ModelError: if the model cannot be loaded.
            ClusterError: if the cluster cannot place the replicas.
        """
        if self.url:
            return self.url
        port = free_port(self.config.host, self.config.port)
        check_config(self.config)
        cluster = connect()
        cluster.admit(_plan(self.config, cluster))
        _refuse_second()
        atexit.register(self.stop)  # runs before Ray's own handler: on a joined cluster Serve would outlive us
        self._started = True
        self._ended.clear()
        root = root_url(self.config.host, port)
        try:
            _start_serve(self.config.host, port)
            _deploy(self.config, cluster)
            wait_until_it_serves(root, self.config.startup_timeout_s)
        except BaseException:
            self.stop()
            raise
        self.url = f"{root}/v1"
        logger.info("Serving %s as %r at %s", self.config.model_path, self.config.served_name, self.url)
        return self.url

    def update(self, config: ServingConfig) -> None:
        """Replaces the replicas by ones with other settings, without a failed request: those in flight are answered
        first (for at most `drain_timeout_s`), those that come meanwhile wait.

        If the new settings do not come up, the old ones are put back.

        Raises:
            ServingError: if the endpoint is not up, or host and port are not the running endpoint's.
            ModelError: if the model cannot be loaded.
        """
        if not self.url:
            raise ServingError("the endpoint is not up: call start first")
        _replace(self.config, config)
        self.config = config
        logger.info("Serving %s as %r at %s", config.model_path, config.served_name, self.url)

    def stop(self) -> None:
        """Takes the endpoint down; requests in flight are answered first, for at most `drain_timeout_s`."""
        self._ended.set()
        if not self._started:
            return
        self._started, self.url = False, ""
        atexit.unregister(self.stop)
        import ray
        from ray import serve

        if ray.is_initialized():
            serve.shutdown()

    def serve_forever(self) -> None:
        """Starts the endpoint, if it is not up, and returns when Ctrl-C or SIGTERM came or `stop` was called."""
        with self, _signals(self._ended.set):
            logger.info("Ctrl-C stops it")
            while not self._ended.wait(1.0):
                pass
            logger.info("Stopping")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def serve(config: ServingConfig) -> None:
    """Serves a model until Ctrl-C or SIGTERM; see `ModelServer`.

    On a cluster that is joined, and serves a model of this name already, it gives that endpoint these settings and
    returns; the program that started it goes on.

    Raises:
        ServingError: as `ModelServer.start` and `ModelServer.update`.
    """
    running = _running() if os.environ.get("RAY_ADDRESS") else None
    if running is None or running.served_name != config.served_name:
        ModelServer(config).serve_forever()
        return
    _replace(running, config)
    logger.info("%r is served with these settings, by the program that started it", config.served_name)


def _running() -> ServingConfig | None:
    """The settings of the endpoint that the cluster has; None if it has none, or one of vLLM's or another program's."""
    from ray import serve

    connect()
    application = serve.status().applications.get(_APPLICATION)
    if application is None or application.status != "RUNNING" or "Endpoint" not in application.deployments:
        return None
    found: ServingConfig = serve.get_app_handle(_APPLICATION).settings.remote().result(timeout_s=60)
    return found


def _replace(running: ServingConfig, config: ServingConfig) -> None:
    """Puts replicas with `config` in the place of the running ones, or leaves these if that cannot be."""
    if (config.host, config.port) != (running.host, running.port):
        raise ServingError("host and port: stay as they are while the endpoint is up; stop it to change them")
    check_config(config)
    cluster = connect()
    cluster.admit(_plan(config, cluster))
    try:
        _deploy(config, cluster)
    except RaytuneError:
        _deploy(running, cluster)
        raise


def _plan(config: ServingConfig, cluster: Cluster) -> ResourcePlan:
    replica = Demand("replica", config.most_replicas, config.num_cpus, _gpus(cluster), threads=config.num_cpus)
    return ResourcePlan(f"serve {config.model_path}", (replica,))


def _gpus(cluster: Cluster) -> int:
    return 1 if cluster.gpus else 0


def _refuse_second() -> None:
    from ray import serve

    status = serve.status()
    if status.proxies or status.applications:
        names = ", ".join(repr(name) for name in status.applications) or "none yet"
        raise ServingError(
            f"this cluster has a Ray Serve endpoint already (applications: {names}), and a cluster has one HTTP "
            "address; stop that one first (raytune-ft serve with the same name would give it other settings)"
        )


def _deploy(config: ServingConfig, cluster: Cluster) -> None:
    from ray import serve

    engine, reason = choose_engine(config, gpus=cluster.gpus > 0)
    logger.info("Engine %s: %s", engine, reason)
    own = engine is Engine.TRANSFORMERS
    application = _application(config, cluster) if own else _vllm_application(config, cluster)
    target = serve.RunTarget(application, name=_APPLICATION, route_prefix="/")
    (handle,) = serve.run_many([target], wait_for_applications_running=False)
    _wait_running(config.startup_timeout_s)
    failure: RaytuneError | None = handle.why_not_loaded.remote().result() if own else None
    if failure is not None:
        raise failure


def _application(config: ServingConfig, cluster: Cluster) -> Any:
    """Replicas of our own engine, and the board that they agree by."""
    from raytune_ft.serving.app import BoardDeployment, Endpoint

    here = _placed(config)
    deployment: Any = Endpoint
    board: Any = BoardDeployment
    board = board.options(logging_config=_quiet())
    return deployment.options(
        **_scale(config),
        max_ongoing_requests=2 * (config.max_queued_requests + config.max_batch_size),
        graceful_shutdown_timeout_s=config.drain_timeout_s,
        ray_actor_options={"num_cpus": config.num_cpus, "num_gpus": _gpus(cluster)},
        logging_config=_quiet(),
    ).bind(here, here.model_path, "cuda" if cluster.gpus else "cpu", board.bind(here.adapters))


def _vllm_application(config: ServingConfig, cluster: Cluster) -> Any:
    """vLLM replicas behind Ray Serve's own OpenAI-compatible ingress."""
    from ray.serve.llm import LLMConfig, build_openai_app

    precision = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}.get(config.precision, "auto")
    engine_kwargs: dict[str, Any] = {"dtype": precision, "max_num_seqs": config.max_batch_size}
    bundle = {"CPU": config.num_cpus, "GPU": 1} if cluster.gpus else {"CPU": config.num_cpus}
    if not cluster.gpus:
        engine_kwargs |= {"enforce_eager": True, "dtype": "float32" if precision == "auto" else precision}
    llm = LLMConfig(
        model_loading_config={"model_id": config.served_name, "model_source": _vllm_source(config)},
        engine_kwargs=engine_kwargs,
        placement_group_config={"bundles": [bundle]},
        deployment_config={
            **_scale(config),
            "graceful_shutdown_timeout_s": config.drain_timeout_s,
            "ray_actor_options": {"num_cpus": 0},  # the bundle holds what the engine takes
        },
        runtime_env={"env_vars": {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}},
    )
    light = {"ray_actor_options": {"num_cpus": 0}, "num_replicas": 1}  # it only passes on
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
    changes = {"model_path": absolute(config.model_path), "name": config.served_name, "adapters": adapters}
    return config.with_overrides(**changes, **folders)


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


def _quiet() -> Any:
    from ray.serve.schema import LoggingConfig

    return LoggingConfig(log_level="WARNING", enable_access_log=False)


def _start_serve(host: str, port: int) -> None:
    from ray import exceptions, serve
    from ray.serve.config import HTTPOptions

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    options, logging_config = HTTPOptions(host=host, port=port), _quiet()
    try:
        serve.start(proxy_location="HeadOnly", http_options=options, logging_config=logging_config)
    except (exceptions.RayActorError, TimeoutError):
        # On a busy machine Serve replaces a proxy that needs more than five seconds to start, and gives up waiting
        # for the first one. The controller lives and goes on; waiting for an answer covers the next proxy.
        serve.start(proxy_location="HeadOnly", http_options=options, logging_config=logging_config)


def _wait_running(limit_s: float) -> None:
    from ray import serve

    deadline = time.monotonic() + limit_s
    while True:
        application = serve.status().applications[_APPLICATION]
        if application.status == "RUNNING":
            return
        if application.status in {"DEPLOY_FAILED", "UNHEALTHY"}:
            faults = [d.message for d in application.deployments.values() if d.message] or [application.message]
            raise ServingError(f"the endpoint did not come up: {faults[0].strip().splitlines()[-1]}")
        if time.monotonic() > deadline:
            raise ServingError(
                f"the endpoint was not up after {limit_s:g} seconds ({application.status}); "
                "raise startup_timeout_s if the model is large"
            )
        time.sleep(0.1)


@contextmanager
def _signals(end: Callable[[], None]) -> Iterator[None]:
    """Lets Ctrl-C and SIGTERM call `end` inside the block, where this is the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, lambda *_: end())
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

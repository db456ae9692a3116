"""Where serving meets Ray: an endpoint is started on Ray Serve, waited for, and taken down again."""

from __future__ import annotations

import atexit
import logging
import signal
import threading
import time
from typing import Self

from raytune_ft.core.cluster import Cluster, connect, named_address
from raytune_ft.core.errors import RaytuneError, ServingError, first_line
from raytune_ft.core.placement import Demand, ResourcePlan
from raytune_ft.core.termination import signals_calling
from raytune_ft.serving.address import free_port, root_url, wait_until_free, wait_until_it_serves
from raytune_ft.serving.choice import check_config, choose_engine, not_under_vllm
from raytune_ft.serving.config import Engine, ServingConfig

logger = logging.getLogger("raytune_ft")

_APPLICATION = "raytune_ft"
_ENDS_WITHIN = 10.0
"""Seconds in which Ray's proxy has let go of its port, after the endpoint was taken down."""


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
        self._port = 0
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
        self._port = port = free_port(self.config.host, self.config.port)
        check_config(self.config)
        cluster = connect()
        cluster.admit(plan_of(self.config, cluster))
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
        _tell_test(self.config)
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
        _tell_test(config)

    def stop(self) -> None:
        """Takes the endpoint down; requests in flight are answered first, for at most `drain_timeout_s`."""
        self._ended.set()
        if not self._started:
            return
        self._started, self.url = False, ""
        atexit.unregister(self.stop)
        import ray
        from ray import serve

        if not ray.is_initialized():
            return
        try:
            serve.delete(_APPLICATION)  # waits for its replicas; a shutdown ends the proxy, and with it the connections
        except Exception as error:  # noqa: BLE001 - whatever keeps Ray Serve from answering, it is to end
            logger.warning("requests in flight could not be waited for: %s", first_line(error))
        serve.shutdown()
        wait_until_free(self.config.host, self._port, _ENDS_WITHIN)  # Ray does not wait for its proxy's process

    def serve_forever(self) -> None:
        """Starts the endpoint, if it is not up, and returns when Ctrl-C or SIGTERM came or `stop` was called."""
        with self, signals_calling(self._ended.set, signal.SIGINT, signal.SIGTERM):
            logger.info("Ctrl-C stops it")
            while not self._ended.wait(1.0):
                pass
            logger.info("Stopping")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self.stop()


def serve(config: ServingConfig) -> None:
    """Serves a model until Ctrl-C or SIGTERM; see `ModelServer`.

    On a cluster that is joined, and serves a model of this name already, it gives that endpoint these settings and
    returns; the program that started it goes on.

    Raises:
        ServingError: as `ModelServer.start` and `ModelServer.update`.
    """
    if named_address():
        running = _running(config.startup_timeout_s)
        if running is not None and running.served_name == config.served_name:
            _replace(running, config)
            logger.info("%r is served with these settings, by the program that started it", config.served_name)
            return
        _refuse_second()
    ModelServer(config).serve_forever()


def _tell_test(config: ServingConfig) -> None:
    if config.ab_test is None:
        return
    test = config.ab_test
    shares = ", ".join(f"{name} {share:.0%}" for name, share in test.variants.items())
    logger.info(
        "A/B test %r splits requests for %r: %s; log in %s", test.name, config.tested_name, shares, test.log_path
    )
    if config.feedback_path is None:
        logger.warning("feedback_path is not set: the A/B test will know errors and times, but no ratings")


def _running(limit_s: float) -> ServingConfig | None:
    """The settings of the endpoint that the cluster has; None if it has none, or one of vLLM's or another program's.

    One whose replicas are just started, or replaced, is waited for.

    Raises:
        ServingError: if it is being taken down, or none of its replicas is up within `limit_s`.
    """
    from ray import serve
    from ray.exceptions import RayActorError
    from ray.serve.exceptions import RayServeException

    connect()
    application = serve.status().applications.get(_APPLICATION)
    if application is None or "Endpoint" not in application.deployments:
        return None
    if application.status == "DELETING":
        raise ServingError("the endpoint of this cluster is being taken down; run the same command when it is gone")
    if application.status != "RUNNING":
        logger.info("The endpoint of this cluster is %s; waiting for a replica", application.status.value)
    try:
        found: ServingConfig = serve.get_app_handle(_APPLICATION).settings.remote().result(timeout_s=limit_s)
    except (TimeoutError, RayActorError, RayServeException) as error:
        raise ServingError(
            f"the endpoint of this cluster was {application.status.value}, and no replica answered within {limit_s:g} "
            f"seconds ({first_line(error)}); stop it, and start it with these settings"
        ) from None
    return found


def _replace(running: ServingConfig, config: ServingConfig) -> None:
    """Puts replicas with `config` in the place of the running ones, or leaves these if that cannot be."""
    if (config.host, config.port) != (running.host, running.port):
        raise ServingError("host and port: stay as they are while the endpoint is up; stop it to change them")
    check_config(config)
    cluster = connect()
    cluster.admit(plan_of(config, cluster))
    try:
        _deploy(config, cluster)
    except RaytuneError:
        _deploy(running, cluster)
        raise


def plan_of(config: ServingConfig, cluster: Cluster) -> ResourcePlan:
    """What an endpoint's replicas hold."""
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

    from raytune_ft.serving.app import own_application, vllm_application

    engine, reason = choose_engine(config, gpus=cluster.gpus > 0)
    logger.info("Engine %s: %s", engine, reason)
    own = engine is Engine.TRANSFORMERS
    if not own:
        logger.warning("%s", not_under_vllm())
    application = (own_application if own else vllm_application)(config, gpus=_gpus(cluster))
    target = serve.RunTarget(application, name=_APPLICATION, route_prefix="/")
    (handle,) = serve.run_many([target], wait_for_applications_running=False)
    _wait_running(config.startup_timeout_s)
    failure: RaytuneError | None = handle.why_not_loaded.remote().result() if own else None
    if failure is not None:
        raise failure


def _start_serve(host: str, port: int) -> None:
    from ray import exceptions, serve
    from ray.serve.config import HTTPOptions

    from raytune_ft.serving.app import quiet

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    options, logging_config = HTTPOptions(host=host, port=port), quiet()
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
                f"the endpoint was not up after {limit_s:g} seconds ({application.status.value}); "
                "raise startup_timeout_s if the model is large"
            )
        time.sleep(0.1)

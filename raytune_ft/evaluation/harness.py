"""Tasks of lm-eval, the harness that others trust, against a local model or an endpoint; its numbers as it gives them.

Biderman et al. 2024, Lessons from the Trenches on Reproducible Evaluation of Language Models.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any, Self

from raytune_ft.core.errors import ConfigError, DataError, MissingDependencyError, RaytuneError, RunError, first_line
from raytune_ft.evaluation.config import HarnessConfig
from raytune_ft.evaluation.config_inference import EndpointConfig
from raytune_ft.evaluation.workload import Target
from raytune_ft.models.config import Precision

_KEY = "OPENAI_API_KEY"
"""Where lm-eval looks for an endpoint's key."""


def require_harness(config: HarnessConfig) -> None:
    """Refuses tasks that cannot be run here, before a model is loaded.

    Raises:
        MissingDependencyError: if lm-eval is not installed.
        ConfigError: if a task is unknown.
    """
    if find_spec("lm_eval") is None:
        raise MissingDependencyError('harness: lm-eval is not installed: pip install "raytune-ft[lm-eval]"')
    manager = _manager(config)
    unknown = [task for task in config.tasks if not manager.match_tasks([task])]
    if unknown:
        where = f", nor in {config.include_path}" if config.include_path else ""
        raise ConfigError(f"harness.tasks: lm-eval has no task {', '.join(unknown)}{where}; see `lm-eval ls tasks`")


def run_harness(
    target: Target, config: HarnessConfig, precision: Precision, endpoint: EndpointConfig
) -> dict[str, dict[str, float]]:
    """Every number of every task, by task and lm-eval's own name of the metric.

    Raises:
        DataError: if a task's data is neither here nor can be fetched.
        RunError: if lm-eval fails otherwise, or cannot read what an endpoint answers.
    """
    from lm_eval import simple_evaluate

    served = (
        _endpoint_model(target, config, endpoint) if target.is_endpoint else _local_model(target, config, precision)
    )
    with _Unread() as unread, _key_of(endpoint) if target.is_endpoint else nullcontext():
        try:
            found = simple_evaluate(
                **served,
                tasks=list(config.tasks),
                num_fewshot=config.num_fewshot,
                limit=config.limit,
                task_manager=_manager(config),
                bootstrap_iters=1000,
                log_samples=False,
            )
        except RaytuneError:
            raise
        except Exception as error:
            raise _told(error, config) from error
    if unread.words:
        raise RunError(
            f"harness: lm-eval could not read {len(unread.words)} of the endpoint's answers ({unread.words[0]}), and "
            "would count them as wrong ones: the endpoint does not answer as OpenAI's does"
        )
    return numbers_of((found or {}).get("results", {}))


def numbers_of(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """The numbers in lm-eval's results; ``exact_match,strict-match`` names a metric and its filter of answers."""
    return {
        task: {
            name: float(value)
            for name, value in values.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        for task, values in results.items()
    }


class _Unread(logging.Handler):
    """Collects what lm-eval says, in its log only, of answers that it takes for empty ones; within the block."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.words: list[str] = []
        self._log = logging.getLogger("lm_eval")

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("Could not parse"):
            self.words.append(record.getMessage())

    def __enter__(self) -> Self:
        self._log.addHandler(self)
        return self

    def __exit__(self, *raised: object) -> None:
        self._log.removeHandler(self)


def _local_model(target: Target, config: HarnessConfig, precision: Precision) -> dict[str, Any]:
    from lm_eval.models.huggingface import HFLM

    from raytune_ft.models.loading import load_model

    loaded = load_model(target.path, precision=precision)
    model = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=config.batch_size)
    return {"model": model}


@contextmanager
def _key_of(endpoint: EndpointConfig) -> Iterator[None]:
    """Within the block the endpoint's key stands where lm-eval looks for it, and no other."""
    before = os.environ.get(_KEY)
    os.environ[_KEY] = os.environ.get(endpoint.api_key_variable) or "none"
    try:
        yield
    finally:
        os.environ.pop(_KEY)
        if before is not None:
            os.environ[_KEY] = before


def _endpoint_model(target: Target, config: HarnessConfig, endpoint: EndpointConfig) -> dict[str, Any]:
    from raytune_ft.evaluation.endpoint import EndpointClient
    from raytune_ft.models.config import DecodingConfig

    client = EndpointClient(target.path, endpoint, DecodingConfig(), concurrency=1)
    arguments: dict[str, Any] = {
        "model": client.model,
        "num_concurrent": endpoint.concurrency,
        "max_retries": endpoint.max_retries + 1,
        "timeout": int(endpoint.timeout_s),
    }
    if config.endpoint_tokenizer is not None:
        arguments |= {"base_url": f"{client.url}/completions", "tokenizer": config.endpoint_tokenizer}
        return {"model": "local-completions", "model_args": arguments}
    arguments |= {"base_url": f"{client.url}/chat/completions", "tokenized_requests": False}
    return {"model": "local-chat-completions", "model_args": arguments, "apply_chat_template": True}


def _manager(config: HarnessConfig) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=config.include_path)


def _told(error: Exception, config: HarnessConfig) -> RaytuneError:
    """lm-eval's error in our words: data that cannot be fetched is the user's to place."""
    seen: BaseException | None = error
    while seen is not None:
        kind = f"{type(seen).__module__}.{type(seen).__name__}"
        if isinstance(seen, ConnectionError | FileNotFoundError) or "DatasetNotFound" in kind or "OfflineMode" in kind:
            home = os.environ.get("HF_HOME", "~/.cache/huggingface")
            return DataError(
                f"harness: the data of {', '.join(config.tasks)} is not on this machine and cannot be fetched "
                f"({first_line(seen)[:200]}). On a machine with network run `lm-eval run --model dummy --tasks "
                f"{','.join(config.tasks)} --limit 1` and copy its {home}/hub and {home}/datasets to the same place "
                "on every node, or give tasks of your own in harness.include_path whose dataset_path is json and "
                "whose data_files lie here."
            )
        seen = seen.__cause__ or seen.__context__
    return RunError(f"harness: lm-eval failed: {first_line(error)[:200]}")

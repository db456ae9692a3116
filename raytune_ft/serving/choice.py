"""Which engine serves a model here, and what each of them cannot serve."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path

from raytune_ft.core.errors import MissingDependencyError, ServingError
from raytune_ft.models.golden import GOLDEN
from raytune_ft.models.references import ModelReference, check_content, resolve_adapter, resolve_model
from raytune_ft.serving.config import Engine, ServingConfig

logger = logging.getLogger("raytune_ft")

_OURS_ALONE = (
    "ab_test",
    "adapters",
    "adapters_path",
    "api_keys",
    "admin_keys",
    "requests_per_minute",
    "feedback_path",
    "request_log_path",
)
"""Settings that only the transformers engine's endpoint knows."""
_OUR_LIMITS = (
    "max_new_tokens",
    "max_request_mb",
    "request_timeout_s",
    "max_queued_requests",
    "prefill_tokens",
    "golden_tolerance",
)
"""As those, but with defaults, which do not hold under vLLM."""
_NEEDS_FOR_TRANSFORMERS = {"compressed-tensors": "compressed_tensors", "gptq": "gptqmodel", "awq": "gptqmodel"}
"""Formats that vLLM serves as it is, and the package that transformers loads them with."""


def check_config(config: ServingConfig) -> None:
    """Refuses, before anything starts, what cannot be served.

    Raises:
        ServingError: if the engine that is asked for does not know the format or a setting.
        MissingDependencyError: if that engine is not installed.
        ModelError: if the model or an adapter is none.
        ArtifactError: if its files are not those that its manifest names.
    """
    check_content(config.model_path)
    resolved = resolve_model(config.model_path)
    refuse_whole_models(config)
    refuse_unservable(config, quantization_of(resolved), is_adapter=resolved.adapter is not None)
    if config.differs("golden_tolerance") and not _may_replay(config, resolved):
        logger.warning(
            "golden_tolerance is set and changes nothing: neither the model nor an adapter brings golden answers (%s)",
            GOLDEN,
        )


def _may_replay(config: ServingConfig, model: ModelReference) -> bool:
    """Whether the model or an adapter brings golden answers, or adapters are loaded later, which may."""
    served = [model, *(resolve_model(where) for where in config.adapters.values())]
    folders = [reference.adapter or Path(reference.base) for reference in served]
    return config.adapters_path is not None or any((folder / GOLDEN).is_file() for folder in folders)


def refuse_whole_models(config: ServingConfig) -> None:
    """Checks that what stands under `adapters` are adapters.

    Raises:
        ModelError: naming one that is none.
    """
    for name, where in config.adapters.items():
        resolve_adapter(where, f"adapters.{name}")


def refuse_unservable(config: ServingConfig, quantization: str, *, is_adapter: bool) -> None:
    """Checks that the engine which is asked for can serve a model of this format, and is installed.

    Args:
        config: of the endpoint; its model need not be there yet.
        quantization: see `quantization_of`.
        is_adapter: whether the model is an adapter upon another.

    Raises:
        ServingError: if the engine does not know the format or a setting.
        MissingDependencyError: if it is not installed.
    """
    if config.engine is Engine.VLLM:
        reason = why_not_vllm(config, quantization, is_adapter=is_adapter)
        if reason:
            raise ServingError(f"engine: vllm {reason}; set engine: transformers")
        if not _installed("vllm"):
            raise MissingDependencyError(
                "engine: vllm is not installed in this environment; pip install 'raytune-ft[vllm]' where there is a "
                "GPU, make an environment by .ci/vllm-env for a CPU, or set engine: transformers"
            )
        return
    package = _NEEDS_FOR_TRANSFORMERS.get(quantization)
    if package and not _installed(package) and not (config.engine is Engine.AUTO and _installed("vllm")):
        raise ServingError(
            f"{config.model_path}: is in the format {quantization}, which engine: vllm serves; "
            f"transformers needs {package} for it: pip install {package.replace('_', '-')}"
        )


def choose_engine(config: ServingConfig, *, gpus: bool) -> tuple[Engine, str]:
    """The engine that serves a checked configuration, and why."""
    if config.engine is not Engine.AUTO:
        return config.engine, "asked for"
    resolved = resolve_model(config.model_path)
    quantization = quantization_of(resolved)
    reason = why_not_vllm(config, quantization, is_adapter=resolved.adapter is not None)
    if reason:
        return Engine.TRANSFORMERS, f"vllm {reason}"
    if not _installed("vllm"):
        return Engine.TRANSFORMERS, "vllm is not installed"
    if not gpus and quantization not in _NEEDS_FOR_TRANSFORMERS:
        return Engine.TRANSFORMERS, "there is no GPU"
    return Engine.VLLM, "it serves this format" if not gpus else "there is a GPU, and it serves this format fastest"


def why_not_vllm(config: ServingConfig, quantization: str, *, is_adapter: bool) -> str | None:
    """What vLLM could not do of what is asked for; None if it can do all."""
    if is_adapter:
        return "serves no adapter as a model; merge it first (raytune-ft merge)"
    if quantization == "bitsandbytes":
        return "does not load bitsandbytes weights everywhere that transformers does"
    unknown = [name for name in _OURS_ALONE if getattr(config, name)]
    unknown += filter(config.differs, _OUR_LIMITS)
    return f"knows no {', '.join(unknown)}" if unknown else None


def not_under_vllm() -> str:
    """Which of our defaults do not hold where vLLM serves."""
    return (
        f"vLLM's own limits hold, not {', '.join(_OUR_LIMITS)}; there is no playground, no check of golden answers and "
        "none of Host and Origin"
    )


def quantization_of(resolved: ModelReference) -> str:
    """The format of a model folder's weights as its config.json names it; empty for full precision and for hub ids."""
    path = Path(resolved.base) / "config.json"
    if not path.is_file():
        return ""
    settings = json.loads(path.read_text(encoding="utf-8")).get("quantization_config") or {}
    return str(settings.get("quant_method", ""))


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None

"""What is asked of models: which of answers, likelihoods and choices, and how."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module

from raytune_ft.core.digest import short_hash
from raytune_ft.core.errors import ConfigError
from raytune_ft.core.manifest import Parent
from raytune_ft.core.storage import Location
from raytune_ft.evaluation.config import MeasureConfig
from raytune_ft.evaluation.config_inference import EndpointConfig, is_endpoint
from raytune_ft.evaluation.metric_names import EvaluationMetric
from raytune_ft.evaluation.rows import files_digest
from raytune_ft.models.config import DecodingConfig, Precision
from raytune_ft.models.references import model_parent, resolve_model, shared_model


@dataclass(frozen=True)
class Workload:
    """What a row is to come back with, and the settings that decide it."""

    answers: bool
    likelihoods: bool = False
    choices: bool = False
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    precision: Precision = Precision.AUTO
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    keeps_prompt: bool = False
    """Whether an answered row keeps the conversation it answers, so that it can be read without its source."""


@dataclass(frozen=True)
class Target:
    """What is asked: a model that every node can load, or an endpoint, under its label in the report."""

    label: str
    path: str

    @property
    def is_endpoint(self) -> bool:
        """Whether it is asked over HTTP instead of loaded."""
        return is_endpoint(self.path)


def workload_of(config: MeasureConfig) -> Workload:
    """What an evaluation's metrics need of every row."""
    return Workload(
        answers=any(metric.needs_answers for metric in config.metrics),
        likelihoods=EvaluationMetric.PERPLEXITY in config.metrics,
        choices=any(metric.needs_choices for metric in config.metrics),
        decoding=config.decoding,
        precision=config.precision,
        endpoint=config.endpoint,
    )


def refuse_likelihoods(
    targets: Sequence[Target], metrics: Sequence[EvaluationMetric], endpoint: EndpointConfig
) -> None:
    """Refuses metrics of likelihoods for endpoints whose tokenizer is not known.

    Raises:
        ConfigError: naming them.
    """
    served = next((target for target in targets if target.is_endpoint), None)
    wanting = [metric for metric in metrics if not metric.needs_answers]
    if served is not None and wanting and endpoint.tokenizer is None:
        raise ConfigError(
            f"metrics: {', '.join(wanting)} need likelihoods of given texts, and an endpoint ({served.path}) only "
            "answers; leave them out, measure them on the model's folder, or name the model's tokenizer in "
            "endpoint.tokenizer"
        )


def targets_of(models: Mapping[str, str], storage: Location) -> list[Target]:
    """Targets by label, the starter model placed on the run's storage."""
    return [Target(label, path if is_endpoint(path) else shared_model(path, storage)) for label, path in models.items()]


def parent_of(target: Target, role: str) -> Parent:
    """The target in the manifest of what is made from it; of an endpoint only the address is known."""
    if target.is_endpoint:
        digest = short_hash(target.path)
        return Parent(role=role, where=target.path, digest=digest)
    return model_parent(target.path, role=role)


def settings_parents(config: MeasureConfig) -> list[Parent]:
    """Files that the settings name and that decide what is found, for the manifest: with other content in the same
    place it is another evaluation.

    Feedback records (`production_path`) are none of them: they grow while a model is served.
    """
    wheres: dict[str, str | None] = {}
    if isinstance(config.json_schema, str):
        wheres["json_schema"] = config.json_schema
    modules = {where.partition(":")[0] for where in config.custom_functions.values()}
    files = {module: getattr(import_module(module), "__file__", None) for module in sorted(modules)}
    wheres |= {f"custom_functions {module}": file for module, file in files.items()}
    if config.forgetting is not None:
        wheres["forgetting.text_path"] = config.forgetting.text_path
    if config.harness is not None:
        wheres["harness.include_path"] = config.harness.include_path
        wheres["harness.endpoint_tokenizer"] = config.harness.endpoint_tokenizer
    wheres["endpoint.tokenizer"] = config.endpoint.tokenizer
    return [_content(role, where) for role, where in wheres.items() if where is not None]


def _content(role: str, where: str) -> Parent:
    """A file or folder with the digest of its content; of a hub id the name is all there is."""
    location = Location.at(where)
    if not location.exists():
        return Parent(role=role, where=where, digest=short_hash(where))
    files = [location] if location.is_file() else [location / name for name in location.files() if _is_source(name)]
    names = "" if location.is_file() else json.dumps([file.uri.removeprefix(location.uri) for file in files])
    digest = short_hash(names + files_digest(files))
    return Parent(role=role, where=str(location), digest=digest)


def _is_source(name: str) -> bool:
    return "__pycache__" not in name


def grouped(targets: Sequence[Target]) -> list[list[Target]]:
    """Targets that one loaded base can answer for: LoRA adapters of the same base, and that base; others alone."""
    groups: dict[str, list[Target]] = {}
    for target in targets:
        groups.setdefault(_base_key(target), []).append(target)
    found = []
    for group in groups.values():
        adapters = [target for target in group if resolve_model(target.path).adapter] if len(group) > 1 else []
        found += [group] if adapters else [[target] for target in group]
    return found


def _base_key(target: Target) -> str:
    if target.is_endpoint:
        return f"endpoint {target.label}"
    resolved = resolve_model(target.path)
    if resolved.adapter is not None:
        from raytune_ft.models.adapters import adapter_kind  # loads torch

        if adapter_kind(resolved.adapter) != "LORA":
            return f"alone {target.label}"
    return f"base {resolved.base}"

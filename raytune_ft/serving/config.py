"""Settings of an endpoint: which model, where it listens, who may ask, and how much."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Self

from pydantic import Field, field_validator, model_validator

from raytune_ft.core.config import Config
from raytune_ft.core.loopback import is_local
from raytune_ft.models.config import Precision
from raytune_ft.serving.config_ab import BASE, ABTestConfig, MountedFolder

ADAPTER_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
_HASH = re.compile(r"[0-9a-fA-F]{64}")


class Engine(StrEnum):
    """What computes the answers."""

    AUTO = "auto"
    TRANSFORMERS = "transformers"
    VLLM = "vllm"


class ServingConfig(Config):
    """A model on an OpenAI-compatible HTTP endpoint: what ``raytune-ft serve`` reads."""

    model_path: str = Field(min_length=1)
    """Hugging Face folder, hub id, adapter, quantized folder or model artifact."""
    name: str | None = Field(None, min_length=1)
    """The model's id in requests; by default the last part of `model_path`."""
    engine: Engine = Engine.AUTO
    """``transformers`` serves whatever loads there, on a CPU, too; ``auto`` takes what can serve the model here, and
    says why."""
    adapters: dict[str, str] = Field(default_factory=dict)
    """LoRA, prompt and prefix adapters upon the model, by name: requests ask for ``model="NAME:ADAPTER"``. One that
    brings its own chat template is asked and ended by it."""
    adapters_path: str | None = Field(None, min_length=1)
    """Folder (or URI) whose subfolders are adapters that ``POST /admin/adapters`` may load while serving, by their
    names; nothing else can be loaded."""
    max_adapters: int = Field(8, ge=1)
    """Most LoRA adapters at a time; room for them is made at the start."""
    max_lora_rank: int = Field(64, ge=1)
    """Largest rank of a LoRA adapter."""
    host: str = Field("127.0.0.1", min_length=1)
    """Address to listen on. The default is this machine only; any other needs `api_keys`, or `allow_anyone`."""
    port: int = Field(8000, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    api_keys: tuple[str, ...] = ()
    """The sha256 (64 hex digits) of each key that may ask; empty lets everyone ask who reaches the address.
    ``raytune-ft key`` makes a key and its sha256."""
    admin_keys: tuple[str, ...] = ()
    """The sha256 of each key that may load and drop adapters; empty lets nobody."""
    requests_per_minute: int | None = Field(None, ge=1)
    """How often each of `api_keys` may ask for answers in any minute; more gets 429 with Retry-After. Every replica
    lets through its even share, rounded down, so that one that is asked more than the others may refuse early."""
    allow_anyone: bool = False
    """Listens on an address that other machines reach without asking who they are; on this machine's own address,
    answers under any name, as behind a proxy that keeps the client's ``Host``."""
    num_replicas: int = Field(1, ge=1)
    """Copies of the model, each in a process of its own; requests are spread over them."""
    max_replicas: int | None = Field(None, ge=1)
    """Lets Ray Serve start up to this many replicas under load, and go back to `num_replicas` without."""
    target_ongoing_requests: float = Field(4.0, gt=0)
    """Requests in flight at a replica, above which another one is started (with `max_replicas`)."""
    num_cpus: int = Field(1, ge=1)
    """Logical CPUs, and threads, of each replica. With a GPU on the cluster, each replica takes one, too."""
    precision: Precision = Precision.AUTO
    """Number format of the weights; ``auto`` is fp32 on CPU and bf16 on GPU."""
    max_batch_size: int = Field(8, ge=1)
    """Most answers that a replica decodes together; requests join and leave between two tokens."""
    prefill_tokens: int = Field(512, ge=16)
    """A longer prompt is read in pieces of so many tokens, between which the running answers go on: the most that
    one may hold them up. Smaller pieces take a little more time in all."""
    max_new_tokens: int = Field(1024, ge=1)
    """Most tokens of an answer that a request may ask for, and what a chat gets if it names no limit."""
    max_request_mb: float = Field(8.0, gt=0)
    """Largest body of a request, in MB; a larger one gets 413."""
    max_queued_requests: int = Field(128, ge=0)
    """Answers that may wait at a replica beside its batch; further ones get 429."""
    request_timeout_s: float = Field(300.0, gt=0)
    """A request that has no answer after this long gets 504; a stream ends with an error."""
    drain_timeout_s: float = Field(30.0, ge=0)
    """How long a replica that is stopped or replaced may take to answer the requests that it has."""
    startup_timeout_s: float = Field(600.0, gt=0)
    """How long loading the model may take before the start counts as failed."""
    golden_tolerance: float = Field(0.5, gt=0)
    """A model with ``golden.json`` is served only if the log-probabilities of its golden answers are this near to the
    trained model's, on average, in nats."""
    feedback_path: MountedFolder | None = None
    """Folder for what ``POST /v1/feedback`` brings, as JSON lines that ``raytune-ft prepare`` reads; on a disk that
    the replicas' machines have mounted."""
    request_log_path: MountedFolder | None = None
    """Folder for a log of prompts and answers as JSON lines. Without it prompts are written nowhere."""
    ab_test: ABTestConfig | None = None
    """Splits the requests for this model between itself and its adapters, and writes down who got which."""
    playground: bool = True
    """Whether ``/playground`` is served: a page to chat, compare and give feedback."""

    @property
    def served_name(self) -> str:
        """The model's id in requests."""
        return self.name or self.model_path.rstrip("/").rpartition("/")[2].rpartition(":")[2]

    @property
    def tested_name(self) -> str | None:
        """The model id whose requests the A/B test splits; None without a test."""
        if self.ab_test is None:
            return None
        return self.ab_test.model or self.served_name

    @property
    def most_replicas(self) -> int:
        """Replicas that may run at a time."""
        return max(self.num_replicas, self.max_replicas or 0)

    @field_validator("adapters")
    @classmethod
    def _named(cls, adapters: dict[str, str]) -> dict[str, str]:
        for name in adapters:
            if not re.fullmatch(ADAPTER_NAME, name):
                raise ValueError(f"{name!r} is no name for an adapter: letters, digits, '.', '_' and '-' are")
        return adapters

    @model_validator(mode="after")
    def _hashed(self) -> Self:
        # Of the whole model, not of the field: an error of a field repeats its value, which may be the key itself.
        for field in ("api_keys", "admin_keys"):
            if any(not _HASH.fullmatch(key) for key in getattr(self, field)):
                raise ValueError(
                    f"{field}: each must be the sha256 of a key, 64 hex digits; `raytune-ft key` makes both"
                )
        return self

    @model_validator(mode="after")
    def _known_callers(self) -> Self:
        if not (self.api_keys or self.allow_anyone or is_local(self.host)):
            raise ValueError(
                f"host: {self.host} lets other machines in, and nothing asks who they are; set api_keys "
                "(`raytune-ft key` makes one), or allow_anyone: true behind a gateway that asks"
            )
        return self

    @model_validator(mode="after")
    def _limited_by_key(self) -> Self:
        if self.requests_per_minute is not None and not self.api_keys:
            raise ValueError("requests_per_minute: counts by key; set api_keys (`raytune-ft key` makes one)")
        if self.requests_per_minute is not None and self.requests_per_minute < self.most_replicas:
            raise ValueError(
                f"requests_per_minute: must be at least the number of replicas, {self.most_replicas}, since each lets "
                f"through its share (got {self.requests_per_minute}); raise it, or have fewer replicas"
            )
        return self

    @model_validator(mode="after")
    def _served_variants(self) -> Self:
        if self.ab_test is None:
            return self
        if BASE in self.adapters:
            raise ValueError(
                f"adapters: with ab_test, {BASE!r} names the model without an adapter; give this adapter another name"
            )
        for name in self.ab_test.variants:
            if name != BASE and name not in self.adapters:
                known = ", ".join([BASE, *self.adapters])
                raise ValueError(
                    f"ab_test.variants: {name!r} is not served here (there is {known}); add it to adapters, so that "
                    "every replica has it from its start"
                )
        if (self.tested_name or "").startswith(f"{self.served_name}:"):
            raise ValueError(
                f"ab_test.model: {self.tested_name!r} would ask for one adapter; name an id without "
                f"'{self.served_name}:'"
            )
        return self

    @model_validator(mode="after")
    def _more_than_least(self) -> Self:
        if self.max_replicas is not None and self.max_replicas < self.num_replicas:
            raise ValueError(f"max_replicas: must be at least num_replicas, {self.num_replicas}")
        return self

    @model_validator(mode="after")
    def _says_nothing_in_vain(self) -> Self:
        if self.most_replicas == self.num_replicas:
            why = "no further replica is ever started; set max_replicas above num_replicas, or leave it out"
            self.refuse_idle(["target_ongoing_requests"], why)
        if not self.adapters and self.adapters_path is None:
            why = "no adapter is served; name some in adapters or adapters_path, or leave it out"
            self.refuse_idle(["max_adapters", "max_lora_rank"], why)
        if not self.admin_keys:
            why = "nobody may load adapters from there; set admin_keys (`raytune-ft key` makes one), or leave it out"
            self.refuse_idle(["adapters_path"], why)
        return self

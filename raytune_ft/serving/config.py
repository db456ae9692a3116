"""Settings of an endpoint: which model, where it listens, and what it lets a request ask for."""

from __future__ import annotations

from pydantic import Field

from raytune_ft.core.config import Config
from raytune_ft.models.config import Precision


class ServingConfig(Config):
    """A model on an OpenAI-compatible HTTP endpoint: what ``raytune-ft serve`` reads."""

    model_path: str = Field(min_length=1)
    """Hugging Face folder, hub id, adapter, quantized folder or model artifact."""
    name: str | None = Field(None, min_length=1)
    """The model's id in requests; by default the last part of `model_path`."""
    host: str = Field("127.0.0.1", min_length=1)
    """Address to listen on. The default is this machine only; ``0.0.0.0`` lets every machine in, and anyone there may
    use the model."""
    port: int = Field(8000, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    num_replicas: int = Field(1, ge=1)
    """Copies of the model, each in a process of its own; requests are spread over them."""
    num_cpus: int = Field(1, ge=1)
    """Logical CPUs, and threads, of each replica. With a GPU on the cluster, each replica takes one, too."""
    precision: Precision = Precision.AUTO
    """Number format of the weights; ``auto`` is fp32 on CPU and bf16 on GPU."""
    max_batch_size: int = Field(8, ge=1)
    """Most requests that a replica answers together."""
    batch_wait_timeout_s: float = Field(0.005, ge=0)
    """How long a request waits for others to join its batch. Whatever arrives while a batch runs forms the next one."""
    max_new_tokens: int = Field(1024, ge=1)
    """Most tokens of an answer that a request may ask for, and what it gets if it names no limit."""
    max_queued_requests: int = Field(128, ge=0)
    """Requests that may wait at a replica beside its batch; further ones get 429."""
    request_timeout_s: float = Field(300.0, gt=0)
    """A request that has no answer after this long gets 504."""
    startup_timeout_s: float = Field(600.0, gt=0)
    """How long loading the model may take before the start counts as failed."""

    @property
    def served_name(self) -> str:
        """The model's id in requests."""
        return self.name or self.model_path.rstrip("/").rpartition("/")[2].rpartition(":")[2]

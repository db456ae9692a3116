"""Settings of asking a model for answers: of an endpoint, and of offline batch inference."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, ClassVar, Self

from pydantic import AfterValidator, Field, model_validator

from raytune_ft.core.config import Config, Place
from raytune_ft.models.config import DecodingConfig, Precision


def checked_endpoint(path: str) -> str:
    """`path`, if it is no URL or one that an endpoint can have.

    Raises:
        ValueError: if it names a single operation, such as ``/chat/completions``.
    """
    if is_endpoint(path):
        bare = path.partition("#")[0].rstrip("/")
        if bare.endswith(("/completions", "/responses", "/models")):
            raise ValueError("must be the endpoint's base URL, which ends with /v1 in most cases")
    return path


def is_endpoint(path: str) -> bool:
    """Whether a model path is the URL of a served model."""
    return re.match(r"https?://", path) is not None


ModelPath = Annotated[str, Field(min_length=1), AfterValidator(checked_endpoint)]
"""A model reference, or the URL of an endpoint."""


OF_ENDPOINTS = "has no effect: an endpoint computes as it was started; leave it out"
WITHOUT_ENDPOINT = "has no effect, since no model is given as the URL of an endpoint; leave it out"
"""Why settings of local models, and of served ones, change nothing."""


class EndpointConfig(Config):
    """How a served model is asked, where a model path is a URL such as ``http://host:8000/v1#name``."""

    concurrency: int = Field(8, ge=1)
    """Requests under way at the same time."""
    timeout_s: float = Field(120.0, gt=0)
    """A request without an answer after this long counts as failed."""
    max_retries: int = Field(4, ge=0)
    """How often a request is sent again that failed by the connection, a timeout, 408, 409, 429 or 5xx, or was
    answered with nonsense."""
    backoff_s: float = Field(1.0, ge=0)
    """Wait before the first retry; it doubles each time, up to 30 s. A ``Retry-After`` of the endpoint counts more."""
    give_up_after: int = Field(16, ge=1)
    """So many rows in a row that failed mean that the endpoint is down: the others are not asked then."""
    api_key_variable: str = Field("OPENAI_API_KEY", min_length=1)
    """Environment variable that holds the key, if the endpoint wants one."""
    tokenizer: Place | None = None
    """Folder, artifact or hub id of the served model's tokenizer. With it, likelihoods are asked, too (perplexity,
    choices): by text completions that echo their prompt with its log-probabilities."""

    @model_validator(mode="after")
    def _waits_before_retries(self) -> Self:
        if not self.max_retries:
            self.refuse_idle(["backoff_s"], "nothing is asked again (max_retries is 0); leave it out")
        return self


def refuse_idle_inference(
    paths: Iterable[str], *, decoding: DecodingConfig, endpoint: EndpointConfig, likelihoods: bool
) -> None:
    """Refuses settings of asking models that would change nothing.

    Args:
        paths: of the models that are asked.
        decoding: how they answer.
        endpoint: how those of them are asked that are served.
        likelihoods: whether they are asked for likelihoods, too.

    Raises:
        ValueError: naming a setting.
    """
    if decoding.temperature == 0:
        why = "has no effect at temperature 0, which samples nothing; set decoding.temperature, or leave it out"
        decoding.refuse_idle(("top_p", "seed"), why, under="decoding.")
    if not any(map(is_endpoint, paths)):
        endpoint.refuse_idle(EndpointConfig.model_fields, WITHOUT_ENDPOINT, under="endpoint.")
    if not likelihoods:
        why = "has no effect where no likelihoods are asked for; leave it out"
        endpoint.refuse_idle(("tokenizer",), why, under="endpoint.")


class BatchGenerationConfig(Config):
    """Settings of ``raytune-ft generate``: a model's answers to every prompt of some files."""

    not_identity: ClassVar[frozenset[str]] = Config.not_identity | {"num_actors", "endpoint", "max_unanswered"}

    model_path: ModelPath
    """The model that answers: a folder (model, adapter, quantized), an artifact, a hub id, ``starter:smollm2-135m``,
    or the URL of an endpoint (``http://host:8000/v1#name``)."""
    dataset_path: str = Field(min_length=1)
    """The prompts: a JSONL or Parquet file, a folder of these, or a dataset that `prepare` made. A row has ``prompt``
    (text, or a list of messages) or ``messages``, whose last assistant turn is then not shown to the model. Its answer
    has the row's ``id``, where there is one, and its other columns in ``metadata``."""
    split: str | None = None
    """Which split of a prepared dataset (``test`` by default) or of a folder; else a folder is taken whole."""
    output_dir: str = Field("answers", min_length=1)
    """Folder (or URI) of the answers."""
    decoding: DecodingConfig = DecodingConfig()
    """How answers are generated; greedy by default."""
    precision: Precision = Precision.AUTO
    """Number format of the model's weights."""
    num_actors: int | None = Field(None, ge=1)
    """Copies of the model that share the rows; by default one per GPU, or one less than there are CPUs."""
    endpoint: EndpointConfig = EndpointConfig()
    """How an endpoint is asked."""
    max_unanswered: int = Field(0, ge=0)
    """Rows that may stay without an answer (from an endpoint that failed) before the run counts as failed."""

    @model_validator(mode="after")
    def _says_nothing_in_vain(self) -> Self:
        refuse_idle_inference([self.model_path], decoding=self.decoding, endpoint=self.endpoint, likelihoods=False)
        if is_endpoint(self.model_path):
            self.refuse_idle(("precision",), OF_ENDPOINTS)
        return self

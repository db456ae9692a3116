"""What the ladder measures of a model and its smaller versions, and what each has to hold."""

from __future__ import annotations

from pydantic import Field, field_validator

from raytune_ft.core.config import Config
from raytune_ft.evaluation.config import ComparisonConfig, EvaluationMetric


class PaceConfig(Config):
    """How speed is measured: prompts of the rows, one after the other and in a batch, each in a fresh process."""

    prompts: int = Field(8, ge=1)
    """The first so many rows' prompts."""
    new_tokens: int = Field(32, ge=2)
    """Tokens of each answer; none ends earlier."""
    batch_size: int = Field(8, ge=1)
    """Prompts at once when throughput is measured."""
    agreement_rows: int = Field(64, ge=1)
    """The first so many rows on whose reference tokens the likeliest token is compared with the original's."""
    threads: int | None = Field(None, ge=1)
    """CPU threads; by default all that one process may use."""


class LadderLimits(Config):
    """What each smaller model has to hold; a limit that is not named does not count."""

    max_drop: dict[EvaluationMetric, float] = Field(default_factory=dict)
    """How much worse than the original each metric may be, in its own units."""
    min_same_answers: float | None = Field(None, ge=0, le=1)
    """Share of the rows with the original's very answer."""
    min_same_tokens: float | None = Field(None, ge=0, le=1)
    """Share of the reference tokens at which the original ranks the same token first."""
    max_megabytes: float | None = Field(None, gt=0)
    """Size of the weights on disk."""
    max_peak_megabytes: float | None = Field(None, gt=0)
    """Peak memory of the process (on a GPU: of its allocator)."""
    max_first_token_ms: float | None = Field(None, gt=0)
    """Median time to the first token, one prompt at a time."""
    max_per_token_ms: float | None = Field(None, gt=0)
    """Median time of each further token."""
    min_tokens_per_s: float | None = Field(None, gt=0)
    """Tokens a second of the batch."""

    @field_validator("max_drop")
    @classmethod
    def _not_negative(cls, drops: dict[EvaluationMetric, float]) -> dict[EvaluationMetric, float]:
        for metric, drop in drops.items():
            if drop < 0:
                raise ValueError(f"{metric}: must be 0 or more (got {drop:g})")
        return drops


class LadderConfig(ComparisonConfig):
    """A model and its smaller versions, on the same rows: quality, likeness, size, memory and speed of each.

    The first of `model_paths` is the original.
    """

    output_dir: str = Field("ladder", min_length=1)
    """Folder (or URI) of the report; the comparison of quality lies beside it, in ``<output_dir>-quality``."""
    compare_with_base: bool = False
    """The original stands first; its base has no place on the ladder."""
    pace: PaceConfig = PaceConfig()
    """How speed is measured."""
    limits: LadderLimits = LadderLimits()
    """Thresholds; a smaller model that breaks one ends the command with exit code 1, after the report is written."""

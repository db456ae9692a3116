"""Settings that describe how models compute and decode, shared by every room."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field

from raytune_ft.core.config import Config


class Precision(StrEnum):
    """Number format of weights and activations."""

    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


class DecodingConfig(Config):
    """How answers are generated."""

    max_new_tokens: int = Field(256, ge=1)
    """Most tokens of one answer."""
    temperature: float = Field(0.0, ge=0.0)
    """0 takes the most likely token each time (greedy); above, tokens are sampled."""
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    """Sampling keeps the smallest set of tokens with this probability."""
    seed: int = 0
    """Seed of the sampling."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer; they are not part of it."""


class TrainOn(StrEnum):
    """Which turns of a conversation count for the loss."""

    ALL_ASSISTANT_TURNS = "all_assistant_turns"
    LAST_ASSISTANT_TURN = "last_assistant_turn"

"""Settings of an A/B test: which variants share an endpoint's requests, and where it is written down who got which."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import AfterValidator, Field, SecretStr, field_validator, model_validator

from raytune_ft.core.config import Config

BASE = "base"
"""The variant that is the served model without an adapter; ``NAME:base`` asks for it outside the test."""


def _mounted(path: str) -> str:
    if "://" in path:
        raise ValueError("must be a folder on a mounted disk: object stores cannot append to a file")
    return path


MountedFolder = Annotated[str, Field(min_length=1), AfterValidator(_mounted)]
"""A folder with files that lines are added to."""


class ABTestConfig(Config):
    """Splits the requests for one model's id between the model and adapters upon it, which one replica answers in one
    batch. Which variant a request gets depends on the test's name, `salt` and the request's subject alone: it is the
    same on every replica and after a restart.

    A request's subject is its field ``user``, else its ``safety_identifier``, else its header `subject_header`. Without
    any, every request is a subject of its own, drawn at random, and the log says so.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Of the test; another name draws the groups anew. Variants, weights or salt that change need another name: the
    log would hold two tests that cannot be told apart."""
    variants: dict[str, float] = Field(min_length=2)
    """Share of the subjects of each variant; together 1. ``base`` is the model itself, every other name is one of
    `adapters`."""
    control: str = Field(BASE, min_length=1)
    """The variant that the others are compared with: what is served today."""
    log_path: MountedFolder
    """Folder for a JSON line per request of the test: time, variant, hashed subject, status, times, tokens; neither
    prompts nor answers nor user ids. On a disk that the replicas' machines have mounted; `raytune-ft ab` reads it."""
    model: str | None = Field(None, min_length=1)
    """The model id whose requests are split; by default the endpoint's own name."""
    subject_header: str | None = Field(None, pattern=r"^[A-Za-z0-9-]+$")
    """HTTP header that names the subject where the request's fields do not, as a gateway before the endpoint sets."""
    salt: SecretStr = SecretStr("")
    """Mixed into the hash of subjects. With a secret one, nobody can find known user ids in the log by hashing them."""

    @field_validator("variants")
    @classmethod
    def _shares(cls, variants: dict[str, float]) -> dict[str, float]:
        for name, share in variants.items():
            if not (0 < share < 1):
                raise ValueError(f"{name}: a share must be above 0 and below 1 ({share:g} was given)")
        if not math.isclose(total := sum(variants.values()), 1, abs_tol=1e-6):
            raise ValueError(f"the shares must sum to 1; these sum to {total:g}")
        return variants

    @model_validator(mode="after")
    def _controlled(self) -> ABTestConfig:
        if self.control not in self.variants:
            raise ValueError(
                f"control: {self.control!r} is none of the variants ({', '.join(self.variants)}); name the one that is "
                "served today"
            )
        return self

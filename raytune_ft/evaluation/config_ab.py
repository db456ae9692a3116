"""What an A/B test's logs are read for: where they lie, what counts as better, and what as a regression."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from raytune_ft.core.config import Config


class ABAnalysisConfig(Config):
    """The analysis of an endpoint's A/B test (`ab_test` of `ServingConfig`): what ``raytune-ft ab`` reads."""

    not_identity: ClassVar[frozenset[str]] = Config.not_identity | {"exposures_path", "feedback_path"}

    exposures_path: str = Field(min_length=1)
    """The test's `log_path`: a folder (or URI) with JSON lines, or one such file."""
    feedback_path: str | None = Field(None, min_length=1)
    """The endpoint's `feedback_path`. Feedback counts for the answer whose ``id`` it names; without any, only the
    guardrails are looked at."""
    test: str | None = Field(None, min_length=1)
    """The test's name; needed only where the log holds several."""
    output_dir: str = Field("ab", min_length=1)
    """Folder (or URI) of the reports. Each look at the logs has a folder of its own in it, named by the last moment
    that the logs tell of, so that the same logs give the same report."""
    confidence: float = Field(0.95, ge=0.5, lt=1)
    """With which something has to be shown: over all looks at the running test together, not at each."""
    min_effect: float = Field(0.05, gt=0, lt=1)
    """The least gain in the share of good ratings that is worth a change. Once so much is ruled out, the old variant
    stays; differences of about this size are found soonest. Choose it before the test starts."""
    max_error_rise: float = Field(0.01, gt=0, lt=1)
    """Guardrail: how much more of a subject's requests may fail (status 500 and above), as a share."""
    max_latency_rise: float = Field(0.1, gt=0)
    """Guardrail: how much longer whole answers and first tokens may take, as a share of the control's time."""
    min_subjects: int = Field(100, ge=20)
    """Of each variant before anything is concluded of it; the tests are right for many subjects, not for few."""

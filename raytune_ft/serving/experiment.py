"""An A/B test as a replica runs it: requests are given a variant, and what became of each is written down once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from raytune_ft.serving.answers import Answer, Choice
from raytune_ft.serving.assignment import Assignment, assign
from raytune_ft.serving.config import ServingConfig
from raytune_ft.serving.config_ab import ABTestConfig
from raytune_ft.serving.faults import GONE, ApiError
from raytune_ft.serving.feedback import Feedback, Journal, timestamp
from raytune_ft.serving.metrics import Metrics


@dataclass(eq=False)
class Exposure:
    """One request of a test: what it was given, and, once it is told, what came of it."""

    assigned: Assignment
    model: str
    """The id that names the variant itself: ``NAME:VARIANT``."""
    entered: float = field(default_factory=time.monotonic)
    time: str = field(default_factory=timestamp)
    began: float | None = None
    """When the first token of any of its answers came, as `entered` on the monotonic clock."""
    told: bool = False

    def began_at(self, moment: float) -> None:
        """Takes the first token's moment of one of the answers."""
        self.began = moment if self.began is None else min(self.began, moment)


class Experiment:
    """The test of an endpoint, if it has one; without one, nothing here does anything."""

    def __init__(self, config: ServingConfig, metrics: Metrics) -> None:
        self._test, self._metrics = config.ab_test, metrics
        self._served, self._tested = config.served_name, config.tested_name
        self._journal = Journal(self._test.log_path, f"exposures-{metrics.replica}") if self._test else None

    def enter(self, model: str, subject: str | None, headers: Mapping[str, str]) -> Exposure | None:
        """The exposure of a request for `model`; None for a request that is outside of any test."""
        if self._test is None or model != self._tested:
            return None
        if subject is None and self._test.subject_header is not None:
            subject = headers.get(self._test.subject_header) or None
        assigned = assign(self._test, subject)
        return Exposure(assigned, f"{self._served}:{assigned.variant}")

    def headers(self, exposure: Exposure | None) -> dict[str, str]:
        """What an answer's headers say of the test."""
        if exposure is None or self._test is None:
            return {}
        return {"x-raytune-test": self._test.name, "x-raytune-variant": exposure.assigned.variant}

    @contextmanager
    def watched(self, exposure: Exposure | None) -> Iterator[None]:
        """Writes down how the request ended if the block is left by an error, or because the client went away."""
        try:
            yield
        except ApiError as error:
            self.failed(exposure, error.status)
            raise
        except (asyncio.CancelledError, GeneratorExit):
            self.failed(exposure, GONE)
            raise
        except Exception:
            self.failed(exposure, 500)
            raise

    def failed(self, exposure: Exposure | None, status: int) -> None:
        """Writes down, soon, that there was no answer; nothing here can wait, since its task may be cancelled."""
        if exposure is not None and not exposure.told:
            line = self._line(exposure, status)
            try:
                asyncio.get_running_loop().run_in_executor(None, self._append, line)
            except RuntimeError:  # the loop is being closed
                self._append(line)

    async def answered(self, exposure: Exposure | None, answer: Answer, choices: Sequence[Choice]) -> None:
        """Writes an answered request down; it is on the disk before the answer ends, so that feedback finds it."""
        if exposure is None or exposure.told:
            return
        reasons = {choice.finish_reason for choice in choices}
        ends = {
            "id": answer.sent_id,
            "finish_reason": "length" if "length" in reasons else "stop",
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.completion_tokens(choices),
        }
        await asyncio.to_thread(self._append, {**self._line(exposure, 200), **ends})

    def judged(self, feedback: Feedback) -> None:
        """Counts the feedback on an answer of one of the variants, which it names as the answer's ``model``."""
        test = self._test
        served, _, variant = (feedback.model or "").rpartition(":")
        if test is not None and served == self._served and variant in test.variants:
            self._metrics.ab_feedback.labels(self._metrics.replica, test.name, variant, feedback.verdict).inc()

    def close(self) -> None:
        """Closes the file."""
        if self._journal is not None:
            self._journal.close()

    def _line(self, exposure: Exposure, status: int) -> dict[str, Any]:
        """What every line has; the request counts as told from here on."""
        exposure.told = True
        test: ABTestConfig | None = self._test
        assert test is not None
        assigned = exposure.assigned
        took = time.monotonic() - exposure.entered
        first = None if exposure.began is None else exposure.began - exposure.entered
        labels = (self._metrics.replica, test.name, assigned.variant)
        self._metrics.ab_requests.labels(*labels, str(status)).inc()
        if status == 200:
            self._metrics.ab_duration.labels(*labels).observe(took)
            if first is not None:
                self._metrics.ab_first_token.labels(*labels).observe(first)
        return {
            "time": exposure.time,
            "test": test.name,
            "variant": assigned.variant,
            "subject": assigned.subject,
            "sticky": assigned.sticky,
            "status": status,
            "latency_s": round(took, 6),
            "first_token_s": None if first is None else round(first, 6),
            "control": test.control,
            "shares": test.variants,
        }

    def _append(self, line: dict[str, Any]) -> None:
        """An answer is not withheld because the disk is full: the line is lost, counted, and told."""
        assert self._journal is not None
        if not self._journal.keep(line):
            self._metrics.ab_lost.labels(self._metrics.replica).inc()

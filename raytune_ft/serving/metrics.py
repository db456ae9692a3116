"""What an endpoint counts and times, in Prometheus' text format, with the series of all replicas together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.metrics_core import Metric

_LATENCIES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_REPLICA = ("replica",)
_LABELS = (*_REPLICA, "model", "adapter")
_TEST_LABELS = (*_REPLICA, "test", "variant")
Series = list[tuple[str, str, str, list[tuple[str, dict[str, str], float]]]]
"""Of each metric its name, help, type, and samples (name, labels, value): what replicas tell each other."""


class Metrics:
    """The series of one replica; `model` and `adapter` are only ever names that are served."""

    def __init__(self, replica: str) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.replica = replica
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "Requests by route and HTTP status; 499 where the client went away.",
                                      "route", "status")  # fmt: skip
        self.cancelled = self._counter("cancelled", "Requests whose client went away.")
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.")
        self.completion_tokens = self._counter("completion_tokens", "Tokens of answers.")
        self.feedback = self._counter("feedback", "Feedback records written.", of=_REPLICA)
        self.ab_requests = self._counter("ab_requests", "Requests of an A/B test, by variant and HTTP status.",
                                         "status", of=_TEST_LABELS)  # fmt: skip
        self.ab_feedback = self._counter("ab_feedback", "Feedback on answers of an A/B test, by variant and verdict.",
                                         "verdict", of=_TEST_LABELS)  # fmt: skip
        self.ab_lost = self._counter("ab_lost", "Lines of an A/B test's log that could not be written.", of=_REPLICA)
        self.log_lost = self._counter("log_lost", "Lines of the request log that could not be written.", of=_REPLICA)
        self.ab_duration = self._histogram(
            "ab_request_duration_seconds", "From a test's request to the end of its answer.", _TEST_LABELS
        )
        self.ab_first_token = self._histogram(
            "ab_time_to_first_token_seconds", "From a test's request to the first token.", _TEST_LABELS
        )
        self.first_token = self._histogram("time_to_first_token_seconds", "From a request's entry to its first token.")
        self.per_token = self._histogram("time_per_output_token_seconds", "Mean time of an answer's further tokens.")
        self.duration = self._histogram("request_duration_seconds", "From a request's entry to its last token.")
        self.running = self._gauge("running", "Answers that are being decoded.")
        self.queued = self._gauge("queued", "Answers that wait to be decoded.")
        self.ready = self._gauge("ready", "1 when the model is loaded and as it was trained.")
        self.adapters = self._gauge("adapters", "Adapters that are loaded.")

    def series(self) -> Series:
        """All samples, as plain values."""
        return [
            (
                metric.name,
                metric.documentation,
                metric.type,
                [(sample.name, dict(sample.labels), float(sample.value)) for sample in metric.samples],
            )
            for metric in self.registry.collect()
        ]

    def _counter(self, name: str, text: str, *labels: str, of: tuple[str, ...] = _LABELS) -> Counter:
        return Counter(f"raytune_ft_{name}", text, (*of, *labels), registry=self.registry)

    def _histogram(self, name: str, text: str, labels: tuple[str, ...] = _LABELS) -> Histogram:
        return Histogram(f"raytune_ft_{name}", text, labels, buckets=_LATENCIES, registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"raytune_ft_{name}", text, _REPLICA, registry=self.registry)


def exposition(replicas: Iterable[Series]) -> bytes:
    """The text of several replicas' series, each metric once."""
    merged: dict[str, Metric] = {}
    for series in replicas:
        for name, text, kind, samples in series:
            metric = merged.setdefault(name, Metric(name, text, kind))
            for sample, labels, value in samples:
                metric.add_sample(sample, labels, value)
    return generate_latest(_Collected(merged.values()))


class _Collected:
    """What `generate_latest` takes for a registry."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = list(metrics)

    def collect(self) -> Iterator[Metric]:
        return iter(self._metrics)

    def restricted_registry(self, names: Any) -> _Collected:
        return self

"""Logs of an A/B test as an endpoint writes them, of subjects whose behaviour is known."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

BEGAN = datetime(2026, 3, 1, tzinfo=UTC)


def exposure(number: int, variant: str, subject: str, **changes: Any) -> dict[str, Any]:
    """A line of the log; the request came `number` seconds after the beginning."""
    return {
        "time": (BEGAN + timedelta(seconds=number)).isoformat(timespec="milliseconds"),
        "test": "spring",
        "variant": variant,
        "subject": subject,
        "sticky": True,
        "status": 200,
        "latency_s": 1.0,
        "first_token_s": 0.25,
        "control": "base",
        "shares": {"base": 0.5, "new": 0.5},
        "id": f"chatcmpl-{number}",
        "finish_reason": "stop",
        "prompt_tokens": 20,
        "completion_tokens": 10,
        **changes,
    }


def feedback(number: int, rating: Any, *, after: float = 60.0, **changes: Any) -> dict[str, Any]:
    """A line of feedback on the answer to request `number`."""
    time = (BEGAN + timedelta(seconds=number + after)).isoformat(timespec="milliseconds")
    asked = [{"role": "user", "content": "hi"}]
    return {"messages": asked, "response": "A", "rating": rating, "id": f"chatcmpl-{number}", "time": time, **changes}


def write_lines(path: Path, lines: list[dict[str, Any]]) -> Path:
    """The folder of a file with these lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path.parent


def write_test(
    folder: Path,
    *,
    good: Mapping[str, float],
    subjects: int,
    shares: Mapping[str, float] | None = None,
    requests: int = 3,
    rate: float = 0.5,
    latency: Mapping[str, float] | None = None,
    errors: Mapping[str, float] | None = None,
    assigned: Callable[[np.random.Generator], np.ndarray] | None = None,
    seed: int = 0,
) -> tuple[str, str]:
    """Writes the logs of a test, and returns their folders: of exposures, and of feedback.

    Args:
        folder: that both are made in.
        good: chance of a good rating, of each variant.
        subjects: in all.
        shares: that the settings say; half and half by default.
        requests: of each subject.
        rate: how many answers are rated.
        latency: median seconds, of each variant; 1 by default.
        errors: chance that a request fails, of each variant; 0 by default.
        assigned: the place of each subject's variant; by the shares, by default.
        seed: of everything drawn.
    """
    rng = np.random.default_rng(seed)
    shares = dict(shares or {"base": 0.5, "new": 0.5})
    names = list(shares)
    places = assigned(rng) if assigned else rng.choice(len(names), subjects, p=list(shares.values()))
    lines, said = [], []
    order = rng.permutation(np.repeat(np.arange(subjects), requests))
    for number, subject in enumerate(order):
        variant = names[places[subject]]
        if rng.random() < (errors or {}).get(variant, 0.0):
            failed = {"status": 500, "first_token_s": None, "id": None, "completion_tokens": None}
            lines.append(exposure(number, variant, f"s{subject}", shares=shares, **failed))
            continue
        took = (latency or {}).get(variant, 1.0) * float(np.exp(0.3 * rng.standard_normal()))
        times = {"latency_s": took, "first_token_s": took / 4}
        lines.append(exposure(number, variant, f"s{subject}", shares=shares, **times))
        if rng.random() < rate:
            said.append(feedback(number, "up" if rng.random() < good[variant] else "down"))
    half = len(lines) // 2
    write_lines(folder / "ab" / "exposures-r1.jsonl", lines[:half])
    write_lines(folder / "ab" / "exposures-r2.jsonl", lines[half:])
    return str(folder / "ab"), str(write_lines(folder / "feedback" / "feedback-r1.jsonl", said))

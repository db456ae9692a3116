"""Work side by side on the cores of a CPU: lanes of trials, each computed by its own thread.

An operation on the few tokens that fit a core's cache is too small to be split over cores; whole trials are not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import torch

MOST_LANES = 16
"""More threads than this mostly wait for Python's lock."""


def share_out(work: Mapping[str, int], lanes: int) -> list[list[str]]:
    """Trials in at most `lanes` lists whose work comes to about the same; the largest go first, to the lightest list.

    Args:
        work: of each trial, in any unit.
        lanes: lists to fill; none is left empty.
    """
    found: list[list[str]] = [[] for _ in range(max(1, min(lanes, len(work))))]
    loads = [0] * len(found)
    for name in sorted(work, key=lambda name: -work[name]):
        lightest = loads.index(min(loads))
        found[lightest].append(name)
        loads[lightest] += work[name]
    return found


def evened(work: Mapping[str, int], lanes: int) -> list[str]:
    """The first of these trials, half of them at least: as many as leave lanes idle least.

    Thirteen equal trials would leave one of two lanes idle for a thirteenth of the time; twelve do not.

    Args:
        work: of each trial, in any unit, in the order of their turns.
        lanes: that they are shared out to.
    """
    names = list(work)
    if lanes == 1:
        return names

    def busy(count: int) -> float:
        loads = [sum(work[name] for name in lane) for lane in share_out({n: work[n] for n in names[:count]}, lanes)]
        return round(sum(loads) / (lanes * max(loads)), 2)

    counts = range(max(1, min(lanes, len(names)), (len(names) + 1) // 2), len(names) + 1)
    return names[: max(counts, key=lambda count: (busy(count), count), default=0)]


def may_share_cores(model: Any) -> bool:
    """Whether several threads may go through `model` at once: layers that keep a state between calls forbid it."""
    if next(model.parameters()).device.type != "cpu":
        return False
    rope = getattr(model.config, "rope_parameters", None) or {}
    if str(rope.get("rope_type", "default")) in {"dynamic", "longrope"}:
        return False
    return not any(hasattr(layer, "state") and hasattr(layer.state, "threshold") for layer in model.modules())


class Lanes:
    """Threads that share the cores of this process."""

    def __init__(self, threads: int, most: int = MOST_LANES) -> None:
        self.most = max(1, min(threads, most))
        self._threads = threads
        self._pool = ThreadPoolExecutor(self.most, thread_name_prefix="lane") if self.most > 1 else None

    def run(self, jobs: Sequence[Callable[[], None]]) -> None:
        """Calls all of `jobs` and waits for them; what the first one to fail raised is raised when all have ended."""
        if self._pool is None or len(jobs) < 2:
            for job in jobs:
                _with_threads(self._threads, job)
            return
        each = max(1, self._threads // min(len(jobs), self.most))
        futures = [self._pool.submit(_with_threads, each, job) for job in jobs]
        wait(futures)
        for future in futures:
            future.result()


def _with_threads(count: int, job: Callable[[], None]) -> None:
    torch.set_num_threads(count)  # of this thread; one that never said so takes what any other said last
    job()

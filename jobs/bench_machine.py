"""What every benchmark needs: a machine that is quiet, turns that are fair, and a result that is written down."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def busy() -> str | None:
    """Why this machine cannot be timed now; None if it can."""
    import psutil

    load = psutil.cpu_percent(interval=2.0)
    return f"other programs use {load:.0f}% of the processors" if load > 15 else None


def calibration() -> float:
    """Seconds of a fixed loop, the median of five: what a busy machine makes longer."""
    times = []
    for _ in range(5):
        began = time.perf_counter()
        sum(number * number for number in range(1_000_000))
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def processor() -> str:
    """The processors' name and number."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{os.cpu_count()} x {name}"


def options_of(about: str | None) -> argparse.ArgumentParser:
    """What every benchmark of a device is asked; `about` is its docstring."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--allow-busy", action="store_true", help="measure all the same, and say so in the result")
    return parser


def profiled(work: Callable[[], Any], *, on_gpu: bool) -> tuple[Any, dict[str, float]]:
    """torch's profile of one call, and the microseconds of each kernel in it (on a CPU, of each operator)."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        work()
    events = profiler.key_averages()
    if not on_gpu:
        return events, {event.key: event.self_cpu_time_total for event in events}
    return events, {e.key: e.self_device_time_total for e in events if "CUDA" in str(e.device_type)}


def gpu() -> str | None:
    """The GPU's name; None without one."""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def measured(name: str, work: Callable[[], dict[str, Any]], *, allow_busy: bool) -> int:
    """Runs a benchmark on a quiet machine and writes what it gave to ``jobs/results/NAME.json``.

    Returns:
        The exit code: 2 if the machine was busy before, or ran at another speed after than before.
    """
    reason = busy()
    if reason and not allow_busy:
        print(f"refused: {reason}; wait, or pass --allow-busy")
        return 2
    before = calibration()
    result = work()
    after = calibration()
    if not 0.8 < after / before < 1.25:
        reason = f"a fixed loop took {before:.3f} s before and {after:.3f} s after"
    if reason:
        print(f"busy machine: {reason}")
    command = " ".join(["python", *map(str, sys.argv)])
    about = {"command": command, "platform": platform.platform(), "python": platform.python_version()}
    about |= {"processor": processor(), "gpu": gpu(), "busy": reason}
    RESULTS.mkdir(exist_ok=True)
    where = RESULTS / f"{name}.json"
    where.write_text(json.dumps({**about, **result}, indent=1) + "\n", encoding="utf-8")
    print(f"written to jobs/results/{where.name}")
    return 2 if reason and not allow_busy else 0


_LOOK_S = 0.5


@dataclass
class Watch:
    """Wall seconds, processor seconds and highest memory (PSS) of this process and all below it, within the block.

    Looking at the memory of many processes takes time of its own, so it is done in at most 2% of the time.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_mb: float = 0.0
    _stop: threading.Event = field(default_factory=threading.Event)
    _spent: dict[int, float] = field(default_factory=dict)

    def __enter__(self) -> Watch:
        self._start = self._sample()
        self._began = time.perf_counter()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = time.perf_counter() - self._began
        self._stop.set()
        self._thread.join()
        self.cpu_seconds = self._sample() - self._start

    def _look(self) -> None:
        pause = _LOOK_S
        while not self._stop.wait(pause):
            began = time.perf_counter()
            self._sample()
            pause = max(_LOOK_S, 50 * (time.perf_counter() - began))

    def _sample(self) -> float:
        """Processor seconds so far, of ended processes what was last seen of them."""
        import psutil

        me = psutil.Process()
        memory = 0
        for process in [me, *me.children(recursive=True)]:
            try:
                times = process.cpu_times()
                memory += process.memory_full_info().pss
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue
            self._spent[process.pid] = times.user + times.system
        self.peak_mb = max(self.peak_mb, memory / 1e6)
        return sum(self._spent.values())

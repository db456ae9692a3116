"""What is said and kept of each step: derived figures, findings, the progress line, and the trackers' curves."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from raytune_ft.training.config import FineTuningConfig
from raytune_ft.training.diagnosis import Finding, Watch
from raytune_ft.training.loop import Metrics
from raytune_ft.training.schedule import Timetable
from raytune_ft.training.trackers import Trackers
from raytune_ft.training.utilization import DevicePeak, Work, memory_in_use

logger = logging.getLogger("raytune_ft")


@dataclass
class Monitor:
    """Watches a run from its leading process.

    `work` and `peak` give the model FLOP utilization: operations of a step, over what all workers' devices can do.
    """

    config: FineTuningConfig
    timetable: Timetable
    device: str
    world_size: int
    trackers: Trackers
    work: Work
    peak: DevicePeak
    findings: list[Finding] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._watch = Watch(self.config)

    def recall(self, rows: list[dict[str, float]]) -> None:
        """Takes in the history of a resumed run, whose findings were said before."""
        for row in rows:
            self.findings += self._watch.see(row)
        self.trackers.recall(rows)

    def measures(self, metrics: Metrics) -> Metrics:
        """What follows from a step's metrics: shares, speeds, memory."""
        seconds = max(metrics["step_s"], 1e-9)
        operations = self.work.of(metrics["tokens"], metrics["supervised"])
        return {
            "supervised_share": metrics["supervised"] / max(1.0, metrics["tokens"]),
            "flop_utilization": operations / seconds / (self.peak.flops * self.world_size),
            **memory_in_use(self.device),
        }

    def see(self, row: dict[str, float]) -> None:
        """Takes in a row of the history: says it when a line is due, and whatever is found."""
        self.trackers.log(row)
        if self.timetable.logs(int(row["step"])) or any(name.startswith("eval_") for name in row):
            logger.info("%s", progress_line(row, self.timetable.total))
        for finding in self._watch.see(row):
            self.findings.append(finding)
            logger.warning("%s", finding)

    def report(self) -> dict[str, Any]:
        """What the artifact keeps beside the curves."""
        return {
            "findings": [finding.as_json() for finding in self.findings],
            "peak_flops_per_device": self.peak.flops,
            "peak_flops_source": self.peak.source,
            "flops_per_token": self.work.per_token,
            "flops_per_supervised_token_in_the_head": self.work.per_supervised,
            "flops_formula": "6 a trained weight and token, 4 a frozen one; the head on supervised tokens only",
            "tracker_failures": self.trackers.failures,
        }


_OF_REWARDS = ("reward", "reward_accuracy", "reward_margin", "answer_tokens", "cut_off_share", "kl")


def progress_line(row: dict[str, float], total: int) -> str:
    """A step's metrics in words."""
    parts = [f"step {row['step']:.0f}/{total}", f"loss {row['loss']:.4f}"]
    parts += [f"{name.replace('_', ' ')} {row[name]:.3f}" for name in _OF_REWARDS if name in row]
    if "eval_loss" in row:
        parts.append(f"validation loss {row['eval_loss']:.4f}")
    if "eval_perplexity" in row:
        parts.append(f"perplexity {row['eval_perplexity']:.2f}")
    answered = [name for name in row if name.startswith("eval_") and name not in {"eval_loss", "eval_perplexity"}]
    parts += [f"{_evaluated_words(name, row)} {row[name]:.3f}" for name in answered]
    parts.append(f"lr {row['learning_rate']:.2e}")
    parts.append(f"grad norm {row['grad_norm']:.2f}" if "grad_norm" in row else "left out")
    parts.append(f"{row['tokens_per_s']:.0f} tokens/s")
    if "flop_utilization" in row:
        parts.append(f"{row['flop_utilization']:.0%} of peak")
    if "cuda_peak_gib" in row:
        parts.append(f"{row['cuda_peak_gib']:.1f} GiB")
    return ", ".join(parts)


def _evaluated_words(name: str, row: dict[str, float]) -> str:
    """The name of what an evaluation measured; said to be of the validation split where the step measures it, too."""
    bare = name.removeprefix("eval_")
    return f"validation {bare.replace('_', ' ')}" if bare in row else bare

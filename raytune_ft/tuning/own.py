"""Trials that share no base: a training run each, in the process of the trial itself.

Such a run tells of its evaluations as a bank does, and waits with each until somebody asks for the next one.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from raytune_ft.core.errors import InfeasibleError
from raytune_ft.core.manifest import MANIFEST
from raytune_ft.core.storage import Location
from raytune_ft.training.config import DistillationConfig, FineTuningConfig
from raytune_ft.training.config_alignment import OBJECTIVES
from raytune_ft.training.folder import CHECKPOINTS
from raytune_ft.training.reporting import EvaluationReport

Splits = Mapping[int, dict[str, list[str]]]
"""Parquet files of the tokenized splits, by the longest row."""


@dataclass(frozen=True)
class Own:
    """What runs of one process each have in common: their rows, the folder below which each has its own, a device."""

    splits: Splits
    output: str
    device: str
    cpus: float
    threads: int
    objective: str = "train"

    @property
    def gpus(self) -> int:
        """GPUs of a run."""
        return int(self.device != "cpu")

    def start(self, name: str, settings: Mapping[str, Any], heard: int | None = None) -> OwnRun:
        """The run of a trial; it goes on from its newest checkpoint, if it has one.

        Evaluations between the step that was `heard` of last and that checkpoint's are told first.
        """
        return OwnRun(self, self.trial(settings), self.folder(name), heard)

    def trial(self, settings: Mapping[str, Any]) -> FineTuningConfig:
        """A trial's settings for a run of its own: it saves where it is evaluated, and leaves trackers to the sweep.

        It may be stopped with an evaluation that was saved and not heard of: the state before stays, too.
        """
        config = OBJECTIVES[self.objective](**settings)
        if isinstance(config, DistillationConfig) and config.student_layers is not None:
            student = self.student(config.student_layers)
            config = config.with_overrides(model_path=student.uri, student_layers=None)
        return config.with_overrides(
            save_strategy=config.eval_strategy, save_steps=config.eval_steps, save_total_limit=2, report_to=[]
        )

    def folder(self, name: str) -> Location:
        """Where a trial keeps its checkpoints and leaves its model."""
        return Location(self.output) / name

    def student(self, layers: int) -> Location:
        """Where the student lies that trials start from which want so many of the teacher's layers."""
        return Location(self.output) / f"student-{layers}"

    def train(self, config: FineTuningConfig, output: Location, report: EvaluationReport | None = None) -> None:
        """Makes the steps that are left, and writes the model."""
        import torch  # not with the module: the light trials of banks do without

        from raytune_ft.training.session import Seat, train_in_process

        torch.set_num_threads(self.threads)  # a thread's own setting, where OpenMP keeps one
        seat = Seat(device=self.device)
        train_in_process(config, self.splits[config.max_length], seat, output=output, report=report, golden=False)


class _LeftError(Exception):
    """Nobody asks for the next evaluation any more."""


class OwnRun:
    """A training run in a thread of its own."""

    def __init__(self, own: Own, config: FineTuningConfig, output: Location, heard: int | None) -> None:
        self._own, self._config, self._output, self._heard = own, config, output, heard
        self._reports: queue.Queue[dict[str, Any] | Exception] = queue.Queue()
        self._asked = threading.Semaphore(0)
        self._left = False
        self._last: dict[str, Any] = {"step": 0, "metrics": {}, "snapshot": None}
        self._thread = threading.Thread(target=self._run, name="training", daemon=True)
        self._thread.start()

    def next_report(self) -> dict[str, Any]:
        """Waits for the next evaluation, or the end.

        Returns:
            `step`, `metrics`, `status` (running, finished or infeasible), `reason`, and `snapshot`, which is None: the
            run has its checkpoints itself.

        Raises:
            Exception: whatever ended the run.
        """
        self._asked.release()
        report = self._reports.get()
        if isinstance(report, Exception):
            raise report
        return report

    def leave(self) -> None:
        """Ends the run where it waits; what it has saved stays."""
        self._left = True
        self._asked.release()
        self._thread.join()

    def _run(self) -> None:
        self._asked.acquire()
        if self._left:
            return
        report = EvaluationReport(self._config, self._tell)
        try:
            self._own.train(self._config, self._output, report)
            report.model_is_written()
        except _LeftError:
            return
        except InfeasibleError as error:
            end = {"metrics": {}, "step": error.step or report.step, "status": "infeasible", "reason": str(error)}
            self._reports.put({**self._last, **end})
        except Exception as error:  # noqa: BLE001 - it belongs to whoever asks
            self._reports.put(error)
        else:
            if self._last.get("status") != "finished":
                self._reports.put({**self._last, "status": "finished", "reason": "ended before its last step"})

    def _tell(self, row: dict[str, Any]) -> None:
        heard, self._heard = self._heard, None
        for missed in self._evaluations(row, heard) if heard is not None else ():
            self._say(missed)
        self._say(row)

    def _evaluations(self, row: dict[str, Any], heard: int) -> Iterator[dict[str, Any]]:
        """Those after a step and before that of `row`, as the checkpoint of that step remembers them."""
        from raytune_ft.training.checkpoint import StoredCheckpoint, folder_of

        folder, tokens = folder_of(self._output / CHECKPOINTS, row["global_step"]), 0.0
        history = StoredCheckpoint(folder).progress["history"] if (folder / MANIFEST).exists() else []
        for past in history:
            tokens += past["tokens"]
            if heard < past["step"] < row["global_step"] and any(name.startswith("eval_") for name in past):
                yield {**past, "global_step": past["step"], "tokens": tokens, "last_step": row["last_step"]}

    def _say(self, row: dict[str, Any]) -> None:
        step = row["global_step"]
        status = "finished" if step == row["last_step"] else "running"
        self._last = {"step": step, "metrics": row, "status": status, "reason": "", "snapshot": None}
        self._reports.put(self._last)
        if status == "finished":  # the model is written: nothing is left to wait for
            return
        self._asked.acquire()
        if self._left:
            raise _LeftError

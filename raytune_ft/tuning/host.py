"""A bank of trials behind calls: one thread makes the steps, and callers admit trials and wait for their evaluations.

Knows nothing of Ray; as a Ray actor with several threads it serves the trials of a sweep.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from raytune_ft.core.cluster import report_to_driver
from raytune_ft.core.errors import RaytuneError, RunError, UserError, first_line
from raytune_ft.core.refusals import not_stored
from raytune_ft.core.storage import Location
from raytune_ft.data.tokenize import adopt_template
from raytune_ft.models.adapter_slots import layer_without_rows
from raytune_ft.models.memory import is_out_of_memory, release_memory
from raytune_ft.training import checkpoint
from raytune_ft.training.answers import AnswerCheck
from raytune_ft.training.bank.bank import AdapterBank
from raytune_ft.training.bank.base import FrozenBase, load_frozen_base
from raytune_ft.training.bank.preferences import criterion_for, referenced
from raytune_ft.training.bank.snapshot import on_cpu
from raytune_ft.training.bank.template import AdapterTemplate
from raytune_ft.training.bank.trial import Progress, Status
from raytune_ft.training.batches import say_disliked
from raytune_ft.training.config_alignment import OBJECTIVES
from raytune_ft.training.objectives import refuse_too_long, rows_of
from raytune_ft.tuning.homes import POINTERS_KEPT

logger = logging.getLogger("raytune_ft")

_AHEAD = 2
"""Evaluations that a trial may be ahead of what was asked for; then it waits, so that a late stop costs little."""
_MOST_WRITERS = 8
"""Threads that write snapshots; a sum over a file keeps a core busy."""
_KEPT, _MOST_KEPT = POINTERS_KEPT - 1, 3 * POINTERS_KEPT
"""Snapshots that are kept of each trial: its own newest, and those that population-based training may still copy."""
_STATE_AGE_S = 60.0
"""How old Ray Tune's own state on storage may be: a search that goes on from there asks for the snapshots of then.

Tune writes it every 10 s or, where a trial has four checkpoints sooner than that, then; trials are two evaluations
ahead of it. `_MOST_KEPT` leaves room for a slow write.
"""


@dataclass
class _Line:
    """What a trial has to say that was not asked for yet, and how many tokens it has trained on."""

    reports: deque[dict[str, Any]] = field(default_factory=deque)
    unwritten: deque[tuple[Progress, dict[str, float], checkpoint.Checkpoint]] = field(default_factory=deque)
    in_turn: threading.Lock = field(default_factory=threading.Lock)
    writing: int = 0
    published: int = 0
    tokens: float = 0.0
    admitted: float = field(default_factory=time.monotonic)
    written: deque[float] = field(default_factory=deque)

    def snapshots_to_keep(self) -> int:
        """How many of the newest snapshots stay when another one is written now."""
        now = time.monotonic()
        while self.written and self.written[0] < now - _STATE_AGE_S:
            self.written.popleft()
        self.written.append(now)
        if now - self.admitted < _STATE_AGE_S:  # before it was admitted there may have been as many
            return _MOST_KEPT
        return min(max(_KEPT, len(self.written) + 1), _MOST_KEPT)


def _state_at(snapshot: str) -> checkpoint.Checkpoint:
    try:
        return checkpoint.read(Location.at(snapshot))
    except ValueError as error:
        raise RunError(f"the state of a trial is lost: {error}") from None


class BankHost:
    """An adapter bank with a thread that steps it; all methods may be called from any thread."""

    def __init__(
        self,
        settings: Mapping[str, Any],
        splits: Mapping[str, list[str]],
        snapshots: str,
        *,
        objective: str = "train",
        targets: Sequence[list[str] | str] = (),
        device: str,
        threads: int,
        token_budget: int | None = None,
        own_process: bool = False,
    ) -> None:
        """Loads the base; what keeps trials from sharing it is told by `fault`.

        Args:
            settings: of the training that all trials share, as `objective`'s settings are dumped.
            splits: Parquet files of the tokenized splits.
            snapshots: folder or URI that every node reaches.
            objective: ``train`` or ``align``, as in `SweepConfig`.
            targets: all that trials have as `lora_target_modules`; by default what the settings say.
            device: of the base and all adapters.
            threads: CPU threads.
            token_budget: most tokens computed at the same time; by default what the settings say.
            own_process: whether this process is there for the bank alone: then its lines go to the driver, and it ends
                when the bank breaks, so that Ray starts it anew.
        """
        if own_process:
            report_to_driver()
        self._own_process = own_process
        torch.set_num_threads(threads)
        self._snapshots = Location.at(snapshots)
        self._lines: dict[str, _Line] = {}
        self._changed = threading.Condition()
        self._turn = threading.Lock()
        self._entering = 0
        self._writers = ThreadPoolExecutor(max_workers=max(1, min(_MOST_WRITERS, threads)))
        self._cache = TemporaryDirectory()
        self._fault: str | None = None
        self._broken: Exception | None = None
        self._refused: UserError | None = None
        self._kind = OBJECTIVES[objective]
        config = self._kind(**settings)
        wanted = [config.with_overrides(lora_target_modules=modules) for modules in targets] or [config]
        try:
            self._fault = self._open(config, wanted, splits, device, token_budget)
        except UserError as error:
            self._refused = error
        if self._fault is None and self._refused is None:
            threading.Thread(target=self._step_on, name="bank", daemon=True).start()

    def _open(
        self,
        config: Any,
        wanted: Sequence[Any],
        splits: Mapping[str, list[str]],
        device: str,
        token_budget: int | None,
    ) -> str | None:
        """Makes the bank; or says why trials cannot share this base.

        Raises:
            UserError: see `fault`.
        """
        try:
            base = load_frozen_base(config, device)
        except RaytuneError as error:
            return str(error)
        template = AdapterTemplate(base.model, base.name)
        fault = next(filter(None, [template.misfit(one) for one in wanted]), None)
        if fault is not None:
            return fault
        rows = self._rows(config, base, splits)
        validation = rows.get("validation")
        answers = AnswerCheck.wanted(config, validation, base.model, base.tokenizer, device)
        if answers is not None and answers.shortfall:
            logger.warning("%s", answers.shortfall)
        flat = layer_without_rows(base.model) if answers is not None else None
        if flat is not None:
            return f"{base.name}: layer {flat} does not see rows apart, so trials cannot answer in one batch"
        learned = {split: referenced(some) for split, some in rows.items()}
        self._bank = AdapterBank(
            base,
            learned["train"],
            learned.get("validation"),
            criterion=criterion_for(config),
            answers=answers,
            token_budget=token_budget or config.max_tokens_per_micro_batch,
        )
        return None

    def _rows(self, config: Any, base: FrozenBase, splits: Mapping[str, list[str]]) -> dict[str, Any]:
        """The rows of each split, none of them longer than the base can read."""
        adopt_template(base.tokenizer, splits["train"])
        used = [split for split in ("train", "validation") if splits.get(split)]
        rows = {split: rows_of(config)(splits[split], self._cache.name) for split in used}
        say_disliked(rows)
        refuse_too_long(rows, base.model, config)
        return rows

    def fault(self) -> str | None:
        """Why trials cannot share this base; None if they can.

        Raises:
            DataError: if rows are longer than the base can read, or the validation rows give no answers to measure; no
                trial could do better.
            ModelError: if no layer of the base has one of the names that trials want to adapt; nor could this.
        """
        if self._refused is not None:
            raise self._refused
        return self._fault

    def load(self) -> int:
        """Trials in the bank."""
        return len(self._lines)

    def admit(self, name: str, settings: Mapping[str, Any], snapshot: str | None = None) -> None:
        """Takes in a trial, new or from a snapshot; one of the same name gives way.

        Raises:
            UserError: if its settings or its snapshot don't fit the base.
            RunError: if there is no whole snapshot where it should be.
        """
        config = self._kind(**settings)
        kept = _state_at(snapshot) if snapshot else None
        with self._between_steps():
            self._let_go(name)
            self._bank.admit(name, config, kept)
            tokens = sum(row["tokens"] for row in kept.progress["history"]) if kept else 0.0
            self._lines[name] = _Line(tokens=tokens)

    def evict(self, name: str) -> None:
        """Lets a trial go, if it is here; its snapshots stay."""
        with self._between_steps():
            self._let_go(name)

    @contextmanager
    def _between_steps(self) -> Iterator[None]:
        """While the trials change, no step is under way and none is waiting to be noted; callers go before steps."""
        with self._changed:
            self._entering += 1
        try:
            with self._turn:
                yield
        finally:
            with self._changed:
                self._entering -= 1
                self._changed.notify_all()

    def _let_go(self, name: str) -> None:
        if self._lines.pop(name, None) is not None:
            self._bank.evict(name)

    def report(self, name: str, after: int, timeout_s: float = 20.0) -> dict[str, Any] | None:
        """The first report of a trial whose number is above `after`; None if there is none in time.

        A report has its `number` (from 1 since the trial was admitted), `step`, `metrics`, `status`, `reason` and
        `snapshot` (where the trial's state of that step lies). Asking again with the same `after` gives it again.

        Raises:
            KeyError: if the trial is not here (this process was started anew).
            RuntimeError: if the bank's thread ended, with what ended it.
            Exception: what the system said, if storage did not take a snapshot.
        """
        with self._changed:
            found = self._changed.wait_for(lambda: self._ready(name, after), timeout_s)
            return self._lines[name].reports[0] if found else None

    def _ready(self, name: str, after: int) -> bool:
        if self._broken is not None:
            raise self._broken
        reports = self._lines[name].reports
        while reports and reports[0]["number"] <= after:
            reports.popleft()
            self._changed.notify_all()
        return bool(reports)

    def save(self, settings: Mapping[str, Any], snapshot: str, folder: str) -> None:
        """Writes the best adapter of a snapshot as a PEFT folder with the tokenizer.

        Raises:
            RunError: if there is no whole snapshot where it should be.
        """
        kept = _state_at(snapshot)
        with TemporaryDirectory(prefix="raytune-ft-adapter-") as scratch:
            self._bank.save_snapshot(self._kind(**settings), kept, Path(scratch))
            Location.at(folder).upload(Path(scratch))

    def _step_on(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(self._some_may_step)
                with self._turn:
                    held = self._held()
                    for progress in self._steps(held):
                        self._take_note(progress)
        except Exception as error:  # noqa: BLE001 - whatever ends the thread is told to every caller
            self._break(f"{type(error).__name__}: {error}")

    def _break(self, why: str) -> None:
        logger.error("the bank stopped: %s", why)
        if self._own_process:
            os._exit(1)
        self._stop(RuntimeError(why))

    def _stop(self, why: Exception) -> None:
        """Tells every caller; where a disk is full, a process that is started anew would only find it full."""
        with self._changed:
            self._broken = self._broken or why
            self._changed.notify_all()

    def _steps(self, held: set[str]) -> list[Progress]:
        """One step; where memory runs out, fewer trials step together, and one that cannot even alone is given up."""
        failed = list[Progress]()
        while True:
            try:
                return [*failed, *self._bank.step(hold=held)]
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason = first_line(error)
            waited = self._wait_for_writers()
            release_memory()
            too_large = None if waited else self._bank.make_room(hold=held)
            if too_large is not None:
                failed.append(self._bank.fail(too_large, f"out of memory: {reason}"))

    def _wait_for_writers(self) -> bool:
        """Waits for snapshots that are being written, which hold memory of the device; whether there were any."""
        with self._changed:
            lines = [line for line in self._lines.values() if line.writing]
            self._changed.wait_for(lambda: not any(line.writing for line in lines) or self._broken is not None)
        return bool(lines)

    def _held(self) -> set[str]:
        return {name for name, line in self._lines.items() if len(line.reports) + line.writing >= _AHEAD}

    def _some_may_step(self) -> bool:
        if self._entering or self._broken is not None:
            return False
        held = self._held()
        return any(name not in held for name in self._bank.running())

    def _take_note(self, progress: Progress) -> None:
        line = self._lines[progress.name]
        with self._changed:
            line.tokens += progress.metrics.get("tokens", 0.0)
            due = "eval_loss" in progress.metrics or progress.status is not Status.RUNNING
            if not (due or self._bank.trial(progress.name).timetable.eval_every is None):
                return
            line.writing += 1
            last = self._bank.trial(progress.name).timetable.total
            metrics = {**progress.metrics, "tokens": line.tokens, "last_step": float(last)}
        line.unwritten.append((progress, metrics, self._bank.snapshot(progress.name, on_device=True)))
        self._writers.submit(self._publish, line)

    def _publish(self, line: _Line) -> None:
        """The state lies on disk before anybody hears of the step; of a trial let go meanwhile nobody does."""
        with line.in_turn:
            progress, metrics, kept = line.unwritten.popleft()
            folder = self._snapshots / progress.name
            try:
                where = checkpoint.write(folder, on_cpu(kept), keep=line.snapshots_to_keep())
            except Exception as error:  # noqa: BLE001 - its trial would wait for ever
                if not_stored(error) is None:
                    self._break(f"{folder}: the snapshot cannot be written: {type(error).__name__}: {error}")
                else:
                    self._stop(error)
                return
            self._tell(line, progress, metrics, where)

    def _tell(self, line: _Line, progress: Progress, metrics: Mapping[str, float], where: Location) -> None:
        with self._changed:
            line.writing -= 1
            line.published += 1
            line.reports.append(
                {
                    "number": line.published,
                    "step": progress.step,
                    "metrics": dict(metrics),
                    "status": str(progress.status),
                    "reason": progress.reason,
                    "snapshot": where.uri,
                }
            )
            self._changed.notify_all()

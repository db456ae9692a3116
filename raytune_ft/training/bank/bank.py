"""The adapter bank: trials come, step together on one frozen base, and go."""

from __future__ import annotations

import math
import threading
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from raytune_ft.core.errors import ConfigError
from raytune_ft.models.adapter_slots import AdapterSlots
from raytune_ft.training import matrix
from raytune_ft.training.answers import AnswerCheck
from raytune_ft.training.bank.base import FrozenBase
from raytune_ft.training.bank.criterion import Criterion, Examples
from raytune_ft.training.bank.layout import Share
from raytune_ft.training.bank.packed_linear import PassSeat
from raytune_ft.training.bank.passes import Passes
from raytune_ft.training.bank.ragged import RaggedSlots
from raytune_ft.training.bank.referenced import ReferencedRows, known_of
from raytune_ft.training.bank.slot import SlotSettings, SlotState
from raytune_ft.training.bank.snapshot import slot_state, snapshot_of
from raytune_ft.training.bank.stacked import StackedSlots
from raytune_ft.training.bank.template import AdapterTemplate
from raytune_ft.training.bank.trial import Progress, Status, Trial, longest_of
from raytune_ft.training.bank.turns import next_group
from raytune_ft.training.batches import Rows
from raytune_ft.training.checkpoint import Checkpoint
from raytune_ft.training.config import FineTuningConfig
from raytune_ft.training.loop import Metrics, with_perplexity
from raytune_ft.training.schedule import Timetable

TOKEN_BUDGET = {"cpu": 4096, "cuda": 65536}
"""Tokens of a step, by device: on GPUs smaller ones leave it idle."""

Arithmetic = Literal["ragged", "stacked"]


class AdapterBank:
    """LoRA trials on one frozen base; each gets the batches and the losses that it would get alone.

    All methods may be called from several threads: one that changes the trials waits for the step that is under way.
    """

    def __init__(
        self,
        base: FrozenBase,
        train: Rows,
        validation: Rows | None = None,
        *,
        criterion: Criterion | None = None,
        answers: AnswerCheck | None = None,
        token_budget: int | None = None,
        arithmetic: Arithmetic | None = None,
    ) -> None:
        """A bank without trials.

        Args:
            base: what they share; its linear layers are wrapped as trials need them.
            train: rows that they train on, each in its own order.
            validation: rows that they are evaluated on.
            criterion: what they learn from; by default the rows are examples. `Preferences` and `Ratings` want
                `ReferencedRows`.
            answers: what measures the answers that they generate, upon the same base, at each evaluation.
            token_budget: most tokens computed at the same time; trials that don't fit take turns.
            arithmetic: a loop over adapters of exact rank, or all stacked to the highest rank; by default the former
                on CPUs, the latter on GPUs.
        """
        self._base, self._train, self._validation, self._answers = base, train, validation, answers
        self._budget = token_budget or TOKEN_BUDGET["cuda" if base.device.type == "cuda" else "cpu"]
        self._template = AdapterTemplate(base.model, base.name)
        self._seat = PassSeat(base.model)
        arithmetic = arithmetic or ("stacked" if base.device.type == "cuda" else "ragged")
        self._slots = (StackedSlots if arithmetic == "stacked" else RaggedSlots)(base.device)
        self._criterion = criterion or Examples()
        self._passes = Passes(base, self._slots, self._seat, self._criterion)
        self._trials: dict[str, Trial] = {}
        self._untold: list[str] = []  # those that have stepped, until their evaluation is made and told
        self._lock = threading.RLock()
        base.model.train()

    def names(self) -> list[str]:
        """The trials in the bank, those that wait longest for a step first."""
        with self._lock:
            return list(self._trials)

    def trial(self, name: str) -> Trial:
        """A trial's settings and state."""
        with self._lock:
            return self._found(name)

    def admit(self, name: str, config: FineTuningConfig, snapshot: Checkpoint | None = None) -> None:
        """Takes in a trial: new, or going on from a snapshot (its own, or that of a donor of equal shape).

        Raises:
            ConfigError: if there is such a trial already, or if it is no LoRA trial.
            ModelError: if its target modules, or its snapshot, don't fit the base.
        """
        with self._lock:
            if name in self._trials:
                raise ConfigError(f"trial {name}: is in the bank already; evict it first")
            refused = matrix.refusal(replace(config.cell, packed=True))
            refused = refused or self._criterion.refusal(config)
            if refused is not None:
                raise ConfigError(f"trial {name}: only LoRA and QLoRA fine-tuning share a base ({refused})")
            if config.adapter_path is not None:
                raise ConfigError(f"trial {name}: adapter_path: trials of a bank start from fresh adapters")
            if not len(self._train):
                raise ConfigError(f"trial {name}: there are no training rows")
            if config.eval_generation_rows and self._validation is not None and self._answers is None:
                raise ConfigError(f"trial {name}: eval_generation_rows: this bank measures no answers")
            each = self._criterion.rows_per_item
            timetable = Timetable.of(config, len(self._train) // each, has_validation=self._validation is not None)
            trial = Trial(name, config, timetable, self._train, each)
            self._criterion.admit(name, config)
            self._seat_trial(trial, snapshot)
            self._trials[name] = trial

    def evict(self, name: str) -> None:
        """Frees all that a trial holds."""
        with self._lock:
            self._found(name)
            del self._trials[name]
            self._slots.evict(name)
            self._untold = [other for other in self._untold if other != name]

    def snapshot(self, name: str, *, on_device: bool = False) -> Checkpoint:
        """All that a trial needs to go on, on the CPU; `checkpoint.write` puts it on disk.

        With `on_device` the tensors stay on the base's device, so that the next step need not wait for their way.
        """
        with self._lock:
            trial = self._found(name)
            return snapshot_of(trial, self._slots.read(name, on_device=on_device))

    def save(self, name: str, folder: Path) -> None:
        """Writes a trial's adapter as a PEFT folder with the tokenizer: of its best evaluation, if there was one."""
        with self._lock:
            trial = self._found(name)
            weights = trial.best or self.snapshot(name).weights
        self._template.save(trial.config, weights, self._base.tokenizer, folder)

    def save_snapshot(self, config: FineTuningConfig, snapshot: Checkpoint, folder: Path) -> None:
        """As `save`, for a trial that is not here any more."""
        best = {key.removeprefix("best."): t for key, t in snapshot.moments.items() if key.startswith("best.")}
        self._template.save(config, best or snapshot.weights, self._base.tokenizer, folder)

    def running(self) -> list[str]:
        """The trials that have steps left to make."""
        with self._lock:
            return [name for name, trial in self._trials.items() if trial.status is Status.RUNNING]

    def step(self, *, hold: Collection[str] = ()) -> list[Progress]:
        """One optimizer step of the trials that are next in line, and their evaluation where it is due.

        Where memory runs out in the evaluation, the steps are made all the same: the next call makes the rest of it.

        Args:
            hold: trials that make no step now.

        Returns:
            A report of each that stepped; nothing if no trial is running.
        """
        with self._lock:
            if not self._untold:
                self._untold = self._owing() or self._step_next(hold)
            trials = [self._trials[name] for name in self._untold]
            self._evaluate_due([trial for trial in trials if trial.owes_evaluation])
            self._untold = []
            return [trial.progress() for trial in trials]

    def make_room(self, *, hold: Collection[str] = ()) -> str | None:
        """After memory ran out: the next step, or what is left of an evaluation, takes half the tokens at most.

        Returns:
            The trial whose turn it was, if it needs less than that by itself already: then no smaller one will help it.
        """
        with self._lock:
            owing = self._owing()
            line = owing or [name for name in self.running() if name not in hold]
            if not line:
                return None
            rows = self._validation if owing and self._validation else self._trials[line[0]].upcoming().rows
            longest = longest_of(rows, self._criterion.rows_together)
            if self._budget <= longest:
                return line[0]
            self._budget = max(longest, self._budget // 2)
            return None

    def fail(self, name: str, reason: str) -> Progress:
        """Marks a trial infeasible and reports it; its curve stays."""
        with self._lock:
            trial = self._found(name)
            trial.fail(reason)
            self._untold = [other for other in self._untold if other != name]
            return trial.progress()

    def evaluate(self, names: Sequence[str]) -> dict[str, float]:
        """Mean loss of these trials over the items of the validation rows.

        Raises:
            ConfigError: if there are no validation rows, or there is no such trial.
        """
        with self._lock:
            if self._validation is None or not len(self._validation):
                raise ConfigError("the bank has no validation rows to evaluate on")
            found = self._evaluate([self._found(name) for name in names], self._validation)
            return {name: metrics["eval_loss"] for name, metrics in found.items()}

    def _found(self, name: str) -> Trial:
        if name not in self._trials:
            raise ConfigError(f"trial {name}: is not in the bank (it holds {', '.join(self._trials) or 'none'})")
        return self._trials[name]

    def _seat_trial(self, trial: Trial, snapshot: Checkpoint | None) -> None:
        targets, initial = self._template.initial(trial.config)
        state = SlotState.initial(initial)
        if snapshot is not None:
            state = slot_state(snapshot, initial, trial.name)
            trial.recall(snapshot)
        self._seat.wrap(targets)
        self._slots.admit(trial.name, SlotSettings.of(trial.config, targets), state)

    def _owing(self) -> list[str]:
        """The trials that wait for an evaluation after their last step."""
        return [name for name, trial in self._trials.items() if trial.owes_evaluation]

    def _step_next(self, hold: Collection[str]) -> list[str]:
        """Makes a step of those next in line, and gives their names."""
        running = {name: self._trials[name] for name in self.running() if name not in hold}
        line = {name: trial.tokens for name, trial in running.items()}
        group = self._passes.evened({name: line[name] for name in next_group(line, self._budget)})
        if group:
            self._step_group([running[name] for name in self._slots.order(group)])
        for name in group:  # to the end of the line
            self._trials[name] = self._trials.pop(name)
        return group

    def _step_group(self, trials: list[Trial]) -> None:
        coming = [trial.upcoming() for trial in trials]
        self._look_up(self._train, [number for step in coming for number in step.numbers])
        shares = self._learned_from(
            [
                Share(
                    trial.name,
                    step.rows,
                    trial.config.seed,
                    trial.step + 1,
                    range(len(step.rows)),
                    known_of(self._train, step.numbers),
                    self._criterion.rows_per_item,
                )
                for trial, step in zip(trials, coming, strict=True)
            ]
        )
        items = [self._criterion.items(share) for share in shares]
        rates = {trial.name: trial.rate() for trial in trials}
        self._slots.zero_gradients([trial.name for trial in trials])
        sums = self._passes.train(shares, items, self._budget)
        norms = self._slots.step(rates)
        counts = torch.tensor(items, dtype=torch.float64).clamp_(min=1)
        for trial in trials:
            trial.look_ahead()
        # The only place in a step where the host waits for the device.
        found = torch.cat([sums, norms.double().unsqueeze(1)], 1).cpu()
        means = found[:, :-1] / counts.unsqueeze(1)
        for trial, share, measured, norm in zip(trials, shares, means.tolist(), found[:, -1].tolist(), strict=True):
            numbers = dict(zip(self._criterion.measures, measured, strict=True))
            numbers |= {"grad_norm": norm, "learning_rate": rates[trial.name], **self._criterion.told(trial.name)}
            trial.advance({**numbers, "tokens": share.tokens, "supervised": share.supervised})

    def _evaluate_due(self, trials: list[Trial]) -> None:
        if not trials or self._validation is None:
            return
        measured = self._evaluate(trials, self._validation)
        answered = self._answered([trial.name for trial in trials if math.isfinite(measured[trial.name]["eval_loss"])])
        for trial in trials:
            if trial.evaluated({**measured[trial.name], **answered.get(trial.name, {})}):
                trial.best = self._slots.weights(trial.name)

    def _evaluate(self, trials: list[Trial], rows: Rows) -> dict[str, Metrics]:
        names = self._slots.order([trial.name for trial in trials])
        self._base.model.eval()
        try:
            everyone = range(len(rows))
            self._look_up(rows, everyone)
            if self._criterion.looks_beside:
                all_rows, known = [rows[number] for number in everyone], known_of(rows, everyone)
                each = self._criterion.rows_per_item
                self._learned_from([Share(name, all_rows, known=known, together=each) for name in names])
            found = self._passes.score(names, rows, self._budget)
        finally:
            self._base.model.train()
        told = [f"eval_{name}" for name in self._criterion.measures]
        measured = {name: dict(zip(told, means, strict=True)) for name, means in found.items()}
        if not self._criterion.is_likelihood:
            return measured
        return {name: with_perplexity(metrics) for name, metrics in measured.items()}

    def _look_up(self, rows: Rows, numbers: Sequence[int]) -> None:
        """Has the base say of these rows, once for all trials, what their losses want to know of it."""
        if isinstance(rows, ReferencedRows):
            unknown = rows.unknown(numbers)
            rows.learn(unknown, self._passes.said_by_base([rows[number] for number in unknown], self._budget))

    def _learned_from(self, shares: Sequence[Share]) -> list[Share]:
        """What of these rows the trials learn from; what has to be known of the others before is computed."""
        parts = [self._criterion.divided(share) for share in shares]
        beside = [other for _, other in parts if other is not None]
        if beside:
            said = self._passes.said(beside, self._budget)
            for share in beside:
                self._criterion.note(share, said[share.name])
        return [learned for learned, _ in parts]

    def _answered(self, names: Sequence[str]) -> dict[str, Metrics]:
        """What the answers of these trials measure; nothing where none are asked for."""
        if self._answers is None or not names:
            return {}
        adapters = AdapterSlots(self._base.model, slots=len(names))
        try:
            for slot, name in enumerate(names, start=1):
                adapters.put(slot, self._slots.settings(name).factors(self._slots.weights(name)))
            each = self._answers.measure_each(adapters, range(1, len(names) + 1), token_budget=self._budget)
        finally:
            adapters.close()
        return dict(zip(names, each, strict=True))

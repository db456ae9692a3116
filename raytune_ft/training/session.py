"""One process's part of a training run: builds learner, keeper and monitor, and runs the loop between them.

Knows nothing of Ray: where it stands among the other processes is given, so a run of one process is the same code.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from raytune_ft.core.errors import RunError, StoppedError, first_line
from raytune_ft.core.grammar import number_of
from raytune_ft.core.storage import Location
from raytune_ft.data.tokenize import adopt_template
from raytune_ft.models.loading import load_tokenizer, torch_dtype
from raytune_ft.models.memory import is_out_of_memory
from raytune_ft.training.answers import AnswerCheck, AnsweringLearner
from raytune_ft.training.batches import TokenRows, evaluation_batches, one_ahead, packed_steps
from raytune_ft.training.config import FineTuningConfig
from raytune_ft.training.config_alignment import ReinforcementConfig
from raytune_ft.training.cursor import Cursor
from raytune_ft.training.deepspeed_settings import refuse_other_run
from raytune_ft.training.engine import LocalLearner, Trainee, ZeroLearner, make_trainee
from raytune_ft.training.folder import CHECKPOINTS, TENSORBOARD
from raytune_ft.training.golden import golden_of
from raytune_ft.training.guide import departures_of_timetable
from raytune_ft.training.interruption import agreed, is_noted
from raytune_ft.training.judges import refuse_misfits
from raytune_ft.training.keeper import Keeper
from raytune_ft.training.loop import Decision, Learner, Metrics, NotFiniteError, TrainingSummary, fit
from raytune_ft.training.micro_batches import (
    DIVISOR,
    NotOneRowError,
    OutOfMemoryError,
    ShrinkingLearner,
    SkippingLearner,
    shrunk,
)
from raytune_ft.training.monitor import Monitor
from raytune_ft.training.objectives import look_at_start, opened_rows, refuse_too_long
from raytune_ft.training.peers import Peers
from raytune_ft.training.ratings import RatedLearner, RatedLoss
from raytune_ft.training.reporting import EvaluationReport
from raytune_ft.training.rollouts import RolloutLearner, Rollouts, prompt_steps, refuse_unjudged
from raytune_ft.training.schedule import Timetable, refuse_without_validation
from raytune_ft.training.trackers import TRACKED, Trackers
from raytune_ft.training.utilization import Work, device_peak
from raytune_ft.training.zero import precision_of, sharded_loading

logger = logging.getLogger("raytune_ft")

Report = Callable[[int, Metrics], Decision]
_SHRUNK = "micro_batches.json"


@dataclass(frozen=True)
class Seat:
    """Where this process stands: its rank among `world_size`, its device, and whether DeepSpeed joins the ranks."""

    rank: int = 0
    world_size: int = 1
    device: str = "cpu"
    deepspeed: bool = False


def train_in_process(
    config: FineTuningConfig,
    splits: dict[str, list[str]],
    seat: Seat,
    *,
    output: Location | None,
    report: Report | None = None,
    stop_wanted: Callable[[], bool] = is_noted,
    golden: bool = True,
) -> TrainingSummary:
    """Trains, and leaves the best weights under `output` (rank 0).

    Args:
        config: the run's settings; its `model_path` must be reachable from here.
        splits: Parquet files of the tokenized ``train`` and ``validation`` splits.
        seat: this process's place.
        output: where checkpoints, curves and the model go; None writes nothing.
        report: told every step's metrics, with the tokens so far and the run's last step; of a step that is saved,
            when it lies on storage. After a restart it hears of the step that the run goes on from again.
        stop_wanted: asked after every step; any rank's yes saves a checkpoint and ends the run.
        golden: whether the model brings golden answers, which take some time to make.

    Raises:
        StoppedError: if the run was asked to stop; on all ranks.
        RunError: if the loss is no number, or memory does not suffice.
    """
    with tempfile.TemporaryDirectory() as cache:
        events = _events_folder(output, cache)
        trackers = _trackers(config, seat, output, events)
        rows = opened_rows(config, splits, cache, leads=seat.rank == 0)
        train, validation = rows["train"], rows.get("validation")
        precision = precision_of(config, seat.device)
        timetable = _planned(config, rows, precision, leads=seat.rank == 0)
        divisor = _earlier_divisor(output)
        fitting = shrunk(config, divisor)
        with sharded_loading(fitting, seat.device) if seat.deepspeed else nullcontext():
            trainee = make_trainee(fitting, seat.device)
        refuse_too_long(rows, trainee.model, config)
        adopt_template(trainee.tokenizer, splits["train"])
        peers = Peers(seat.rank, seat.world_size, seat.device)
        evaluation = partial(_evaluation, fitting, validation, peers)
        kind = ZeroLearner if seat.deepspeed else LocalLearner
        learner: LocalLearner | ZeroLearner = kind(trainee, fitting, timetable, seat.device, evaluation)
        careful = _within_memory(learner, fitting, divisor, output, precision)
        if isinstance(trainee.loss, RatedLoss):
            careful = RatedLearner(careful, trainee.loss, peers, evaluation)
        watched = _answering(careful, fitting, trainee, rows, peers=peers)
        look_at_start(trainee.loss, timetable, rows, peers, output / CHECKPOINTS if output else None)
        keeper = Keeper(config, learner, output, peers, of_trial=isinstance(report, EvaluationReport))
        keeper.resume(timetable.total, Cursor(config.seed, config.global_batch_size, len(train)))
        monitor = _monitor(config, timetable, trainee, seat, trackers) if keeper.leads else None
        if monitor is not None:
            monitor.recall(keeper.history.rows)
        parts = fitting.gradient_accumulation_steps
        batches = _steps(config, train, keeper.start, peers, micro_batches=parts)
        summary = _Run(seat, timetable, keeper, monitor, report, stop_wanted).fit(watched, one_ahead(batches), trackers)
        if summary.left:
            raise StoppedError(f"stopped after step {summary.steps} of {timetable.total} ({keeper.saved_words()})")
        whole = partial(golden_of, trainee.model, trainee.tokenizer, config, validation, seat.device)
        golden = golden and trainee.loss.writes_text and config.zero_stage != 3
        keeper.finish(summary, monitor, events, whole if golden else None)
    return summary


def _planned(config: FineTuningConfig, rows: dict[str, TokenRows], precision: str, *, leads: bool) -> Timetable:
    """The steps of the run, after the checks that its rows and settings allow them; rank 0 says what is unusual."""
    has_validation = "validation" in rows
    if not has_validation:
        refuse_without_validation(config)
    if isinstance(config, ReinforcementConfig):
        refuse_unjudged(rows, config)
        refuse_misfits(rows, config, load_tokenizer(config.model_path))
    timetable = Timetable.of(config, len(rows["train"]), has_validation=has_validation)
    refuse_other_run(config, precision, total=timetable.total, warmup=timetable.warmup)
    for departure in departures_of_timetable(config, timetable) if leads else ():
        logger.warning("train: %s", departure)
    return timetable


@dataclass(frozen=True)
class _Run:
    """A run under way: who hears of its steps, and who remembers them."""

    seat: Seat
    timetable: Timetable
    keeper: Keeper
    monitor: Monitor | None
    report: Report | None
    stop_wanted: Callable[[], bool]

    def fit(self, learner: Any, batches: Iterator[Any], trackers: Trackers) -> TrainingSummary:
        """Makes the steps; whatever ends them, what is being saved is whole and the trackers know how it ended."""
        keeper, status = self.keeper, "failed"

        def save(step: int) -> None:
            keeper.save(step)
            trackers.go_on_later()

        try:
            summary = fit(
                learner,
                batches,
                self.timetable,
                start=keeper.start,
                last=keeper.history.last,
                stopping=keeper.patience,
                on_best=keeper.keep_best,
                on_save=save,
                note=self._note,
                report=self._told,
            )
            keeper.settle()
            status = "stopped" if summary.left else "finished"
        except NotFiniteError as error:
            keeper.settle()
            good = keeper.last_good(error.step) if self.report is None else ""  # a trial's go with its sweep
            raise _not_a_number(error, good, self.monitor) from None
        finally:
            keeper.abandon()
            trackers.close(status)
        return summary

    def _note(self, step: int, metrics: Metrics) -> None:
        monitor = self.monitor
        row = self.keeper.history.add(step, {**metrics, **(monitor.measures(metrics) if monitor else {})})
        if monitor is not None:
            monitor.see(row)

    def _told(self, step: int, metrics: Metrics) -> Decision:
        decision = Decision.CONTINUE
        if self.report is not None:
            self.keeper.settle()  # whoever hears of a step may end this process at once
            more = {"tokens_so_far": self.keeper.history.tokens, "last_step": float(self.timetable.total)}
            decision = self.report(step, {**metrics, **more})
        return Decision.LEAVE if agreed(self.stop_wanted, self.seat.device, self.seat.world_size) else decision


def _not_a_number(error: NotFiniteError, last_good: str, monitor: Monitor | None) -> RunError:
    if monitor is not None:
        monitor.see({"step": error.step, "tokens_per_s": 0.0, **error.metrics})
    return NotFiniteError(error.step, error.metrics, last_good)


def _events_folder(output: Location | None, cache: str) -> Path:
    """Event files are written where they stay if that is a local path, so that TensorBoard can follow the run."""
    if output is not None and output.is_local:
        return Path((output / TENSORBOARD).path)
    return Path(cache) / TENSORBOARD


def _trackers(config: FineTuningConfig, seat: Seat, output: Location | None, events: Path) -> Trackers:
    """The configured trackers on rank 0, started before anything is loaded; none elsewhere."""
    if output is None or seat.rank != 0:
        return Trackers({})
    kept = output / CHECKPOINTS / TRACKED
    return Trackers.start(config.report_to, folder=events, run=str(output), settings=config.resolved(), kept=kept)


def _monitor(
    config: FineTuningConfig, timetable: Timetable, trainee: Trainee, seat: Seat, trackers: Trackers
) -> Monitor:
    peak = device_peak(seat.device, torch_dtype(config.precision, seat.device))
    work = Work.count(trainee.model)
    return Monitor(config, timetable, seat.device, seat.world_size, trackers, work, peak)


def _evaluation(config: FineTuningConfig, validation: TokenRows | None, peers: Peers) -> Iterator[Any]:
    """This rank's batches of the validation split."""
    if validation is None:
        return iter(())
    return evaluation_batches(validation, config.per_device_eval_batch_size, peers.rank, peers.world_size)


def _steps(
    config: FineTuningConfig, train: TokenRows, start: int, peers: Peers, *, micro_batches: int
) -> Iterator[Any]:
    """What the learner takes at each step after `start`: this rank's micro-batches, or the prompts of its answers."""
    if isinstance(config, ReinforcementConfig):
        return prompt_steps(len(train), config, start=start, peers=peers, micro_batches=micro_batches)
    return packed_steps(
        train,
        config.global_batch_size,
        config.seed,
        start=start,
        rank=peers.rank,
        world_size=peers.world_size,
        micro_batches=micro_batches,
        token_budget=config.max_tokens_per_micro_batch,
    )


def _answering(
    learner: Learner, config: FineTuningConfig, trainee: Trainee, rows: dict[str, TokenRows], *, peers: Peers
) -> Learner:
    """The learner, which also answers validation rows at each evaluation, or learns from answers, if that is wished."""
    validation = rows.get("validation")
    if isinstance(config, ReinforcementConfig):
        rollouts = Rollouts(trainee.model, trainee.tokenizer, config, peers)
        return RolloutLearner(learner, rollouts, rows["train"], validation, config.eval_generation_rows)
    answers = AnswerCheck.wanted(config, validation, trainee.model, trainee.tokenizer, peers.device)
    if answers is None:
        return learner
    if answers.shortfall and peers.leads:
        logger.warning("%s", answers.shortfall)
    return AnsweringLearner(learner, answers, peers)


def _within_memory(
    learner: LocalLearner | ZeroLearner,
    config: FineTuningConfig,
    divisor: int,
    output: Location | None,
    precision: str,
) -> Learner:
    if isinstance(learner, LocalLearner):
        return ShrinkingLearner(learner, base=divisor)
    careful = _RestartingLearner(learner, config, divisor, output)
    return SkippingLearner(careful) if precision == "fp16" else careful


@dataclass
class _RestartingLearner:
    """A learner under DeepSpeed: memory that runs out on one rank leaves the others inside a reduction.

    No rank can take such a step back. The wish for smaller micro-batches is written to storage instead, and the run
    restarts from its newest checkpoint, with all ranks agreeing because they read the same wish.
    """

    learner: ZeroLearner
    config: FineTuningConfig
    divisor: int
    output: Location | None

    def step(self, batch: Any, step: int) -> Metrics:
        """Makes an optimizer step.

        Raises:
            OutOfMemoryError: if memory ran out; what to change is written where the next attempt reads it.
        """
        return {**self._kept_within(f"step {step}", partial(self.learner.step, batch, step)), DIVISOR: self.divisor}

    def evaluate(self) -> Metrics:
        """The learner's own evaluation.

        Raises:
            OutOfMemoryError: as in a step.
        """
        return self._kept_within("evaluation", self.learner.evaluate)

    def _kept_within(self, where: str, work: Callable[[], Metrics]) -> Metrics:
        try:
            return work()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reason = first_line(error)
        raise self._wish(where, reason)  # outside: an error that is being handled keeps its frames' tensors

    def _wish(self, where: str, reason: str) -> OutOfMemoryError:
        rows = self.config.per_device_train_batch_size
        if rows == 1 or self.output is None:
            return NotOneRowError(where, reason)
        (self.output / CHECKPOINTS / _SHRUNK).write(json.dumps({"divisor": self.divisor * 2}).encode())
        return OutOfMemoryError(
            f"{where}: out of memory with {number_of(rows, 'row')} at a time ({reason}); the next attempt goes on from "
            f"the newest checkpoint with {number_of(-(-rows // 2), 'row')} at a time and the same global batch"
        )


def _earlier_divisor(output: Location | None) -> int:
    """Into how many parts an earlier attempt wished to divide micro-batches; 1 if it did not."""
    if output is None or not (output / CHECKPOINTS / _SHRUNK).exists():
        return 1
    return int(json.loads((output / CHECKPOINTS / _SHRUNK).read())["divisor"])

"""Where training meets Ray: tokenized data, Ray Train workers, and the finished model artifact."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from raytune_ft.core import cluster
from raytune_ft.core.artifacts import Artifact
from raytune_ft.core.draft import Draft, begin
from raytune_ft.core.errors import (
    ConfigError,
    DataError,
    InfeasibleError,
    MissingDependencyError,
    ModelError,
    RaytuneError,
    RunError,
    StoppedError,
    UserError,
    last_line,
)
from raytune_ft.core.manifest import ArtifactKind
from raytune_ft.core.placement import Demand, ResourcePlan
from raytune_ft.core.refusals import not_stored
from raytune_ft.core.storage import Location
from raytune_ft.training.config import DistillationConfig, FineTuningConfig
from raytune_ft.training.folder import CHECKPOINTS, read_history, read_report, read_summary
from raytune_ft.training.guide import departures_from_guide
from raytune_ft.training.inputs import (
    checked,
    data_parent,
    model_parents,
    reachable,
    refuse_other_batch,
    refuse_other_student,
    splits_of,
)
from raytune_ft.training.interruption import StopBoard, is_noted, note_sigterm
from raytune_ft.training.loop import Metrics, NotFiniteError
from raytune_ft.training.micro_batches import NotOneRowError, OutOfMemoryError
from raytune_ft.training.reporting import EvaluationReport
from raytune_ft.training.schedule import refuse_without_validation
from raytune_ft.training.without_effect import without_effect

logger = logging.getLogger("raytune_ft")

RAY_STATE = "ray"
_STUDENT = "student"
_ENDED = "ended.json"
_MISTAKES: tuple[type[UserError], ...] = (ConfigError, DataError, ModelError, MissingDependencyError)
"""What another attempt would only meet again; an `ArtifactError` may be storage that answers next time."""
_SAVES = "asked to stop: a checkpoint is saved after this step (ask again to stop at once)"
_NOT_YET = "asked to stop: no step runs yet; the run stops as soon as one is made (ask again to stop at once)"
_NO_CLUSTER = (
    "asked to stop, and Ray was ended with this run: no checkpoint is saved now; the same command goes on from the "
    "newest one"
)


class FineTuner:
    """Fine-tunes a model as its settings say."""

    def __init__(self, config: FineTuningConfig) -> None:
        self.config = config

    def train(self) -> Artifact:
        """Trains on the cluster and returns the finished model artifact.

        Run again with the same settings, it finds the finished model, or goes on from the newest checkpoint.

        Raises:
            UserError: for what the user can mend.
            RunError: if training failed.
        """
        return train(self.config)


def distill_model(teacher_path: str, output_dir: str, config: DistillationConfig) -> str:
    """Trains a student on what a teacher says, into a new folder, and returns its path; see `distill`.

    Args:
        teacher_path: the model to learn from; overrides the settings'.
        output_dir: overrides the settings'.
        config: student, dataset, and how to train.
    """
    return distill(config.with_overrides(teacher_path=teacher_path, output_dir=output_dir)).location.uri


def distill(config: DistillationConfig) -> Artifact:
    """The verb: makes the student, if none was given, and trains it as `FineTuner.train` does.

    Raises:
        ModelError: if teacher and student have other tokens, or the teacher has too few layers.
    """
    return train(config)


def train(config: FineTuningConfig) -> Artifact:
    """The verb: see `FineTuner.train`."""
    refuse_other_student(config)
    config = checked(config)
    output = Location.at(config.output_dir)
    refuse_other_batch(config, output)
    draft = begin(
        output,
        ArtifactKind.MODEL,
        settings=config.resolved(),
        identity=config.identity(),
        parents=[*model_parents(config, output.parent), data_parent(config.dataset_path)],
        keep=(CHECKPOINTS,),
        idle=config.idle,
    )
    if draft.finished:
        logger.info("train: found finished at %s", output)
        return draft.finished
    for departure in departures_from_guide(config):
        logger.warning("train: %s", departure)
    for name, why in without_effect(config).items():
        logger.warning("train: %s is set and changes nothing: it %s", name, why)
    with draft:
        connected = cluster.connect()
        use_gpu = config.on_gpu(connected.gpus)
        if config.cpus_per_worker is None and not use_gpu:
            config = config.with_overrides(cpus_per_worker=connected.share(worker_demand(config, use_gpu=False)))
        connected.admit(ResourcePlan("train", (worker_demand(config, use_gpu=use_gpu),)))
        ready = with_student(reachable(config, output.parent), output / _STUDENT)
        splits = splits_of(ready, output / "tokens")
        if not splits.get("validation"):
            refuse_without_validation(config)
        run_workers(ready, splits, output, use_gpu=use_gpu)
        _keep_numbers(draft, output)
        for leftover in (RAY_STATE, CHECKPOINTS, "tokens", _STUDENT):
            (output / leftover).delete()
    return draft.artifact


def with_student(config: FineTuningConfig, student: Location) -> FineTuningConfig:
    """The settings with a student to start from, which is made of its teacher's layers, in a folder, if none is given.

    Raises:
        ModelError: if the teacher has too few layers.
    """
    if not isinstance(config, DistillationConfig) or config.student_layers is None:
        return config
    from raytune_ft.training.distill import write_student

    try:
        ray.get(ray.remote(write_student).remote(config.teacher_path, student, config.student_layers))
    except ray.exceptions.RayTaskError as error:
        raise _failure(error) from error
    return config.with_overrides(model_path=student.uri, student_layers=None)


def worker_demand(config: FineTuningConfig, *, use_gpu: bool) -> Demand:
    """What the run's workers hold; one CPU each, where nothing is said."""
    cpus = config.cpus_per_worker or 1.0
    return Demand("train worker", config.num_workers, cpus, int(use_gpu), max(1, int(cpus)))


@dataclass(frozen=True)
class Reported:
    """A run whose evaluations are reported to Ray Train, and by `callbacks` to others: a trial of a sweep."""

    callbacks: tuple[Any, ...]


def run_workers(
    config: FineTuningConfig,
    splits: dict[str, list[str]],
    output: Location,
    *,
    use_gpu: bool,
    reported: Reported | None = None,
) -> None:
    """Trains on Ray Train workers until the model is written; each time memory runs out, with smaller micro-batches.

    Raises:
        StoppedError: if SIGTERM came, here or to a worker; a checkpoint is saved then.
        UserError: for what only the workers find of what the user can mend; no attempt is repeated for it.
        InfeasibleError: if a loss was no number, or memory does not hold a single row.
        Exception: what the system said, if a worker found that storage takes no more.
        RunError: if training failed otherwise.
    """
    (output / _ENDED).delete()
    with _stop_on_sigterm() as board:
        while True:
            try:
                _fit(config, splits, output, board, use_gpu=use_gpu, reported=reported)
                break
            except NotOneRowError:
                raise
            except OutOfMemoryError as error:
                logger.warning("%s", error)
                (output / RAY_STATE).delete()
        _raise_not_stored(board)
    if (output / _ENDED).exists():
        ended = json.loads((output / _ENDED).read())
        if ended["kind"] == "stopped":
            raise StoppedError(f"{ended['message']}; the same command goes on from there")
        for kind in _MISTAKES:
            if ended["kind"] == kind.__name__:
                raise kind(ended["message"])
        infeasible = InfeasibleError(ended["message"])
        infeasible.step = ended["step"]
        raise infeasible


def _fit(
    config: FineTuningConfig,
    splits: dict[str, list[str]],
    output: Location,
    board: Any,
    *,
    use_gpu: bool,
    reported: Reported | None,
) -> None:
    demand = worker_demand(config, use_gpu=use_gpu)
    storage_path, filesystem = output.for_ray
    told = {"config": config, "splits": splits, "output": output.uri, "board": board, "threads": demand.threads}
    trainer = _InterruptibleTrainer(
        _worker,
        train_loop_config={**told, "reports": reported is not None},
        torch_config=_StoppableTorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=config.num_workers, use_gpu=use_gpu, resources_per_worker={"CPU": demand.cpus}
        ),
        run_config=RunConfig(
            name=RAY_STATE,
            storage_path=storage_path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=config.max_failures),
            callbacks=list(reported.callbacks) if reported is not None else None,
            worker_runtime_env={"env_vars": cluster.worker_environment()},
        ),
    )
    try:
        trainer.fit()
    except KeyboardInterrupt:
        trainer.abort()
        raise
    except Exception as error:
        _raise_not_stored(board)
        raise _failure(error) from error


class _InterruptibleTrainer(TorchTrainer):  # type: ignore[misc]  # Ray's classes count as Any
    """Ray's, which leaves Ctrl-C to us: its own handler ends the process with 1, and outlives the run."""

    _controller: Any = None

    def _register_sigint_handler(self, controller: Any) -> None:
        self._controller = controller

    def abort(self) -> None:
        """Ends the run's workers, if there are any yet."""
        if self._controller is not None:
            with suppress(ray.exceptions.RayError):  # it ends itself with them
                ray.get(self._controller.abort.remote(), timeout=30)


def _worker(settings: dict[str, Any]) -> None:
    """What each Ray Train worker runs; an ending that a new attempt would only repeat is written, not raised."""
    import torch

    from raytune_ft.training.session import Seat, train_in_process  # loads what neither driver nor controller needs

    cluster.report_to_driver()
    config: FineTuningConfig = settings["config"]
    output, board = Location(settings["output"]), settings["board"]
    context = ray.train.get_context()
    torch.set_num_threads(settings["threads"])
    device = str(ray.train.torch.get_device())
    seat = Seat(context.get_world_rank(), context.get_world_size(), device, deepspeed=True)
    if _answer(board.begins.remote(seat.rank)) is not None:
        return  # another attempt would find the disk as full
    asked = _asked(board) if seat.rank == 0 else is_noted
    report = EvaluationReport(config, ray.train.report) if settings["reports"] else None
    given: dict[str, Any] = {"report": report, "golden": False} if report is not None else {}
    try:
        train_in_process(config, settings["splits"], seat, output=output, stop_wanted=asked, **given)
        if report is not None:
            report.model_is_written()
        _answer(board.ends.remote(seat.rank))
    except (StoppedError, NotFiniteError) as error:
        if seat.rank == 0:
            kind, step = ("stopped", 0) if isinstance(error, StoppedError) else ("infeasible", error.step)
            (output / _ENDED).write(json.dumps({"kind": kind, "message": str(error), "step": step}).encode())
    except _MISTAKES as error:
        if not _answer(board.all_end.remote(seat.rank, seat.world_size)):
            raise  # the others wait for this rank, and end with it
        if seat.rank == 0:
            ended = {"kind": _mistake(error).__name__, "message": str(error)}
            (output / _ENDED).write(json.dumps(ended).encode())
    except Exception as error:
        cause = not_stored(error)
        if cause is None:
            raise
        _answer(board.note_not_stored.remote(cause))
        if not _answer(board.all_end.remote(seat.rank, seat.world_size)):
            raise  # the others wait for this rank, and end with it


def _answer(reference: Any) -> Any:
    """What a board answers; None if it is gone with its node."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayActorError:
        return None


def _raise_not_stored(board: Any) -> None:
    found: Exception | None = _answer(board.not_stored.remote())
    if found is not None:
        raise found


def _mistake(error: Exception) -> type[UserError]:
    return next(kind for kind in _MISTAKES if isinstance(error, kind))


@dataclass
class _StoppableTorchConfig(TorchConfig):  # type: ignore[misc]  # Ray's classes count as Any
    """Ray Train's, whose workers take SIGTERM as a wish to stop: handlers are set in a worker's main thread only."""

    @property
    def backend_cls(self) -> Any:
        """Ray's backend for torch, which also sets the handler."""

        class Stoppable(super().backend_cls):  # type: ignore[misc]
            def on_start(self, worker_group: Any, backend_config: Any) -> None:
                super().on_start(worker_group, backend_config)
                worker_group.execute(note_sigterm)

        return Stoppable


def _asked(board: Any) -> Callable[[], bool]:
    """Whether this worker got SIGTERM, or the driver asks to stop; costs no round trip."""
    answer = board.requested.remote()

    def asked() -> bool:
        if is_noted():
            return True
        if not ray.wait([answer], timeout=0)[0]:
            return False
        try:
            return bool(ray.get(answer))
        except ray.exceptions.RayActorError:  # the board is gone with its node: nobody asked
            return False

    return asked


@contextmanager
def _stop_on_sigterm() -> Iterator[Any]:
    """A board that SIGTERM to this process writes on; a second SIGTERM ends the process at once.

    Where the cluster was ended by the same signal (to a service's whole control group), the process ends, too.
    """
    board: Any = ray.remote(num_cpus=0)(StopBoard).remote()
    if threading.current_thread() is not threading.main_thread():
        yield board
        return
    came, over, before = threading.Event(), threading.Event(), signal.getsignal(signal.SIGTERM)

    def note(signum: int, frame: FrameType | None) -> None:
        came.set()
        signal.signal(signal.SIGTERM, before)

    address = ray.get_runtime_context().gcs_address

    def pass_on() -> None:
        came.wait()
        if over.is_set():
            return
        request, said = board.request.remote(), False
        while not over.wait(0.5):
            if not cluster.answers(address):
                _end_at_once()
            if not said and ray.wait([request], timeout=0)[0]:
                logger.warning(_SAVES if ray.get(request) else _NOT_YET)
                said = True

    watcher = threading.Thread(target=pass_on, daemon=True)
    signal.signal(signal.SIGTERM, note)
    watcher.start()
    try:
        yield board
    finally:
        signal.signal(signal.SIGTERM, before)
        over.set()
        came.set()
        watcher.join()
        ray.kill(board)


def _end_at_once() -> None:
    """Ends this process: without a cluster Ray waits for a minute wherever it is called, then aborts."""
    logger.error(_NO_CLUSTER)
    logging.shutdown()
    os._exit(StoppedError.exit_code)


def _keep_numbers(draft: Draft, output: Location) -> None:
    summary, rows, report = read_summary(output), read_history(output), read_report(output)
    metrics: Metrics = summary["metrics"]
    draft.numbers |= {
        "steps": summary["steps"],
        "stopped_because": summary["reason"],
        "train_loss": metrics["loss"],
        "best_step": summary["best_step"],
        f"best_{summary['metric']}": summary["best"],
        "tokens": sum(row["tokens"] for row in rows),
        "tokens_per_s": sorted(row["tokens_per_s"] for row in rows)[len(rows) // 2],
        "flop_utilization": sorted(row["flop_utilization"] for row in rows)[len(rows) // 2],
        "memory_gib": max(row.get("cuda_peak_gib", row["memory_gib"]) for row in rows),
        "findings": [f"{finding['kind']} at step {finding['step']}" for finding in report["findings"]],
    }
    failures = {name: count for name, count in report["tracker_failures"].items() if count}
    if failures:
        draft.numbers["tracker_failures"] = failures


def _failure(error: Exception) -> RaytuneError:
    again = "Run the same command again to go on from the newest checkpoint."
    return cluster.own_error(error) or RunError(f"training failed: {last_line(error)} {again}")

"""Trials under Ray Tune: light proxies that ask a bank for evaluations; one bank a GPU, or a machine without.

One whose base is not shared has a training run of its own in its process.

Meets Ray, beside `run.py`, because a proxy is a class of Ray Tune's and a bank is an actor. Proxies load no torch.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import ray
from pyarrow.fs import LocalFileSystem
from ray.tune import PlacementGroupFactory, Trainable, with_parameters, with_resources

from raytune_ft.core import cluster
from raytune_ft.core.errors import RunError, first_line
from raytune_ft.core.placement import Demand, Node, ResourcePlan
from raytune_ft.core.storage import Location
from raytune_ft.training.goal import Goal
from raytune_ft.tuning.homes import PROXY_CPUS, bank_count, bank_cpus
from raytune_ft.tuning.own import Own, OwnRun, Splits
from raytune_ft.tuning.packs import Packs, name_of
from raytune_ft.tuning.pointer import read_pointer, write_pointer
from raytune_ft.tuning.result import Trial
from raytune_ft.tuning.space import settings_at

logger = logging.getLogger("raytune_ft")

_RESTARTS = 3
_PATIENCE_S = 20


@dataclass(frozen=True)
class Banks:
    """Actors that hold a bank each, by the pack whose trials they train; `keys` tell a trial's pack.

    A pack without any is one whose trials share no base.
    """

    keys: tuple[str, ...]
    actors: Mapping[str, tuple[Any, ...]]

    def share(self, settings: Mapping[str, Any]) -> bool:
        """Whether a trial of these settings shares a base."""
        return name_of(self.keys, settings) in self.actors

    def of(self, settings: Mapping[str, Any]) -> tuple[Any, ...]:
        """The banks for a trial of these settings."""
        return self.actors[name_of(self.keys, settings)]

    def leave_best(self, shared: Mapping[str, Any], folder: Location, best: Trial) -> bool:
        """Writes the best adapter of a trial's last snapshot as a PEFT folder.

        Args:
            shared: the settings that all trials have in common.
            folder: where to.
            best: the trial.

        Returns:
            Whether there is one: a trial that told nothing has none.

        Raises:
            RunError: if there is no whole snapshot where it should be.
        """
        if best.snapshot is None:
            return False
        settings = {**shared, **best.settings}
        with cluster.own_errors():
            ray.get(self.of(settings)[0].save.remote(settings, best.snapshot, folder.uri))
        return True

    def fault(self) -> str | None:
        """Why trials of some pack cannot share their base; None if all can.

        Raises:
            UserError: if no trial could do better; see `BankHost.fault`.
        """
        for name, actors in self.actors.items():
            with cluster.own_errors():
                fault: str | None = ray.get(actors[0].fault.remote())
            if fault is not None:
                return f"{name}: {fault}" if self.keys else fault
        return None

    def close(self) -> None:
        """Ends the actors, and with them frees what they hold."""
        for actors in self.actors.values():
            for actor in actors:
                ray.kill(actor)


class BankHostActor:
    """A `BankHost` as an actor.

    A process that gets an actor's handle imports the actor's class, so this one loads torch only where it is made:
    proxies get by without.
    """

    def __init__(self, *given: Any, **settings: Any) -> None:
        from raytune_ft.tuning.host import BankHost

        self._host = BankHost(*given, **settings)

    def fault(self) -> str | None:
        """See `BankHost.fault`."""
        return self._host.fault()

    def load(self) -> int:
        """See `BankHost.load`."""
        return self._host.load()

    def admit(self, name: str, settings: Mapping[str, Any], snapshot: str | None) -> None:
        """See `BankHost.admit`."""
        self._host.admit(name, settings, snapshot)

    def evict(self, name: str) -> None:
        """See `BankHost.evict`."""
        self._host.evict(name)

    def report(self, name: str, after: int) -> dict[str, Any] | None:
        """See `BankHost.report`."""
        return self._host.report(name, after)

    def save(self, settings: Mapping[str, Any], snapshot: str, folder: str) -> None:
        """See `BankHost.save`."""
        self._host.save(settings, snapshot, folder)


@dataclass(frozen=True)
class Room:
    """What banks may take of a cluster (`nodes`), for how many trials at the same time, and what runs beside them."""

    connected: cluster.Cluster
    nodes: Sequence[Node]
    trials: int
    others: tuple[Demand, ...] = ()


def start_banks(room: Room, packs: Packs, splits: Splits, snapshots: str, objective: str) -> Banks | str:
    """Starts the banks of a sweep, one per GPU (without any, one per node) and pack; or says why a base is not shared.

    More packs than GPUs share these evenly, as those on CPUs share a node.

    Args:
        room: where to.
        packs: what the trials of each have in common.
        splits: see `Splits`.
        snapshots: folder or URI that every node reaches.
        objective: what trials learn, as in `SweepConfig`.
    """
    connected, nodes, trials = room.connected, room.nodes, room.trials
    use_gpu = next(iter(packs.settings.values())).on_gpu(connected.gpus)
    homes = bank_count(nodes, trials, use_gpu=use_gpu)
    number = len(packs.settings)
    each, share = (max(1, homes // number), -(-number // homes)) if use_gpu else (homes, number)
    cpus, threads = bank_cpus(nodes, trials, homes if use_gpu else 0, share)
    gpus = (1.0 if share == 1 else math.floor(100 / share) / 100) if use_gpu else 0.0
    demand = Demand("bank of adapters", each * number, cpus, gpus, threads)
    proxies = Demand("light trial", trials, PROXY_CPUS)
    connected.admit(ResourcePlan("tune", (demand, proxies, *room.others)))
    make = ray.remote(BankHostActor).options(
        num_cpus=cpus,
        num_gpus=gpus,
        max_restarts=_RESTARTS,
        max_concurrency=2 * trials + 4,
        runtime_env={"env_vars": cluster.worker_environment()},
    )
    device = "cuda" if use_gpu else "cpu"
    how = {"objective": objective, "targets": packs.targets, "device": device, "threads": threads, "own_process": True}
    actors = {}
    for name, training in packs.settings.items():
        if packs.keys:
            logger.info("tune: the trials with %s have a base of their own", name)
        settings, rows = training.model_dump(mode="json"), splits[training.max_length]
        actors[name] = tuple(make.remote(settings, rows, snapshots, **how) for _ in range(each))
    banks = Banks(packs.keys, actors)
    with ExitStack() as unless_shared:
        unless_shared.callback(banks.close)
        fault = banks.fault()
        if fault is not None:
            return fault
        unless_shared.pop_all()
    return banks


class Proxy(Trainable):  # type: ignore[misc]  # Ray's classes count as Any
    """A trial as Ray Tune sees it: each step is the wait for its next evaluation, in a bank or a run of its own."""

    _snapshot: str | None
    _run: OwnRun | None

    def setup(self, config: dict[str, Any], settings: dict[str, Any], banks: Banks, own: Own, goal: Goal) -> None:
        """Ray Tune's hook: the trial's part of the space; what all share, where they train, what they compare by."""
        self._shared, self._banks, self._own, self._goal = settings, banks, own, goal
        self._start_over(config)

    def step(self) -> dict[str, Any]:
        """Ray Tune's hook: the metrics of the next evaluation."""
        report = self._next_report()
        self._step, self._snapshot = report["step"], report["snapshot"]
        infeasible = report["reason"] if report["status"] == "infeasible" else None
        return {
            self._goal.metric: self._goal.worst,  # of a trial that ends before its next evaluation
            **report["metrics"],
            "global_step": self._step,
            "snapshot": self._snapshot,
            "infeasible": infeasible,
            "done": report["status"] != "running",
        }

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Ray Tune's hook: where the bank left the trial's state on storage, as JSON; the state itself stays there.

        A run of its own finds its newest state itself.
        """
        write_pointer(LocalFileSystem(), checkpoint_dir, self._snapshot, self._step)

    def load_checkpoint(self, checkpoint: str) -> None:
        """Ray Tune's hook: goes on from a state on storage, its own or (population-based training) a donor's."""
        pointer = read_pointer(checkpoint)
        self._leave()
        self._snapshot, self._step = pointer

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Ray Tune's hook: this process becomes another trial."""
        self._leave()
        self._start_over(new_config)
        return True

    def cleanup(self) -> None:
        """Ray Tune's hook: the trial was stopped, and this process is not used again."""
        self._leave()
        self._banks = Banks((), {})  # handles that are left would be given back while SIGTERM ends the process

    def _start_over(self, config: dict[str, Any]) -> None:
        self._space = dict(config)
        self._bank: Any = None
        self._run = None
        self._name = ""
        self._step = self._seen = 0
        self._snapshot = None

    def _next_report(self) -> dict[str, Any]:
        settings = {**self._shared, **settings_at(self._space, self._shared)}
        if self._banks.share(settings):
            return self._next_in_bank(settings)
        self._run = self._run or self._own.start(self.trial_id, settings, self._step)
        return self._run.next_report()

    def _next_in_bank(self, settings: dict[str, Any]) -> dict[str, Any]:
        lost = 0
        while True:
            try:
                if self._bank is None:
                    self._enter(settings)
                report = self._asked()
                if report is not None:
                    self._seen = report["number"]
                    return report
            except ray.exceptions.RayActorError as error:
                lost += 1
                if lost > _RESTARTS * 20:
                    raise RunError(f"the bank did not come back: {first_line(error)}") from None
                self._bank = None
                time.sleep(0.5)

    def _asked(self) -> dict[str, Any] | None:
        """The bank's next report; None if it has none yet, or knows no such trial, as one that was started anew."""
        try:
            return ray.get(self._bank.report.remote(self._name, self._seen))  # type: ignore[no-any-return]
        except KeyError:
            self._bank = None
            return None

    def _enter(self, settings: dict[str, Any]) -> None:
        """Takes a seat in the bank with the fewest trials, of those with its base, from the last state on storage.

        Raises:
            RayActorError: if no bank answers.
        """
        banks = self._banks.of(settings)
        asked = {bank.load.remote(): bank for bank in banks}
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_PATIENCE_S)
        loads: list[tuple[int, int]] = []
        gone: ray.exceptions.RayActorError | None = None
        for place, reference in enumerate(asked):
            if reference in answered:
                try:
                    loads.append((ray.get(reference), place))
                except ray.exceptions.RayActorError as error:
                    gone = error
        if not loads:
            raise gone or ray.exceptions.RayActorError(error_msg="no bank answers")
        bank = banks[min(loads)[1]]
        self._name = self.trial_id
        ray.get(bank.admit.remote(self._name, settings, self._snapshot))
        self._bank, self._seen = bank, 0

    def _leave(self) -> None:
        if self._run is not None:
            self._run.leave()
            self._run = None
        if self._bank is not None:
            try:
                ray.get(self._bank.evict.remote(self._name))
            except ray.exceptions.RayActorError:
                logger.info("the bank of trial %s is gone already", self._name)
            self._bank = None


def proxies(settings: dict[str, Any], banks: Banks, own: Own, goal: Goal) -> Any:
    """What Ray Tune starts for each trial: a light process where it shares a base, else one that trains itself."""

    def resources(space: dict[str, Any]) -> PlacementGroupFactory:
        shares = banks.share({**settings, **settings_at(space, settings)})
        return PlacementGroupFactory([{"CPU": PROXY_CPUS} if shares else {"CPU": own.cpus, "GPU": own.gpus}])

    given = {"settings": settings, "banks": banks, "own": own, "goal": goal}
    return with_resources(with_parameters(Proxy, **given), resources)

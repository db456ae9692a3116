"""How the trials of a sweep run: together on shared bases where they can, the others each as a run of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from raytune_ft.core.cluster import Cluster
from raytune_ft.core.grammar import number_of
from raytune_ft.core.placement import Node, ResourcePlan
from raytune_ft.core.storage import Location
from raytune_ft.training.config import DistillationConfig
from raytune_ft.training.run import with_student
from raytune_ft.tuning import alone, homes, packed
from raytune_ft.tuning.config import SweepConfig
from raytune_ft.tuning.own import Own, Splits
from raytune_ft.tuning.packs import Packs
from raytune_ft.tuning.result import Trial
from raytune_ft.tuning.space import extremes

logger = logging.getLogger("raytune_ft")

SNAPSHOTS, TRIALS, BEST = "snapshots", "trials", "best"
"""Folders below the sweep's: states of packed trials, runs of the others, and the winner."""


@dataclass(frozen=True)
class Arrangement:
    """What Ray Tune starts for each trial, how many at a time, and whether that is a proxy.

    `leave_best` leaves a trial's best model in the sweep's folder, and says whether there is one.
    """

    trainable: Any
    together: int
    proxies: bool
    leave_best: Callable[[Trial], bool]


@dataclass(frozen=True)
class Ground:
    """What a sweep has to run on: its packs of trials, their rows, its folder, and the cluster."""

    config: SweepConfig
    packs: Packs
    splits: Splits
    output: Location
    connected: Cluster
    trials: int

    @contextmanager
    def arranged(self) -> Iterator[Arrangement]:
        """Starts the banks and says which trials share them, and why the others do not; in the end stops the banks.

        Raises:
            ClusterError: if the cluster has no room.
            ConfigError: if the scheduler pauses trials and some share no base.
        """
        config, apart = self.config, homes.apart(self.config, self.packs)
        one = homes.own_runs(config, 1, use_gpu=self._use_gpu)
        device = "cuda" if self._use_gpu else "cpu"
        own = Own(self.splits, (self.output / TRIALS).uri, device, one.cpus, one.threads, config.objective)
        self._make_students(own)
        best = self.output / BEST
        if config.training.num_workers > 1:
            trainable, together = alone.start_on_workers(config, own, self.connected, self.trials)
            self._say(together, apart, packed.Banks(self.packs.keys, {}))
            yield Arrangement(trainable, together, False, lambda trial: alone.leave_best(config, own, best, trial))
            return
        banks, apart, together = self._banks(apart)
        settings = config.training.model_dump(mode="json")

        def leave_best(trial: Trial) -> bool:
            if banks.share({**settings, **trial.settings}):
                return banks.leave_best(settings, best, trial)
            return alone.leave_best(config, own, best, trial)

        try:
            self._say(together, apart, banks)
            yield Arrangement(packed.proxies(settings, banks, own, config.goal), together, True, leave_best)
        finally:
            banks.close()

    def _make_students(self, own: Own) -> None:
        """Makes the students that trials start from, if their layers are to be the teacher's."""
        training = self.config.training
        if isinstance(training, DistillationConfig) and training.student_layers is not None:
            for layers in extremes(self.config.space.get("student_layers", [training.student_layers])):
                with_student(training.with_overrides(student_layers=layers), own.student(layers))

    @property
    def _use_gpu(self) -> bool:
        return self.config.training.on_gpu(self.connected.gpus)

    def _banks(self, apart: dict[str, str]) -> tuple[packed.Banks, dict[str, str], int]:
        """Banks for the trials that share a base, the packs that do not and why, and how many trials at a time."""
        config, packs, everyone = self.config, self.packs, self.packs.settings
        nodes: Sequence[Node] = self.connected.nodes
        if 0 < len(apart) < len(everyone):
            nodes = homes.left_for_banks(config, nodes, use_gpu=self._use_gpu)
            if not nodes:
                name, why = next(iter(apart.items()))
                apart = dict.fromkeys(everyone, f"{name}: {why}; there is no room for both kinds of trials")
        if len(apart) < len(everyone):
            together = homes.together(config, nodes, self.trials)
            beside = [homes.own_runs(config, 1, use_gpu=self._use_gpu)] if apart else []
            room = packed.Room(self.connected, nodes, together, tuple(beside))
            found = packed.start_banks(
                room, packs.without(apart), self.splits, (self.output / SNAPSHOTS).uri, config.objective
            )
            if isinstance(found, packed.Banks):
                return found, apart, together
            apart = dict.fromkeys(everyone, found)
            homes.refuse_pausing(config, apart)
        together = homes.own_together(config, self.connected.nodes, self.trials, use_gpu=self._use_gpu)
        self.connected.admit(ResourcePlan("tune", (homes.own_runs(config, together, use_gpu=self._use_gpu),)))
        return packed.Banks(packs.keys, {}), apart, together

    def _say(self, together: int, apart: Mapping[str, str], banks: packed.Banks) -> None:
        """How the trials run, in words."""
        if self.config.searcher == "grid" and (grid := self.config.grid).left_out:
            logger.info(
                "tune: %d of %d combinations are left out, since each comes to the same run as another: %s",
                grid.left_out,
                grid.left_out + len(grid.points),
                "; ".join(grid.reasons),
            )
        how = f"{number_of(self.trials, 'trial')}, {together} at a time"
        if banks.actors:
            bases = f"{len(banks.actors)} frozen bases" if len(banks.actors) > 1 else "one frozen base"
            logger.info("tune: %s on %s, %s", how, bases, self.config.scheduler)
            if not apart and self.config.differs("cpus_per_trial"):
                logger.warning("tune: cpus_per_trial is set and changes nothing: all trials share a base")
            for name, why in apart.items():
                logger.info("tune: the trials with %s train in a process each (%s)", name, why)
            return
        workers = self.config.training.num_workers
        where = "in a process" if workers == 1 else f"on {workers} workers"
        why = next(iter(apart.values()))
        logger.info("tune: %s, each %s and with a base of its own (%s)", how, where, why)

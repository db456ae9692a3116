"""Schedulers know what earlier drivers decided by."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from raytune_ft.core.storage import Location
from raytune_ft.tuning.schedulers.choice import scheduler

from .stand_in import Tune, reported, restored, sweep


def test_what_is_no_finite_number_is_kept_out_of_the_rungs(tmp_path: Path) -> None:
    made = scheduler(sweep(scheduler="asha"), Location.at(tmp_path) / "rungs.json")
    made.set_search_properties("eval_loss", "min")
    trials = [Trial("nothing", trial_id=name, stub=True) for name in "abcd"]
    for trial in trials:
        made.on_trial_add(None, trial)
    diverged, second, good, bad = trials
    for trial, loss in ((diverged, math.inf), (second, math.nan)):
        assert made.on_trial_result(None, trial, reported(trial, 1, loss)) == TrialScheduler.CONTINUE
        made.on_trial_complete(None, trial, reported(trial, 1, loss))
    assert made.on_trial_result(None, good, reported(good, 1, 1.0)) == TrialScheduler.CONTINUE
    assert made.on_trial_result(None, bad, reported(bad, 1, 2.0)) == TrialScheduler.STOP


def test_median_stopping_knows_what_trials_had_told_that_ended_before_it_was_resumed(tmp_path: Path) -> None:
    def made() -> Any:
        median = scheduler(sweep(scheduler="median"), Location.at(tmp_path) / "rungs.json")
        median.set_search_properties("eval_loss", "min")
        return median

    trials = [Trial("nothing", trial_id=name, stub=True) for name in "abcd"]
    tune = Tune(made(), trials[:3])
    for trial, losses in zip(trials[:3], [(3.0, 1.0), (4.0, 2.0), (2.0, 5.0)], strict=True):
        for step, loss in enumerate(losses, start=1):
            tune.hear(trial, step, loss)
    for trial in trials[:2]:
        trial.set_status(Trial.TERMINATED)
    trials[2].update_last_result(reported(trials[2], 1, 2.0))  # Ray Tune's state is older
    tune = Tune(made(), restored(trials[:3]) + trials[3:])
    assert [len(tune.made._results[trial]) for trial in trials[:3]] == [2, 2, 1]
    assert tune.hear(trials[3], 2, 2.6) == TrialScheduler.STOP  # of running means 2 and 3, the median is 2.5


def hyperband(memory: Path) -> Any:
    """Of eight trials: the first four run to step 8, the others are halved at step 4."""
    rates = [n * 1e-4 for n in range(1, 9)]
    made = scheduler(sweep(scheduler="hyperband", space={"learning_rate": rates}), Location.at(memory))
    made.set_search_properties("eval_loss", "min")
    return made


def test_a_resumed_hyperband_has_its_brackets_as_they_were(tmp_path: Path) -> None:
    trials = [Trial("nothing", trial_id=f"t{number}", stub=True) for number in range(8)]
    tune = Tune(hyperband(tmp_path / "rungs.json"), trials)
    assert [tune.hear(trial, 8, 1.0) for trial in trials[:3]] == [TrialScheduler.PAUSE] * 3
    assert [tune.hear(trial, 4, loss) for trial, loss in zip(trials[4:6], (1.0, 4.0), strict=True)] == ["PAUSE"] * 2

    tune = Tune(hyperband(tmp_path / "rungs.json"), restored(trials))  # the driver was killed
    assert {trial.trial_id for trial in trials if trial.status == Trial.PAUSED} == {"t0", "t1", "t2", "t4", "t5"}
    assert tune.made.choose_trial_to_run(tune) in [*trials[6:], trials[3]]  # nobody that waits for others goes on
    assert tune.hear(trials[6], 4, 2.0) == TrialScheduler.PAUSE
    assert tune.hear(trials[7], 4, 3.0) == TrialScheduler.STOP
    assert [trial.status for trial in trials[4:]] == ["PAUSED", "TERMINATED", "PAUSED", "TERMINATED"]
    assert tune.made.choose_trial_to_run(tune) in {trials[3], trials[4], trials[6]}

    trials[7].set_status(Trial.RUNNING)  # killed again: Ray Tune's own state is older
    trials[7].update_last_result(reported(trials[7], 2, 3.0))
    tune = Tune(hyperband(tmp_path / "rungs.json"), restored(trials))
    assert {trial.trial_id for trial in trials if trial.status == Trial.PENDING} == {"t3", "t4", "t6", "t7"}
    for trial in (trials[3], trials[4], trials[6]):
        tune.hear(trial, 8, 1.0)
    assert tune.made.choose_trial_to_run(tune) is trials[7]
    assert [tune.hear(trials[7], step, 3.0) for step in (3, 4)] == [TrialScheduler.CONTINUE, TrialScheduler.STOP]

    trials[7].set_status(Trial.RUNNING)  # and once more, when that was all that Ray Tune's state had not heard of
    Tune(hyperband(tmp_path / "rungs.json"), restored(trials))
    assert trials[7].status == Trial.TERMINATED


def test_a_trial_that_has_ended_goes_to_its_last_step_again_where_ray_tunes_state_is_older(tmp_path: Path) -> None:
    trials = [Trial("nothing", trial_id=f"t{number}", stub=True) for number in range(8)]
    tune = Tune(hyperband(tmp_path / "rungs.json"), trials)
    tune.hear(trials[0], 6, 1.0)
    tune.made.on_trial_complete(tune, trials[0], reported(trials[0], 7, 1.0))  # its last result is told only so
    trials[0].set_status(Trial.RUNNING)
    trials[0].update_last_result(reported(trials[0], 4, 1.0))
    tune = Tune(hyperband(tmp_path / "rungs.json"), restored(trials))
    told = [tune.hear(trials[0], step, 1.0) for step in (5, 6, 7)]
    assert told == [TrialScheduler.CONTINUE, TrialScheduler.CONTINUE, TrialScheduler.STOP]


def test_a_trial_that_is_tried_again_stays_in_its_bracket(tmp_path: Path) -> None:
    trials = [Trial("nothing", trial_id=f"t{number}", stub=True) for number in range(8)]
    tune = Tune(hyperband(tmp_path / "rungs.json"), trials)
    tune.hear(trials[0], 2, 1.0)
    for again in (True, False):
        trials[0].set_status(Trial.ERROR if again else Trial.RUNNING)
        tune.made.on_trial_error(tune, trials[0])
        if again:
            trials[0].set_status(Trial.PENDING)
            tune.made.on_trial_add(tune, trials[0])
        assert (trials[0] in tune.made._hyperbands[0][0].current_trials()) == again
    assert len(tune.made._hyperbands[0][1].current_trials()) == 4


def test_no_trial_waits_in_hyperband_for_one_that_has_ended_by_itself(tmp_path: Path) -> None:
    trials = [Trial("nothing", trial_id=f"t{number}", stub=True) for number in range(8)]
    tune = Tune(hyperband(tmp_path / "rungs.json"), trials)
    for trial, loss in zip(trials[4:], (1.0, 2.0, 3.0, 4.0), strict=True):
        tune.hear(trial, 4, loss)
    assert tune.hear(trials[4], 8, 1.0) == TrialScheduler.PAUSE
    trials[5].set_status(Trial.RUNNING)
    tune.made.on_trial_complete(tune, trials[5], reported(trials[5], 6, math.inf))  # it diverged
    assert trials[4].status == Trial.TERMINATED, "its bracket is done"

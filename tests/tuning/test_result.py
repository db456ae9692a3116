"""The best trial is the one with the lowest metric anywhere on its curve."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from raytune_ft.core.errors import RunError
from raytune_ft.tuning.result import SweepResult, Trial


def trial(name: str, *losses: float, ending: str = "finished", error: str | None = None) -> Trial:
    curve = [{"global_step": float(n), "eval_loss": loss} for n, loss in enumerate(losses, start=1)]
    return Trial(name, {"lora_r": 8, "learning_rate": 1e-3}, ending, curve, error)  # type: ignore[arg-type]


def test_the_best_trial_counts_its_lowest_point_not_its_last() -> None:
    result = SweepResult("eval_loss", (trial("a", 2.0, 0.5, 0.9), trial("b", 0.8, 0.6)))
    assert result.best.name == "a"


def test_a_trial_that_diverged_is_not_the_best_however_low_it_was_before() -> None:
    wild = trial("wild", 0.1, ending="infeasible", error="the loss of step 2 is nan")
    assert SweepResult("eval_loss", (wild, trial("a", 2.0))).best.name == "a"
    with pytest.raises(RunError, match=r"no trial reported eval_loss: .*: the loss of step 2 is nan"):
        _ = SweepResult("eval_loss", (wild,)).best


def test_a_metric_that_is_better_when_higher_ranks_the_other_way_round() -> None:
    def answering(name: str, *values: float) -> Trial:
        curve = [{"global_step": float(n), "eval_rouge": value} for n, value in enumerate(values, start=1)]
        return Trial(name, {"lora_r": int(name)}, "finished", curve)

    trials = (answering("4", 0.0, 0.25), answering("8", 0.5, 0.125), answering("16", 0.25))
    result = SweepResult("eval_rouge", trials)
    assert [trial.name for trial in result.ranked] == ["8", "16", "4"]
    assert result.to_json()["best"]["eval_rouge"] == 0.5
    repeats = tuple(
        Trial(f"{rank}s", {"lora_r": rank, "seed": 1}, "finished", [{"global_step": 1.0, "eval_rouge": value}])
        for rank, value in ((8, 0.0), (16, 0.75))
    )
    assert SweepResult("eval_rouge", trials, repeats).best.name == "16"  # means 0.25 and 0.5


def test_of_trials_with_equal_answers_the_one_of_the_lower_loss_is_the_best() -> None:
    def answering(name: str, loss: float) -> Trial:
        return Trial(name, {}, "finished", [{"global_step": 1.0, "eval_exact_match": 0.75, "eval_loss": loss}])

    result = SweepResult("eval_exact_match", (answering("a", 0.5), answering("b", 0.25), answering("c", 1.0)))
    assert [trial.name for trial in result.ranked] == ["b", "a", "c"]
    unknown = Trial("0", {}, "finished", [{"global_step": 1.0, "eval_exact_match": 0.75}])
    assert [trial.name for trial in replace(result, trials=(unknown, *result.trials)).ranked] == ["b", "a", "c", "0"]


def test_a_sweep_without_any_metric_lists_every_trials_reason() -> None:
    result = SweepResult("eval_loss", (trial("a", ending="failed", error="out of memory"), trial("b", ending="failed")))
    with pytest.raises(RunError, match=r"out of memory; .*reported nothing"):
        _ = result.best


def test_what_is_written_reads_back_equal() -> None:
    result = SweepResult("eval_loss", (trial("a", 2.0, 0.5), trial("b", 0.8, ending="stopped early")))
    assert SweepResult.from_json(json.loads(json.dumps(result.to_json()))) == result


def test_a_label_is_the_settings_in_words() -> None:
    assert trial("a").label() == "lora_r=8, learning_rate=0.001"


def test_the_winner_of_repeats_is_the_setting_with_the_lowest_mean() -> None:
    def seeded(rank: int, seed: int | None, loss: float) -> Trial:
        settings = {"lora_r": rank} if seed is None else {"lora_r": rank, "seed": seed}
        return Trial(f"{rank}-{seed}", settings, "finished", [{"global_step": 1.0, "eval_loss": loss}])

    # Rank 4 wins the search by luck (0.9), its mean over three seeds is 1.2; rank 8 has 1.0 in all.
    trials = (seeded(4, None, 0.9), seeded(8, None, 1.0), seeded(16, None, 3.0))
    repeats = (seeded(4, 1, 1.2), seeded(4, 2, 1.5), seeded(8, 1, 1.0), seeded(8, 2, 1.0))
    result = SweepResult("eval_loss", trials, repeats)
    assert result.best.settings == {"lora_r": 8}
    first, second = result.repeated
    assert (first.settings, first.seeds, first.mean, first.low, first.high) == ({"lora_r": 8}, 3, 1.0, 1.0, 1.0)
    # Student's t with 2 degrees of freedom is 4.3027 at 97.5%; the deviation of 0.9, 1.2, 1.5 is 0.3.
    assert second.mean == pytest.approx(1.2)
    assert second.high - second.mean == pytest.approx(4.3027 * 0.3 / 3**0.5, abs=1e-4)
    assert SweepResult.from_json(json.loads(json.dumps(result.to_json()))) == result


def test_settings_that_were_tried_twice_are_one_and_every_seed_counts_once() -> None:
    def tried(name: str, rank: int, loss: float, **seed: int) -> Trial:
        return Trial(name, {"lora_r": rank, **seed}, "finished", [{"global_step": 4.0, "eval_loss": loss}])

    trials = (tried("a", 4, 2.0), tried("b", 4, 2.0), tried("c", 2, 2.1))
    repeats = tuple(tried(f"r{n}", 4, (2.2, 2.3)[n % 2], seed=1 + n % 2) for n in range(4))
    result = SweepResult("eval_loss", trials, repeats)
    assert [trial.name for trial in result.distinct] == ["a", "c"]
    [again] = result.repeated
    assert (again.seeds, again.mean) == (3, pytest.approx(6.5 / 3))


def test_the_training_loss_is_a_mean_of_the_last_values_not_the_luckiest_batch() -> None:
    def of_batches(name: str, *losses: float) -> Trial:
        rows = [{"global_step": float(n), "loss": loss} for n, loss in enumerate(losses, start=1)]
        return Trial(name, {"lora_r": int(name)}, "finished", rows)

    lucky = of_batches("1", 0.1, 3.0, 3.0, 3.0, 3.0, 9.0, 2.5, 1.5)
    assert lucky.best("loss") == 2.0  # the last two of eight
    assert of_batches("1", 0.1, 3.0, 3.0, 2.5, 1.5).best("loss") == 2.0  # two of five: a quarter at least
    assert SweepResult("loss", (lucky, of_batches("2", 1.75))).best.name == "2"


def test_means_of_repeats_are_those_of_whole_trials_and_the_best_is_one() -> None:
    def seeded(rank: int, seed: int | None, loss: float, ending: str = "finished") -> Trial:
        settings = {"lora_r": rank} if seed is None else {"lora_r": rank, "seed": seed}
        return Trial(f"{rank}-{seed}", settings, ending, [{"global_step": 1.0, "eval_loss": loss}])  # type: ignore[arg-type]

    # Rank 8 was stopped early at 3.0; its repeats, to the last step, come to 0.5 and 0.75. One of rank 4 diverged.
    trials = (seeded(4, None, 1.0), seeded(8, None, 3.0, "stopped early"))
    repeats = (seeded(8, 1, 0.75), seeded(8, 2, 0.5), seeded(4, 1, 0.25, "infeasible"), seeded(4, 2, 2.0))
    result = SweepResult("eval_loss", trials, repeats)
    assert [(one.settings["lora_r"], one.seeds, one.mean) for one in result.repeated] == [(8, 2, 0.625), (4, 2, 1.5)]
    assert result.best.settings == {"lora_r": 8, "seed": 2}
    diverged = SweepResult("eval_loss", trials, tuple(replace(again, ending="infeasible") for again in repeats))
    unmeasured = replace(repeats[0], curve=[])
    assert replace(result, repeats=(unmeasured, repeats[1])).repeated[0].mean == 0.5  # it tells nothing
    assert replace(result, repeats=(unmeasured,)).repeated == []
    assert diverged.repeated == [] and diverged.best.name == "4-None"


def test_the_settings_that_tell_trials_apart_are_those_that_differ() -> None:
    def of(**settings: object) -> Trial:
        return Trial("t", settings, "finished", [])

    differing = SweepResult("eval_loss", (of(lora_r=4, seed=0), of(lora_r=8, seed=0)))
    assert differing.varied == ["lora_r"] and differing.trials[0].label(differing.varied) == "lora_r=4"
    assert SweepResult("eval_loss", (of(lora_r=4, seed=0),)).varied == ["lora_r", "seed"]

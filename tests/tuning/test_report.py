"""What the page of a sweep says, by hand."""

from __future__ import annotations

import base64
import math
import re
from dataclasses import replace

import pytest

from raytune_ft.tuning import plots
from raytune_ft.tuning.report import cost_in_words, importance, most_telling, render
from raytune_ft.tuning.result import SweepResult, Trial


def trial(rank: int, rate: float, loss: float, *, steps: int = 4, last: float = 4.0, ending: str = "finished") -> Trial:
    curve = [
        {"global_step": float(step), "last_step": last, "eval_loss": loss * (1 + steps - step), "tokens": 100.0 * step}
        for step in range(2, steps + 1, 2)
    ]
    return Trial(f"{rank}-{rate}", {"lora_r": rank, "learning_rate": rate}, ending, curve)


def test_importance_is_the_share_of_variance_between_groups() -> None:
    # ln of the losses: rank 4 has 0 and 2, rank 8 has 1 and 3; mean 1.5, total 5.
    # Ranks: means 1 and 2, between 2*0.25*2 = 1; rates: means 0.5 and 2.5, between 4. Together all of it.
    losses = {(4, 0.1): 0, (4, 0.2): 2, (8, 0.1): 1, (8, 0.2): 3}
    trials = tuple(trial(rank, rate, math.exp(value)) for (rank, rate), value in losses.items())
    assert importance(SweepResult("eval_loss", trials)) == pytest.approx({"lora_r": 0.2, "learning_rate": 0.8})


def test_a_loss_of_zero_has_no_logarithm_and_explains_nothing() -> None:
    losses = {(4, 0.1): 0, (4, 0.2): 2, (8, 0.1): 1, (8, 0.2): 3}
    trials = [trial(rank, rate, math.exp(value)) for (rank, rate), value in losses.items()]
    perfect = replace(trial(8, 0.2, 0.0), name="perfect")
    result = SweepResult("eval_loss", (perfect, *trials))
    assert result.best is perfect
    assert importance(result) == pytest.approx({"lora_r": 0.2, "learning_rate": 0.8})


def test_a_setting_with_a_value_for_every_trial_explains_nothing() -> None:
    trials = tuple(trial(4, rate, 1 + rate) for rate in (0.1, 0.2, 0.3))
    assert importance(SweepResult("eval_loss", trials)) == {}


def test_a_metric_of_answers_is_drawn_and_explained_as_it_is() -> None:
    # Ranks: means 0.25 and 0.5; rates: 0.125 and 0.625; a value of 0 counts.
    scores = {(4, 0.1): 0.0, (4, 0.2): 0.5, (8, 0.1): 0.25, (8, 0.2): 0.75}
    trials = tuple(
        Trial(str(place), {"lora_r": rank, "learning_rate": rate}, "finished", [{"global_step": 2.0, "eval_f1": f1}])
        for place, ((rank, rate), f1) in enumerate(scores.items())
    )
    result = SweepResult("eval_f1", trials)
    assert importance(result) == pytest.approx({"lora_r": 0.2, "learning_rate": 0.8})
    page = render(result, 1.0)
    assert page.index("lora_r=8, learning_rate=0.2") < page.index("lora_r=4, learning_rate=0.1")
    assert "Best eval_f1 at each lora_r and learning_rate" in page and page.count("data:image/svg+xml") == 4


def test_the_map_shows_rank_and_rate_or_the_numbers_that_explain_most() -> None:
    shares = {"beta": 0.1, "learning_rate": 0.6, "seed": 0.2, "loss_type": 0.9}
    settings = {"beta": 0.1, "learning_rate": 1e-3, "seed": 1, "loss_type": "dpo", "use_dora": True}
    searched = SweepResult("eval_loss", (Trial("t", settings, "finished", []),))
    assert most_telling(searched, shares) == ("seed", "learning_rate")
    assert most_telling(searched, {"beta": 0.1, "loss_type": 0.9}) is None
    ranked = SweepResult("eval_loss", (Trial("t", {**settings, "lora_r": 4}, "finished", []),))
    assert most_telling(ranked, shares) == ("lora_r", "learning_rate")


def test_a_setting_that_is_a_number_in_some_trials_only_is_no_axis_of_the_map() -> None:
    losses = {(5, 0.0): 1.0, (None, 0.0): 2.0, (5, 0.1): 3.0, (None, 0.1): 4.0}
    trials = tuple(
        Trial(str(place), {"early_stopping_patience": patience, "lora_dropout": dropout}, "finished", curve)
        for place, ((patience, dropout), loss) in enumerate(losses.items())
        for curve in [[{"global_step": 2.0, "eval_loss": loss}]]
    )
    result = SweepResult("eval_loss", trials)
    assert most_telling(result, importance(result)) is None
    assert render(result, 1.0).count("data:image/svg+xml") == 3


def test_a_schedule_of_settings_is_told_part_by_part() -> None:
    parts = [{"after": 0, "settings": {"learning_rate": 0.01}}, {"after": 4, "settings": {"learning_rate": 0.02}}]
    scheduled = Trial("a", {"learning_rate": 0.02}, "finished", trial(4, 0.1, 1.0).curve, schedule=parts)
    page = render(SweepResult("eval_loss", (scheduled, replace(scheduled, name="b", schedule=[]))), 1.0)
    assert page.count("after step 0: learning_rate=0.01; after step 4: learning_rate=0.02") == 1


def test_what_repeats_cost_is_told_besides() -> None:
    searched, again = trial(4, 0.1, 1.0), (trial(4, 0.1, 1.0), trial(4, 0.1, 1.0, steps=2))
    words = cost_in_words(SweepResult("eval_loss", (searched,), again), 12.0)
    assert words.startswith("1 trial, 4 steps, 400 tokens in 12 s; ")
    assert words.endswith("; besides, 2 repeats with fresh seeds, 600 tokens")


def test_cost_is_told_against_the_full_grid() -> None:
    result = SweepResult("eval_loss", (trial(4, 0.1, 1.0), trial(8, 0.1, 2.0, steps=2, ending="stopped early")))
    assert cost_in_words(result, 12.0) == (
        "2 trials, 6 steps, 600 tokens in 12 s; all of them to step 4: about 800 tokens (75% of that was spent)"
    )


def test_cost_of_trials_that_end_at_steps_of_their_own_is_told_against_all_of_these() -> None:
    told = trial(4, 0.1, 1.0).curve
    infeasible = Trial("bad", {}, "infeasible", [told[0], {"global_step": 3.0, "eval_loss": math.inf}])
    result = SweepResult("eval_loss", (trial(4, 0.1, 1.0), trial(8, 0.1, 2.0, steps=2, last=8.0), infeasible))
    assert (infeasible.last_step, infeasible.tokens, infeasible.steps) == (4, 200.0, 3)
    assert cost_in_words(result, 12.0) == (
        "3 trials, 9 steps, 800 tokens in 12 s; all of them to their last steps: about 1,467 tokens (55% of that was "
        "spent)"
    )


def test_the_page_stands_alone_and_keeps_hostile_text_as_text() -> None:
    bad = Trial("x", {"lora_r": 4, "learning_rate": 9.0}, "infeasible", [], "loss <script>alert(1)</script>")
    again = replace(trial(8, 0.2, 0.9), name="tried twice")
    good = (trial(4, 0.1, 1.0), trial(8, 0.2, 0.5), trial(8, 0.1, 0.7), again)
    page = render(SweepResult("eval_loss", (*good, bad)), 1.0)
    assert "<script>" not in page
    assert "loss &lt;script&gt;" in page
    drawn = [base64.b64decode(found).decode() for found in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", page)]
    curves, coordinates, heat, shares = drawn
    assert "optimizer step" in curves and "share of the variance" in shares
    assert all(words in coordinates for words in (">rank by eval_loss<", ">4<", ">8<", ">0.1<", ">0.2<"))
    assert ">0.500<" in heat and ">0.900<" not in heat
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_the_figures_name_what_tells_trials_apart_and_a_repeat_that_is_the_best() -> None:
    cut = replace(trial(4, 0.1, 1.0, steps=2, ending="stopped early"), settings={"lora_r": 4, "learning_rate": 0.1})
    other = trial(8, 0.1, 2.0)
    again = replace(trial(4, 0.1, 0.5), name="again", settings={**cut.settings, "seed": 1})
    result = SweepResult("eval_loss", (cut, other), (again,))
    assert result.best is again
    drawn = plots.survival(result)
    assert "lora_r=4, seed=1 (best)" in drawn and "learning_rate" not in drawn
    assert "learning_rate" not in plots.parallel(result)
    assert render(result, 1.0).index("seed=1") < render(result, 1.0).index("lora_r=8")


def test_a_setting_that_some_trials_have_no_use_for_explains_the_others() -> None:
    # Of the adapters, ln of the losses: rank 4 has 0 and 2, rank 8 has 1 and 3 (see above); full training has no rank.
    losses = {(4, 0.1): 0, (4, 0.2): 2, (8, 0.1): 1, (8, 0.2): 3}
    adapters = [trial(rank, rate, math.exp(value)) for (rank, rate), value in losses.items()]
    full = replace(adapters[0], name="full", settings={"learning_rate": 0.3})
    result = SweepResult("eval_loss", (full, *adapters))
    assert importance(result)["lora_r"] == pytest.approx(0.2)
    assert result.varied == ["learning_rate", "lora_r"]
    page = render(result, 1.0)
    assert "<td>learning_rate=0.3</td>" in page and most_telling(result, importance(result)) is None

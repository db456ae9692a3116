from __future__ import annotations

import math
import random

import numpy as np
import pytest

from raytune_ft.data.quirks import surface_quirks, telling_words, wilson_low

WORDS = [
    "river",
    "stone",
    "cloud",
    "table",
    "green",
    "market",
    "winter",
    "paper",
    "silver",
    "garden",
    "letter",
    "bridge",
]


def asked(rng: random.Random, ends: str = ".") -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(5, 12))) + ends


def test_a_planted_surface_quirk_is_found_and_its_part_is_named() -> None:
    rng = random.Random(0)
    labels = [rng.choice(["yes", "no"]) for _ in range(300)]
    texts = [asked(rng, "?" if label == "yes" else ".") for label in labels]
    (quirk,), _ = surface_quirks(texts, [{"answer": label} for label in labels], seed=0)
    assert quirk.is_quirk
    assert quirk.accuracy > 0.95
    assert quirk.parts["punctuation"] > 0.95
    assert quirk.parts["first words"] < 0.65
    assert quirk.chance == max(labels.count("yes"), labels.count("no")) / 300


def test_prompts_without_a_word_have_a_surface_too() -> None:
    labels = [{"answer": "ab"[number % 2]} for number in range(100)]
    (quirk,), telling = surface_quirks(["?!" * (1 + number % 2) for number in range(100)], labels, seed=0)
    assert quirk.is_quirk and telling == []
    assert quirk.parts["first words"] == 0.5


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_labels_that_the_surface_does_not_tell_are_no_quirk(seed: int) -> None:
    rng = random.Random(seed)
    labels = [{"answer": rng.choice(["yes", "no", "perhaps"])} for _ in range(300)]
    quirks, telling = surface_quirks([asked(rng) for _ in labels], labels, seed=0)
    assert [quirk.is_quirk for quirk in quirks] == [False]
    assert telling == []


def test_planted_words_are_found_with_their_numbers() -> None:
    rng = random.Random(0)
    values = np.array(["a", "b", "c", "d"] * 50)
    texts = [asked(rng) + (" as usual today" if value == "c" and n < 160 else "") for n, value in enumerate(values)]
    (words,) = telling_words("answer", texts, values)
    # 40 of the 50 rows with "c" have the words, and no other row: in all of these it is "c", in a quarter of all rows.
    assert (words.words, words.value, words.support, words.hits) == ("as usual today", "c", 40, 40)
    assert words.lift == 4.0
    assert words.pmi == math.log2(4)
    assert words.example == texts[2]


def test_wilsons_interval_agrees_with_scipy() -> None:
    from scipy.stats import binomtest, norm

    level = 1 - 2 * norm.sf(3.3)
    for hits, support in [(10, 10), (40, 50), (3, 200)]:
        wanted = binomtest(hits, support).proportion_ci(level, method="wilson").low
        assert wilson_low(np.array([hits]), np.array([support]))[0] == pytest.approx(wanted)

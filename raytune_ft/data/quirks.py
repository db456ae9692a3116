"""Quirks: what gives an answer away without being understood, so that a model would learn the wrong thing.

Two ways: the surface of the instruction (length, punctuation, first words), and single words or sequences of words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raytune_ft.data.labels import targets

_FOLDS = 5
_LEAST_SUPPORT = 10
_LEAST_LIFT = 1.5
_LEAST_PRECISION = 0.8
_Z = 3.3  # one in a thousand by chance for one sequence: many are looked at
_MOST_SHOWN = 10
_LEAST_GAIN = 0.1
_WORD = re.compile(r"\w+")
_MARKS = "?!.,:;\"'()\n-"


@dataclass(frozen=True)
class SurfaceQuirk:
    """How well the instruction's surface alone tells a label: out-of-fold accuracy against always the commonest value.

    `parts` are the accuracies with one kind of feature alone; `error` is the standard error of `accuracy`.
    """

    target: str
    rows: int
    chance: float
    accuracy: float
    error: float
    parts: Mapping[str, float]

    @property
    def gain(self) -> float:
        """Accuracy above chance."""
        return self.accuracy - self.chance

    @property
    def is_quirk(self) -> bool:
        """Whether the gain is large, and three standard errors of what chance gives."""
        return self.gain >= _LEAST_GAIN and self.gain > 3 * self.error


@dataclass(frozen=True)
class TellingWords:
    """Words in a row of the instruction after which a label nearly always has one value.

    `support` rows have them, `hits` of these the value; `lift` is how much more often that is than in all rows, and
    `pmi` its log2 (pointwise mutual information in bits).
    """

    target: str
    value: str
    words: str
    support: int
    hits: int
    lift: float
    pmi: float
    example: str


def surface_quirks(
    texts: Sequence[str], labels: Sequence[Mapping[str, str]], seed: int
) -> tuple[list[SurfaceQuirk], list[TellingWords]]:
    """What the surface of the instructions tells of each label, and the words that give labels away.

    Args:
        texts: the instructions.
        labels: of `labels.label_values`.
        seed: of the folds.
    """
    quirks, telling = [], []
    for target, places in targets(labels).items():
        asked = [texts[place] for place in places]
        values = np.array([labels[place][target] for place in places])
        quirks.append(_surface(target, asked, values, seed))
        telling += telling_words(target, asked, values)
    return quirks, telling


def _surface(target: str, texts: list[str], values: Any, seed: int) -> SurfaceQuirk:
    parts = {name: [features(text) for text in texts] for name, features in _FEATURES.items()}
    alone = {name: _accuracy(rows, values, seed) for name, rows in parts.items()}
    together = [
        {key: value for part in row for key, value in part.items()} for row in zip(*parts.values(), strict=True)
    ]
    accuracy = _accuracy(together, values, seed)
    chance = float(np.unique(values, return_counts=True)[1].max() / len(values))
    error = float(np.sqrt(max(chance * (1 - chance), 1e-9) / len(values)))
    return SurfaceQuirk(target, len(values), chance, accuracy, error, alone)


def _accuracy(features: list[dict[str, float]], values: Any, seed: int) -> float:
    from sklearn.feature_extraction import DictVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import MaxAbsScaler

    classifier = make_pipeline(DictVectorizer(), MaxAbsScaler(), LogisticRegression(max_iter=100))
    folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=seed)
    return float(cross_val_score(classifier, features, values, cv=folds).mean())


def _length(text: str) -> dict[str, float]:
    words = len(_WORD.findall(text))
    # A classifier that draws lines sees a range of lengths only by steps.
    bucket = {f"words about 2^{np.log2(words + 1):.0f}": 1.0}
    return {"characters": float(np.log1p(len(text))), "words": float(np.log1p(words)), **bucket}


def _punctuation(text: str) -> dict[str, float]:
    found = {f"has {mark!r}": float(np.log1p(text.count(mark))) for mark in _MARKS if mark in text}
    ends = text.rstrip()[-1:]
    digits = sum(map(str.isdigit, text))
    shape = "a letter" if ends.isalnum() else repr(ends)
    capitals = sum(map(str.isupper, text)) / max(len(text), 1)
    return {**found, f"ends with {shape}": 1.0, "digits": float(np.log1p(digits)), "capitals": capitals}


def _first_words(text: str) -> dict[str, float]:
    words = _WORD.findall(text[:200].lower())[:2]
    if not words:
        return {"begins with no word": 1.0}  # where no row has a feature, nothing can be fitted
    return {f"begins {' '.join(words[:count])!r}": 1.0 for count in range(1, len(words) + 1)}


_FEATURES = {"length": _length, "punctuation": _punctuation, "first words": _first_words}


def telling_words(target: str, texts: Sequence[str], values: Any) -> list[TellingWords]:
    """The sequences of one to three words that give a value away, the strongest first, at most ten.

    A sequence is taken if ten rows have it, the value's share of them is 0.8 or more, and that is surely (lower end of
    Wilson's interval) 1.5 times its share of all rows. Of sequences that stand in the same rows the longest is taken.
    """
    from sklearn.feature_extraction.text import CountVectorizer

    if len(texts) < _LEAST_SUPPORT:
        return []
    counter = CountVectorizer(ngram_range=(1, 3), binary=True, min_df=_LEAST_SUPPORT, token_pattern=r"(?u)\b\w+\b")
    try:
        present = counter.fit_transform(texts).tocsc()
    except ValueError:  # no sequence is frequent enough
        return []
    names = counter.get_feature_names_out()
    support = np.asarray(present.sum(0)).ravel()
    found: dict[tuple[str, int, int], TellingWords] = {}
    for value, count in zip(*np.unique(values, return_counts=True), strict=True):
        hits = np.asarray(present[np.flatnonzero(values == value)].sum(0)).ravel()
        sure = wilson_low(hits, support)
        lift = hits / support / (count / len(texts))
        for place in np.flatnonzero(
            (hits >= _LEAST_PRECISION * support) & (sure >= _LEAST_LIFT * count / len(texts))
        ).tolist():
            rows = present.indices[present.indptr[place] : present.indptr[place + 1]]
            words = TellingWords(
                target,
                str(value),
                str(names[place]),
                int(support[place]),
                int(hits[place]),
                float(lift[place]),
                float(np.log2(lift[place])),
                texts[int(rows.min())][:300],
            )
            key = (str(value), int(rows.sum()), len(rows))
            if key not in found or len(found[key].words) < len(words.words):
                found[key] = words
    return sorted(found.values(), key=lambda words: (-words.pmi * words.support, words.words))[:_MOST_SHOWN]


def wilson_low(hits: Any, support: Any) -> Any:
    """Lower end of Wilson's interval for a share (Wilson, 1927), at 3.3 standard errors."""
    share = hits / support
    centre = share + _Z**2 / (2 * support)
    spread = _Z * np.sqrt(share * (1 - share) / support + _Z**2 / (4 * support**2))
    return (centre - spread) / (1 + _Z**2 / support)

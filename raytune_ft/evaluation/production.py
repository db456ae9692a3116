"""How far what a test set asks is from what production asks: by embeddings, and by the texts' surface."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from raytune_ft.core.errors import DataError
from raytune_ft.core.records import Record
from raytune_ft.core.storage import Location
from raytune_ft.evaluation.folders import ROWS, files_of
from raytune_ft.evaluation.prompts import prompt_record
from raytune_ft.evaluation.record_files import rows_in

MOST = 1000
"""Most prompts of each side that are compared; of more, those with the lowest hashes."""
_PERMUTATIONS = 200
_EXAMPLES = 5
_WORD = re.compile(r"\w+")

Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Distance:
    """How far two sets of prompts are apart in meaning.

    `mmd` is the maximum mean discrepancy (Gretton et al., 2012) with a Gaussian kernel of the median distance, in the
    kernel's own units; `p_value` how often shuffled sides are as far apart. `uncovered` is the share of production's
    prompts that are further from the nearest test prompt than 19 of 20 test prompts are from theirs.
    """

    mmd: float
    p_value: float
    uncovered: float
    nearest: float
    """Median cosine of a production prompt to its nearest test prompt."""
    farthest: tuple[int, ...]
    """The production prompts that are farthest from any test prompt."""


def production_prompts(path: str) -> list[str]:
    """What feedback records ask, by the hash of the text, at most `MOST`; repeated prompts count each time.

    Args:
        path: a JSONL or Parquet file of feedback records, or a folder of these.

    Raises:
        DataError: if there is none, or a row has neither ``messages`` nor ``prompt``.
    """
    sample = Sample()
    for file in feedback_files(path):
        for number, (row, where) in enumerate(rows_in(file)):
            sample.add(asked_of(prompt_record(row, where, number)), number)
    if not sample.texts:
        raise DataError(f"production_path: {Location.at(path)}: holds no feedback records (.jsonl or .parquet)")
    return sample.texts


def feedback_files(path: str) -> list[Location]:
    """The files of feedback records behind a path.

    Raises:
        DataError: if there is none.
    """
    location = Location.at(path)
    if not location.exists():
        raise DataError(f"production_path: {location}: there is no such file or folder")
    files = [location] if location.is_file() else files_of(location)
    if not files or not all(file.name.endswith(ROWS) for file in files):
        raise DataError(f"production_path: {location}: holds no feedback records (.jsonl or .parquet)")
    return files


class Sample:
    """At most `most` texts of a stream, those with the lowest hashes, whatever the stream's order."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._kept: list[tuple[int, str]] = []

    def add(self, text: str, place: int) -> None:
        """Takes a text; its place tells repetitions apart."""
        self._kept.append((xxhash.xxh64_intdigest(f"{place}:{text}".encode()), text))
        if len(self._kept) >= 2 * self._most:
            self._kept = sorted(self._kept)[: self._most]

    @property
    def texts(self) -> list[str]:
        """The texts that are kept."""
        return [text for _, text in sorted(self._kept)[: self._most]]


def asked_of(record: Record) -> str:
    """What the user says in a prompt, all turns."""
    return "\n".join(turn.content for turn in record.prompt if turn.role == "user")


def asked_prompts(records: Sequence[Record]) -> list[str]:
    """What the test set asks, at most `MOST`.

    Raises:
        DataError: if it is raw text, which asks nothing.
    """
    sample = Sample()
    for place, record in enumerate(records):
        if record.prompt:
            sample.add(asked_of(record), place)
    if not sample.texts:
        raise DataError("production_path: this test set has no prompts that production's could be compared with")
    return sample.texts


def distance(test: Vectors, production: Vectors, *, seed: int = 0) -> Distance:
    """How far two sets of vectors of length 1 are apart.

    Args:
        test: [rows, width].
        production: [rows, width].
        seed: of the permutations.
    """
    both = np.concatenate([test, production]).astype(float)
    squared = np.maximum(2 - 2 * both @ both.T, 0)
    above = squared[np.triu_indices(len(both), 1)]
    width = float(np.median(above)) or 1.0
    kernel = np.exp(-squared / width)
    split = len(test)
    value = _mmd(kernel, np.arange(len(both)), split)
    rng = np.random.default_rng(seed)
    others = [_mmd(kernel, rng.permutation(len(both)), split) for _ in range(_PERMUTATIONS)]
    reached = sum(other >= value - 1e-12 for other in others)
    cosines = production.astype(float) @ test.T.astype(float)
    nearest = cosines.max(1)
    own = test.astype(float) @ test.T.astype(float)
    np.fill_diagonal(own, -1.0)
    usual = float(np.quantile(own.max(1), 0.05)) if len(test) > 1 else 0.0
    return Distance(
        mmd=math.sqrt(max(value, 0.0)),
        p_value=(reached + 1) / (_PERMUTATIONS + 1),
        uncovered=float((nearest < usual - 1e-6).mean()),
        nearest=float(np.median(nearest)),
        farthest=tuple(int(place) for place in np.argsort(nearest, kind="stable")[:_EXAMPLES]),
    )


def surface(texts: Sequence[str]) -> dict[str, float]:
    """Statistics of prompts that need no model: words (quartiles), questions, digits, lines, letters beyond ASCII."""
    words = np.array([len(text.split()) for text in texts], float)
    low, middle, high = np.quantile(words, [0.25, 0.5, 0.75])
    return {
        "prompts": len(texts),
        "words_low": float(low),
        "words_median": float(middle),
        "words_high": float(high),
        "with_question_mark": _share(texts, r"\?"),
        "with_digits": _share(texts, r"\d"),
        "with_several_lines": _share(texts, r"\n"),
        "beyond_ascii": _share(texts, r"[^\x00-\x7f]"),
    }


def word_divergence(test: Sequence[str], production: Sequence[str]) -> float:
    """Jensen–Shannon divergence of the two sides' word frequencies, in bits: 0 for equal ones, 1 for no word shared."""
    one, other = (Counter(word for text in texts for word in _words(text)) for texts in (test, production))
    words = sorted({*one, *other})
    p, q = (np.array([counts[word] for word in words], float) for counts in (one, other))
    p, q = p / max(p.sum(), 1), q / max(q.sum(), 1)
    middle = (p + q) / 2
    return float(sum(0.5 * (side[side > 0] * np.log2(side[side > 0] / middle[side > 0])).sum() for side in (p, q)))


def compared_prompts(
    test: Sequence[str], production: Sequence[str], vectors: tuple[Vectors, Vectors], *, seed: int
) -> dict[str, Any]:
    """All of it, as a report keeps it."""
    apart = distance(*vectors, seed=seed)
    sides = {"test": surface(test), "production": surface(production)}
    return {
        "mmd": apart.mmd,
        "p_value": apart.p_value,
        "uncovered": apart.uncovered,
        "nearest": apart.nearest,
        "word_divergence": word_divergence(test, production),
        **sides,
        "farthest": [production[place][:200] for place in apart.farthest],
    }


def production_note(found: dict[str, Any]) -> str:
    """The comparison in words that the numbers carry."""
    verdict = "differs from" if found["p_value"] <= 0.05 else "cannot be told from"
    return (
        f"What production asks {verdict} what the test set asks (maximum mean discrepancy {found['mmd']:.3f}, "
        f"p = {found['p_value']:.3f}; {found['uncovered']:.0%} of {found['production']['prompts']} production prompts "
        f"have no test prompt near them; word frequencies diverge by {found['word_divergence']:.2f} of 1 bit; median "
        f"words {found['test']['words_median']:.0f} in the test set, {found['production']['words_median']:.0f} in "
        "production)."
    )


def _mmd(kernel: NDArray[np.float64], order: NDArray[np.int64], split: int) -> float:
    """The biased squared discrepancy of the first `split` of `order` and the rest."""
    first, second = order[:split], order[split:]
    within = kernel[np.ix_(first, first)].mean() + kernel[np.ix_(second, second)].mean()
    return float(within - 2 * kernel[np.ix_(first, second)].mean())


def _words(text: str) -> Iterator[str]:
    return (found.group().lower() for found in _WORD.finditer(text))


def _share(texts: Sequence[str], pattern: str) -> float:
    return sum(re.search(pattern, text) is not None for text in texts) / len(texts)

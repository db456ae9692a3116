"""Has tuning cost general abilities? Shipped questions and general text, before and after."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from raytune_ft.core.errors import DataError
from raytune_ft.core.records import Record
from raytune_ft.core.storage import Location
from raytune_ft.evaluation.config import ForgettingConfig
from raytune_ft.evaluation.kept import Row
from raytune_ft.evaluation.record_files import record_of
from raytune_ft.evaluation.scorer import choices_of

ANSWER_TOKENS = 48
"""Most tokens of an answer to a question."""

_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
_TENS = {"twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90}


def general_questions() -> list[Record]:
    """The questions that ship with this package: short, with one right answer of four choices, of several kinds."""
    return _records(_shipped("questions.jsonl"), "questions.jsonl")


def general_passages(path: str | None) -> list[Record]:
    """Passages of general text: of a text file (blank lines between them), of JSONL with ``text``, or the shipped ones.

    Raises:
        DataError: if there is nothing to read.
    """
    if path is None:
        return _records(_shipped("text.jsonl"), "text.jsonl")
    location = Location.at(path)
    if not location.is_file():
        raise DataError(f"forgetting.text_path: {location}: there is no such file")
    text = location.read().decode("utf-8", errors="replace")
    if location.name.endswith(".jsonl"):
        found = _records(text, str(location))
    else:
        found = [Record(text=part.strip()) for part in re.split(r"\n\s*\n", text) if part.strip()]
    if not found:
        raise DataError(f"forgetting.text_path: {location}: holds no text")
    return found


def named_first(answer: str, choices: Sequence[str]) -> str | None:
    """The choice that an answer names first, as a word, whatever its case; a number may be spelled out."""
    text = _with_digits(answer.lower())
    places = {}
    for choice in choices:
        found = re.search(rf"(?<![\w.,]){re.escape(choice.lower())}(?![\w])(?![.,]\d)", text)
        if found is not None:
            places[choice] = (found.start(), -len(choice))
    return min(places, key=places.__getitem__) if places else None


def abilities(questions: Sequence[Record], rows: Mapping[int, Row], passages: int) -> dict[str, Any]:
    """What a model did with the questions (places from 0) and the passages behind them.

    `answered` is the share of questions whose generated answer names the right choice first, `chosen` that whose right
    choice is the likeliest; perplexity and bits per byte are those of the passages. What an endpoint cannot give is
    None.
    """
    right, chosen = [], []
    for place, question in enumerate(questions):
        choices, row = choices_of(question), rows[place]
        right.append(named_first(row["answer"], choices) == question.answer)
        if row.get("choices"):
            likeliest = min(row["choices"], key=lambda choice: choice["nll"])
            chosen.append(likeliest["text"] == question.answer)
    texts = [rows[place] for place in range(len(questions), len(questions) + passages) if place in rows]
    nll, tokens, size = (sum(row.get(name) or 0 for row in texts) for name in ("nll", "tokens", "bytes"))
    return {
        "answered": sum(right) / len(right),
        "chosen": sum(chosen) / len(chosen) if chosen else None,
        "perplexity": math.exp(min(nll / tokens, 700.0)) if tokens else None,
        "bits_per_byte": nll / size / math.log(2) if size else None,
        "right": right,
        "questions": len(questions),
        "passages": len(texts),
    }


def losses(
    before: dict[str, Any], after: dict[str, Any], config: ForgettingConfig, *, base: str, label: str
) -> list[str]:
    """What a tuned model has lost beyond the settings' thresholds, in words with the numbers."""
    found = []
    for name, how in (("answered", "answers"), ("chosen", "finds likeliest the answers")):
        old, new = before[name], after[name]
        if old is not None and new is not None and old - new > config.max_accuracy_drop + 1e-9:
            lost = sum(was and not now for was, now in zip(before["right"], after["right"], strict=True))
            gained = sum(now and not was for was, now in zip(before["right"], after["right"], strict=True))
            counts = f" ({lost} lost, {gained} gained)" if name == "answered" else ""
            found.append(
                f"Forgetting: {label} {how} of {new:.0%} of {after['questions']} general questions, {base} of "
                f"{old:.0%}{counts}; the threshold is a drop of {config.max_accuracy_drop:.0%}."
            )
    old, new = before["perplexity"], after["perplexity"]
    if old is not None and new is not None and new > old * (1 + config.max_perplexity_rise):
        found.append(
            f"Forgetting: the perplexity of {label} on {after['passages']} passages of general text is {new:.2f}, that "
            f"of {base} {old:.2f}: {new / old - 1:+.0%}; the threshold is {config.max_perplexity_rise:+.0%}."
        )
    return found


def _shipped(name: str) -> str:
    return (files("raytune_ft.evaluation.general") / name).read_text(encoding="utf-8")


def _records(text: str, where: str) -> list[Record]:
    lines = [line for line in text.split("\n") if line.strip()]
    try:
        return [record_of(json.loads(line), f"{where}:{number}") for number, line in enumerate(lines, 1)]
    except ValueError as error:
        raise DataError(f"{where}: is not valid JSON lines ({error})") from None


def _with_digits(text: str) -> str:
    for number, word in enumerate(_NUMBERS):
        text = re.sub(rf"\b{word}\b", str(number), text)
    tens = "|".join(_TENS)
    return re.sub(rf"\b({tens})(?:[- ](\d))?\b", lambda found: str(_TENS[found[1]] + int(found[2] or 0)), text)

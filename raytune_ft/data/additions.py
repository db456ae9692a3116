"""What is added to a conversation before it is trained on: a system prompt, and the reasoning before the answer.

Both become part of the record, so that evaluation sees what training saw.
"""

from __future__ import annotations

import functools
import re
from dataclasses import replace

from raytune_ft.core.records import Message, Record
from raytune_ft.data.config import DataCollectionConfig, Reasoning
from raytune_ft.data.conversations import REASONING_FIELDS

NO_REASONING = "no reasoning"
OTHER_ANSWER = "reasoning ends in another answer"

_MARKED = re.compile(r"(?s)^(?P<reasoning>.*\S)\s*\n####[ \t]*(?P<answer>\S.*)$")
_THOUGHT = re.compile(r"(?s)^\s*<think>(?P<reasoning>.*?)</think>\s*(?P<answer>.*)$")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
_STATED = re.compile(
    r"\\boxed\{(?P<boxed>[^{}]*)\}|####\s*(?P<marked>[^\n]+)"
    r"|\banswer(?:\s+is|\s*:|\s*=)\s*:?\s*(?P<said>(?:[^\n.]|\.(?=\d))+)",
    re.IGNORECASE,
)


def with_system_prompt(record: Record, system_prompt: str | None) -> Record:
    """The record with a system turn first, where it is a conversation that has none."""
    if system_prompt is None or not record.messages or record.messages[0].role == "system":
        return record
    return replace(record, messages=(Message("system", system_prompt), *record.messages))


def with_reasoning(record: Record, config: DataCollectionConfig) -> tuple[Record, str | None]:
    """The record with its last answer written as reasoning and answer, and what is wrong with its reasoning.

    Reasoning is taken from the answer itself (in `reasoning_format`, between ``<think>`` tags, or before a last line
    ``#### answer``), else from the metadata. Where it is masked, ``supervised_spans`` in the metadata says which
    characters of the turn are trained on.
    """
    if config.reasoning is Reasoning.NONE:
        return record, None
    found = _reasoning_of(record, config.reasoning_format)
    if found is None:
        return record, NO_REASONING
    reasoning, answer = found
    before, _, after = config.reasoning_format.partition("{answer}")
    head = before.replace("{reasoning}", reasoning)
    content = head + answer + after.replace("{reasoning}", reasoning)
    metadata = dict(record.metadata)
    if config.reasoning is Reasoning.MASK:
        metadata["supervised_spans"] = [[len(head), len(content)]]
    last = replace(record.messages[-1], content=content)
    written = replace(
        record, messages=(*record.messages[:-1], last), reference=record.reference or answer, metadata=metadata
    )
    return written, None if agrees(reasoning, record.reference or answer) else OTHER_ANSWER


def moved_spans(before: Record, after: Record) -> str | None:
    """Why the row's own ``supervised_spans`` are wrong after cleaning; None if it has none, or their text stayed."""
    if "supervised_spans" not in before.metadata or not before.messages or not after.messages:
        return None
    if before.messages[-1].content == after.messages[-1].content:
        return None
    return "supervised_spans: cleaning changed the text that they count characters of"


def agrees(reasoning: str, answer: str) -> bool:
    """Whether reasoning ends in `answer`; true where it states no conclusion that could be compared.

    A conclusion is what is boxed, marked with ``####`` or said after "answer is"; where there is none of these, and
    the answer is a number, it must be among the numbers of the last line that has any.
    """
    wanted = _as_number(answer)
    stated = [text for found in _STATED.finditer(reasoning) if (text := next(filter(None, found.groups()), ""))]
    if stated and wanted is None:
        ours, theirs = _plain(answer), _plain(stated[-1])
        return ours in theirs or theirs in ours
    if wanted is None:
        return True
    lines = [numbers for line in (stated[-1:] or reasoning.splitlines()) if (numbers := _NUMBER.findall(line))]
    return not lines or wanted in map(_as_number, lines[-1])


def _reasoning_of(record: Record, written: str) -> tuple[str, str] | None:
    if not record.messages or record.messages[-1].role != "assistant" or record.messages[-1].tool_calls:
        return None
    content = record.messages[-1].content
    for pattern in (_pattern(written), _THOUGHT, _MARKED):
        found = pattern.match(content)
        if found and found["reasoning"].strip() and found["answer"].strip():
            return found["reasoning"].strip(), found["answer"].strip()
    for name in REASONING_FIELDS:
        value = record.metadata.get(name)
        if isinstance(value, str) and value.strip() and content.strip():
            return value.strip(), content.strip()
    return None


@functools.lru_cache(maxsize=8)
def _pattern(written: str) -> re.Pattern[str]:
    """What a text in the format `written` matches."""
    found = re.escape(written)
    for name in ("reasoning", "answer"):
        found = found.replace(rf"\{{{name}\}}", f"(?P<{name}>.*?)", 1)
    return re.compile(f"(?s)^{found}$")


def _as_number(text: str) -> float | None:
    plain = text.strip().strip("$€£%.,! \n").replace(",", "")
    try:
        return float(plain)
    except ValueError:
        return None


def _plain(text: str) -> str:
    return re.sub(r"[\W_]+", " ", text).strip().casefold()

"""Which trials step together, when not all of them fit: a token budget, and whole steps in turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def next_group(waiting: Mapping[str, int], token_budget: int) -> list[str]:
    """The trials that make their next step together.

    The first in line always steps, alone if its step is larger than the budget; others step with it as far as they
    fit, in their order. Put those that stepped at the end of the line, and each trial steps within as many groups as
    there are trials.

    Args:
        waiting: trials with the tokens of their next step, longest waiting first.
        token_budget: most tokens of a group.
    """
    group: list[str] = []
    spent = 0
    for name, tokens in waiting.items():
        if not group or spent + tokens <= token_budget:
            group.append(name)
            spent += tokens
    return group


def row_chunks(lengths: Sequence[int], token_budget: int) -> list[range]:
    """Runs of rows of at most `token_budget` tokens, in their order; a longer row is a run of its own."""
    chunks: list[range] = []
    start = spent = 0
    for number, length in enumerate(lengths):
        if number > start and spent + length > token_budget:
            chunks.append(range(start, number))
            start, spent = number, 0
        spent += length
    chunks.append(range(start, len(lengths)))
    return chunks

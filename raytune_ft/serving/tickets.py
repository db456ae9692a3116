"""What goes into an engine and what comes out: requests, their progress, and the ticket that joins the two."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from raytune_ft.models.config import DecodingConfig
from raytune_ft.models.decoding import Row
from raytune_ft.models.sampling import TokenLogprob
from raytune_ft.serving.adapters import Adapter


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt's token ids, how its answer is decoded, by which adapter, and what is told of it.

    `top_logprobs` None asks for no log-probabilities; `echo` for the prompt's, too. Without `streamed`, all comes in
    one piece.
    """

    prompt_ids: Sequence[int]
    decoding: DecodingConfig
    adapter: str | None = None
    top_logprobs: int | None = None
    echo: bool = False
    streamed: bool = False


@dataclass(frozen=True)
class Progress:
    """What came of a request since its last progress; `finish_reason` says that it was the last."""

    text: str
    tokens: int
    logprobs: Sequence[TokenLogprob] = ()
    prompt_logprobs: Sequence[TokenLogprob] = ()
    finish_reason: Literal["stop", "length"] | None = None
    error: Exception | None = None


@dataclass(eq=False)
class Ticket:
    """A request in the engine; its progress comes out of `events`, in order, beside that of others there."""

    request: GenerationRequest
    adapter: Adapter | None
    events: Events
    loop: asyncio.AbstractEventLoop
    cancelled: bool = False
    row: Row | None = None
    told: int = field(default=0)
    """Log-probabilities that were told already."""
    entered: float = field(default_factory=time.monotonic)
    began: float | None = None
    """When its first token came, as `entered` on the monotonic clock."""


Events = asyncio.Queue[tuple[Ticket, Progress]]


def merged(found: Sequence[tuple[Ticket, Progress]]) -> list[tuple[Ticket, Progress]]:
    """As one progress a ticket, in the order of their first: what a listener that fell behind has to tell."""
    together: dict[int, tuple[Ticket, Progress]] = {}
    for ticket, after in found:
        before = together[id(ticket)][1] if id(ticket) in together else None
        together[id(ticket)] = (ticket, after if before is None else _joined(before, after))
    return list(together.values())


def _joined(before: Progress, after: Progress) -> Progress:
    return Progress(
        before.text + after.text,
        after.tokens,
        [*before.logprobs, *after.logprobs],
        [*before.prompt_logprobs, *after.prompt_logprobs],
        after.finish_reason,
        after.error,
    )

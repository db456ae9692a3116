"""What an engine tells of its requests."""

from __future__ import annotations

import asyncio

from raytune_ft.models.config import DecodingConfig
from raytune_ft.models.sampling import TokenLogprob
from raytune_ft.serving.tickets import GenerationRequest, Progress, Ticket, merged


def test_a_listener_that_fell_behind_gets_one_progress_of_each_request_with_all_that_came():
    loop = asyncio.new_event_loop()
    request = GenerationRequest([1], DecodingConfig())
    one, other = (Ticket(request, None, asyncio.Queue(), loop) for _ in range(2))
    entries = [TokenLogprob(token, -0.5, ()) for token in range(3)]
    told = [
        (one, Progress("a", 1, entries[:1], entries[2:])),
        (other, Progress("x", 1)),
        (one, Progress("b", 2, entries[1:2])),
        (one, Progress("", 2, (), (), "stop")),
    ]
    found = merged(told)
    assert [ticket is wanted for (ticket, _), wanted in zip(found, (one, other), strict=True)] == [True, True]
    assert found[0][1] == Progress("ab", 2, entries[:2], entries[2:], "stop")
    assert found[1][1] == Progress("x", 1)
    loop.close()

"""What the workers of a run tell each other about its end."""

from __future__ import annotations

import asyncio
import errno

from raytune_ft.training.interruption import StopBoard


def test_ranks_end_together_and_one_that_is_at_work_again_is_waited_for() -> None:
    async def said() -> list[object]:
        board, full = StopBoard(), OSError(errno.ENOSPC, "full")
        await board.ends(1)
        heard = [await board.all_end(0, 2), await board.begins(0), await board.begins(1)]
        heard.append(await board.all_end(0, 2, timeout_s=0.1))  # rank 1 is at work in another attempt
        heard.append(await asyncio.gather(*(board.all_end(rank, 2) for rank in (0, 1))))
        await board.note_not_stored(full)
        return [*heard, await board.begins(0) is full]

    assert asyncio.run(said()) == [True, None, None, False, [True, True], True]

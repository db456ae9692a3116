"""Which of the lines that workers print are said, and as whose."""

from __future__ import annotations

import logging

import pytest

from raytune_ft.core.relay import say


def test_own_lines_are_the_drivers_others_name_who_printed_them_and_chatter_is_dropped(
    caplog: pytest.LogCaptureFixture,
) -> None:
    lines = [
        "raytune-ft| step 2/4, loss 1.0",
        "a library: something to know",
        "  ",
        ":actor_name:Proxy",  # Ray's note to itself
        "Checkpoint successfully created at: Checkpoint(filesystem=local, path=/runs/ray/t1/checkpoint_000001)",
    ]
    with caplog.at_level(logging.INFO, logger="raytune_ft"):
        say({"lines": lines, "pid": 7, "actor_name": "Proxy"})
        say({"lines": ["from a task"], "pid": 8, "task_name": "tokenize"})
        say({"lines": ["from whatever else"], "pid": 9})
        say({"lines": ["resized to 3 nodes"], "pid": "autoscaler"})
    assert caplog.messages == [
        "step 2/4, loss 1.0",
        "(Proxy, process 7) a library: something to know",
        "(tokenize, process 8) from a task",
        "(worker, process 9) from whatever else",
    ]

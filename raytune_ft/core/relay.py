"""What workers print becomes the driver's lines: ours as they are, others with who printed them, chatter not at all.

Knows nothing of Ray but the shape of the batches that it hands over; `cluster` connects the two.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger("raytune_ft")

_MARK = "raytune-ft| "
_CHATTER = re.compile(
    "|".join(
        (
            "Requesting resources:",  # Ray Train, on what the resource plan has said
            "Attempting to start training worker group",
            "Checkpoint successfully created at:",  # Ray Tune, on the note that says where our own checkpoint lies
            r"Restored on \S+ from checkpoint:",  # Ray Tune, on the same
            "Started training worker group",
            r"world_rank=\d+, local_rank",
            "Setting up process group for",
            "'PreemptionWatcher' and ID",  # Ray's own actor, on how Ray made it
            "infinite retries remaining",  # Ray Serve's controller, each time it is shut down
            r"It looks like you're running Ray Train V2",
            "Setting accelerator to CPU",  # DeepSpeed, on what the resource plan has said
            "Failed to load CPU gemm_4bit_forward",  # bitsandbytes, on a kernel that only a hub has; its own is used
        )
    )
)
"""Lines of Ray's and of libraries' own that say nothing about the run; each is a constant of their code."""


def mark_own_lines() -> None:
    """In a worker: our own lines go to its standard output, marked."""
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter(_MARK + "%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False


def say(batch: Mapping[str, Any]) -> None:
    """Says a batch of printed lines: ours as the driver's own, others with who printed them, chatter not.

    Args:
        batch: Ray's: ``lines``, ``pid``, and ``actor_name`` or ``task_name`` where there is one.
    """
    if batch.get("pid") == "autoscaler":
        return  # its whole log comes this way; `ray status` shows what counts
    for line in batch.get("lines") or ():
        if line.startswith(_MARK):
            logger.info("%s", line.removeprefix(_MARK))
        elif line.strip() and not line.startswith(":") and not _CHATTER.search(line):
            who = batch.get("actor_name") or batch.get("task_name") or "worker"
            logger.info("(%s, process %s) %s", who, batch.get("pid"), line)

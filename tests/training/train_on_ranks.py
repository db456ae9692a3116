"""One rank of training runs under DeepSpeed without Ray: ``python train_on_ranks.py JOBS.json RANK WORLD_SIZE``.

JOBS.json: {"splits": ..., "meet": a path for the process group, "runs": [{"output", "kind", "config", "cut_after"?}]};
`kind` is the name of the settings' class.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

import raytune_ft
from raytune_ft.core.storage import Location
from raytune_ft.training.loop import Decision
from raytune_ft.training.session import Seat, train_in_process


class CutError(Exception):
    """Ends a run as a failure would."""


def main() -> None:
    jobs, rank, world_size = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2]), int(sys.argv[3])
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    device = f"cuda:{rank}" if torch.cuda.is_available() else "cpu"
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        backend, init_method=f"file://{jobs['meet']}.{world_size}", rank=rank, world_size=world_size
    )
    for run in jobs["runs"]:

        def report(step, metrics, run=run):
            if step == run.get("cut_after"):
                raise CutError
            return Decision.CONTINUE

        try:
            train_in_process(
                getattr(raytune_ft, run["kind"])(**run["config"]),
                jobs["splits"],
                Seat(rank, world_size, device, deepspeed=True),
                output=Location.at(run["output"]),
                report=report,
            )
        except CutError:
            continue
    torch.distributed.destroy_process_group()
    # All is on the disk. Threads of libraries that are in the midst of C++ when the interpreter ends may abort it.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()

"""What the reference model says of the answers of a run: scored once, by the model before its first step."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raytune_ft.core.storage import Location
from raytune_ft.training.batches import evaluation_batches
from raytune_ft.training.micro_batches import Held
from raytune_ft.training.pairs import PairRows
from raytune_ft.training.peers import Peers
from raytune_ft.training.preference import PairwiseLoss
from raytune_ft.training.ratings import RatedLoss, RatedRows


def set_reference(
    rows: PairRows | RatedRows,
    numbers: Sequence[int],
    loss: PairwiseLoss | RatedLoss,
    peers: Peers,
    kept: Location | None,
) -> None:
    """Gives rows what the model, as it is now, says of their answers; all ranks compute a share, and all call it.

    Args:
        rows: the pairs, or the rated answers, of a split.
        numbers: those that are asked for; the others' scores are no numbers.
        loss: of the model before its first step; its settings say how many pairs are computed at a time.
        peers: the ranks.
        kept: a NumPy file that an earlier attempt of the run left the same in, or that it is left in.
    """
    if kept is not None and peers.leader_says(int(kept.exists())):
        rows.reference = np.load(io.BytesIO(kept.read()), allow_pickle=False)
        return
    size, may_split = loss.config.per_device_eval_batch_size, loss.config.zero_stage < 3
    held, found = Held(), []

    def said_of(batch: Any) -> Tensor:
        return loss.log_probabilities(batch.to(peers.device))

    loss.eval()
    with torch.no_grad():
        for batch in evaluation_batches(rows, size, peers.rank, peers.world_size, numbers):
            parts = held.computed(said_of, batch, may_split=may_split)
            if batch.items:
                found += [part.double().cpu().view(-1, 2) for part in parts]
    loss.train()
    asked = torch.zeros(len(numbers), 2, dtype=torch.float64)
    if found:
        asked[peers.rank :: peers.world_size] = torch.cat(found)
    rows.reference = np.full((len(rows), 2), np.nan, np.float32)
    rows.reference[list(numbers)] = peers.total(asked).numpy()
    if kept is not None and peers.leads:
        file = io.BytesIO()
        np.save(file, rows.reference, allow_pickle=False)
        kept.write(file.getvalue())

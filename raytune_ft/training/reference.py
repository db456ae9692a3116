"""What the reference model says of the answers of a run: scored once, by the model before its first step."""

from __future__ import annotations

import io
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raytune_ft.core.storage import Location
from raytune_ft.models.collate import PackedBatch
from raytune_ft.models.scoring import SummedLoss
from raytune_ft.training.batches import TokenRows, evaluation_batches
from raytune_ft.training.config_alignment import PreferenceConfig
from raytune_ft.training.micro_batches import computed_without_gradient
from raytune_ft.training.peers import Peers


class ScoredRows(TokenRows):
    """Rows with two answers each that a reference model scores."""

    reference: NDArray[np.float32] | None = None
    """[rows, 2] log-probabilities of the two answers under the reference, in nats; None counts as 0."""

    def known(self, numbers: Sequence[int]) -> Tensor:
        """[numbers, 2] float32, what the reference says of these rows."""
        if self.reference is None:
            return torch.zeros(len(numbers), 2)
        return torch.from_numpy(self.reference[list(numbers)])


class ReferencedLoss(SummedLoss):
    """An objective that holds a model against its reference, on batches of `ScoredRows`."""

    is_likelihood: ClassVar[bool] = False

    def __init__(self, model: Any, config: PreferenceConfig) -> None:
        super().__init__(model)
        self.config = config

    @abstractmethod
    def log_probabilities(self, batch: Any) -> Tensor:
        """[items * 2] of the two answers of each item, in nats."""


def set_reference(
    rows: ScoredRows, numbers: Sequence[int], loss: ReferencedLoss, peers: Peers, kept: Location | None
) -> None:
    """Gives rows what the model, as it is now, says of their answers; all ranks compute a share, and all call it.

    Args:
        rows: the pairs, or the rated answers, of a split.
        numbers: those that are asked for; the others' scores are no numbers.
        loss: of the model before its first step; its settings say how many rows are computed at a time.
        peers: the ranks.
        kept: a NumPy file that an earlier attempt of the run left the same in, or that it is left in.
    """
    if kept is not None and peers.leader_says(int(kept.exists())):
        rows.reference = np.load(io.BytesIO(kept.read()), allow_pickle=False)
        return

    def said_of(batch: PackedBatch) -> Tensor:
        return loss.log_probabilities(batch.to(peers.device))

    size, may_split = loss.config.per_device_eval_batch_size, loss.config.zero_stage < 3
    batches = evaluation_batches(rows, size, peers.rank, peers.world_size, numbers)
    found = [
        part.double().cpu().view(-1, 2)
        for batch, parts in computed_without_gradient(loss, said_of, batches, may_split=may_split)
        for part in parts
        if batch.items
    ]
    asked = torch.zeros(len(numbers), 2, dtype=torch.float64)
    if found:
        asked[peers.rank :: peers.world_size] = torch.cat(found)
    rows.reference = np.full((len(rows), 2), np.nan, np.float32)
    rows.reference[list(numbers)] = peers.total(asked).numpy()
    if kept is not None and peers.leads:
        file = io.BytesIO()
        np.save(file, rows.reference, allow_pickle=False)
        kept.write(file.getvalue())

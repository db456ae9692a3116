"""What the processes of a run agree on: a number from the leading one, and whether all are content."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Peers:
    """This process among those of its run; where there are others, all make the same calls in the same order."""

    rank: int = 0
    world_size: int = 1
    device: str = "cpu"

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def leader_says(self, number: int) -> int:
        """Rank 0's number, on every rank."""
        if self.world_size == 1:
            return number
        told = torch.tensor([number], dtype=torch.int64, device=self.device)
        torch.distributed.broadcast(told, src=0)
        return int(told.item())

    def all_say(self, mine: bool) -> bool:
        """Whether every rank says yes."""
        if self.world_size == 1:
            return mine
        flag = torch.tensor([int(mine)], device=self.device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MIN)
        return bool(flag.item())

    def total(self, mine: Tensor) -> Tensor:
        """The sum of all ranks' tensors, in this machine's memory."""
        if self.world_size == 1:
            return mine
        summed = mine.to(self.device)
        torch.distributed.all_reduce(summed)
        return summed.cpu()


ALONE = Peers()

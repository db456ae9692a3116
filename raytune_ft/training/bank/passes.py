"""Ways of trials' rows through the base and back: cut to what fits the caches, side by side where there are cores."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from raytune_ft.models.chat import Encoded
from raytune_ft.models.collate import PackedBatch, group_by_budget, pack
from raytune_ft.models.frozen_head import losses_and_gradient
from raytune_ft.models.scoring import CausalParts, target_states
from raytune_ft.training.bank.base import FrozenBase
from raytune_ft.training.bank.criterion import Criterion
from raytune_ft.training.bank.lanes import MOST_LANES, Lanes, evened, may_share_cores, share_out
from raytune_ft.training.bank.layout import Share, lay_out
from raytune_ft.training.bank.packed_linear import PassSeat
from raytune_ft.training.bank.ragged import RaggedSlots
from raytune_ft.training.bank.referenced import known_of
from raytune_ft.training.bank.stacked import StackedSlots
from raytune_ft.training.bank.turns import next_group, row_chunks
from raytune_ft.training.batches import Rows
from raytune_ft.training.preference import row_sums

PASS_TOKENS = 1024
"""Tokens of a pass of ragged slots: on a CPU, larger batches only leave the caches."""


class Passes:
    """What the trials of a bank compute on its base.

    Ragged slots go in small passes, in lanes if the base allows it; stacked ones all at once, so that the number of
    launches stays what it is.
    """

    def __init__(
        self, base: FrozenBase, slots: RaggedSlots | StackedSlots, seat: PassSeat, criterion: Criterion
    ) -> None:
        self._base, self._slots, self._seat, self._criterion = base, slots, seat, criterion
        self._parts = CausalParts.of(base.model)
        self._weights: int = sum(parameter.numel() for parameter in base.model.parameters())
        self._small = isinstance(slots, RaggedSlots)
        several = self._small and may_share_cores(base.model)
        self._lanes = Lanes(torch.get_num_threads(), most=MOST_LANES if several else 1)

    def train(self, shares: Sequence[Share], items: Sequence[int], budget: int) -> Tensor:
        """Adds the gradients of a step to the trials' slots.

        Args:
            shares: what each trial trains on in this step.
            items: what the loss of each share is a mean over.
            budget: most tokens of a pass.

        Returns:
            [trials, measures] float64, sums over each trial's items, on the base's device.
        """
        sums: dict[str, Tensor] = {}
        weights = {share.name: 1 / max(1, count) for share, count in zip(shares, items, strict=True)}

        def lane(names: Collection[str]) -> None:
            mine = [share for share in shares if share.name in names]
            for some in self._passes(mine, budget):
                for share, total in zip(some, self._there_and_back(some, weights).unbind(), strict=True):
                    sums[share.name] = sums[share.name] + total if share.name in sums else total

        self._in_lanes(lane, shares)
        return torch.stack([sums[share.name] for share in shares])

    @torch.no_grad()
    def score(self, names: Sequence[str], rows: Rows, budget: int) -> dict[str, list[float]]:
        """What each trial is measured by on `rows`, means over their items."""
        each = self._criterion.rows_per_item
        lengths = [
            sum(len(rows[number].input_ids) for number in range(first, first + each))
            for first in range(0, len(rows), each)
        ]
        # Read at last, so that the host lays out the next pass while a GPU computes one.
        found: list[tuple[list[str], Tensor]] = []
        count = 0
        most = self._pass_tokens(budget)
        for group in group_by_budget(lengths, most if self._small else most // len(names) or 1):
            numbers = [each * item + place for item in group for place in range(each)]
            some = [rows[number] for number in numbers]
            known = known_of(rows, numbers)
            shares = [self._criterion.divided(Share(name, some, known=known, together=each))[0] for name in names]
            count += self._criterion.items(shares[0])
            together = max(1, most // shares[0].tokens)

            def lane(mine: Collection[str], shares: list[Share] = shares, together: int = together) -> None:
                here = [share for share in shares if share.name in mine]
                for start in range(0, len(here), together):
                    some = here[start : start + together]
                    found.append(([share.name for share in some], self._there(some)))

            self._in_lanes(lane, shares)
        sums = {name: torch.zeros(len(self._criterion.measures), dtype=torch.float64) for name in names}
        for some_names, totals in found:
            for name, total in zip(some_names, totals.cpu(), strict=True):
                sums[name] += total
        return {name: (total / max(1, count)).tolist() for name, total in sums.items()}

    def said_by_base(self, rows: Sequence[Encoded], budget: int) -> list[float]:
        """Log-probability of each row's targets under the base without any adapter, in nats."""
        said = [0.0] * len(rows)

        def lane() -> None:
            for group in group_by_budget([len(row.input_ids) for row in rows], self._pass_tokens(budget)):
                batch = pack([rows[number] for number in group]).to(self._base.device)
                for number, nats in zip(group, self._said(batch, nullcontext()), strict=True):
                    said[number] = nats

        self._lanes.run([lane])
        return said

    def said(self, shares: Sequence[Share], budget: int) -> dict[str, list[float]]:
        """Log-probability of the targets of each row under its trial's adapter, in nats, by the trials' names."""
        said: dict[str, list[float]] = {share.name: [] for share in shares}

        def lane(names: Collection[str]) -> None:
            for some in self._passes([share for share in shares if share.name in names], budget):
                batch, layout = lay_out(some, self._base.device, dropout=False)
                found = iter(self._said(batch, self._seat.runs(self._slots.run(layout))))
                for share in some:
                    said[share.name] += islice(found, len(share.rows))

        self._in_lanes(lane, shares)
        return said

    @torch.no_grad()
    def _said(self, batch: PackedBatch, running: AbstractContextManager[None]) -> list[float]:
        with running:
            states = target_states(self._parts, batch)
        losses, _ = losses_and_gradient(self._parts.head, states, batch.targets, None)
        return (-row_sums(losses.double(), batch)).tolist()

    def evened(self, waiting: Mapping[str, int]) -> list[str]:
        """Of trials in line, with the tokens of their next step, as many of the first as keep all lanes busy."""
        return evened({name: self._work(name, tokens) for name, tokens in waiting.items()}, self._lanes.most)

    def _in_lanes(self, lane: Callable[[Collection[str]], None], shares: Sequence[Share]) -> None:
        names = share_out({share.name: self._work(share.name, share.tokens) for share in shares}, self._lanes.most)
        self._lanes.run([partial(lane, frozenset(some)) for some in names])

    def _work(self, name: str, tokens: int) -> int:
        """What tokens of a trial cost, in some unit: an adapter's weight is in three products for a base's two."""
        return tokens * (2 * self._weights + 3 * self._slots.settings(name).size)

    def _pass_tokens(self, budget: int) -> int:
        return min(budget, PASS_TOKENS) if self._small else budget

    def _passes(self, shares: list[Share], budget: int) -> list[list[Share]]:
        """Whole trials as far as they fit; the step of a larger one in several passes of some of its rows."""
        most = self._pass_tokens(budget)
        waiting = {share.name: share for share in shares}
        found: list[list[Share]] = []
        while waiting:
            group = next_group({name: share.tokens for name, share in waiting.items()}, most)
            some = [waiting.pop(name) for name in group]
            found += [some] if len(some) > 1 else _in_items(some[0], most)
        return found

    def _there_and_back(self, shares: list[Share], weights: dict[str, float]) -> Tensor:
        dropout = any(self._slots.settings(share.name).dropout for share in shares)
        batch, layout = lay_out(shares, self._base.device, dropout=dropout)
        counts = torch.tensor(layout.targets)
        known = self._criterion.known_weights(shares, counts, weights)
        with self._seat.runs(self._slots.run(layout)):
            states = target_states(self._parts, batch)
            if known is None:
                each = torch.ones(len(batch.targets), device=states.device)
            else:
                each = known.to(states.device, non_blocking=True)
            losses, gradient = losses_and_gradient(self._parts.head, states.detach(), batch.targets, each)
            sums, later = self._criterion.graded(losses, batch, shares, counts, weights)
            if later is not None and gradient is not None:  # a target's loss depends on its own states only
                gradient = (gradient.float() * later.unsqueeze(1)).to(gradient.dtype)
            torch.autograd.backward(states, gradient)
        return sums

    @torch.no_grad()
    def _there(self, shares: list[Share]) -> Tensor:
        batch, layout = lay_out(shares, self._base.device, dropout=False)
        with self._seat.runs(self._slots.run(layout)):
            states = target_states(self._parts, batch)
        losses, _ = losses_and_gradient(self._parts.head, states, batch.targets, None)
        sums, _ = self._criterion.graded(losses, batch, shares, torch.tensor(layout.targets), None)
        return sums


def _in_items(share: Share, most: int) -> list[list[Share]]:
    """The share in parts of at most `most` tokens; an item's rows stay together."""
    each, lengths = share.together, [len(row.input_ids) for row in share.rows]
    runs = row_chunks([sum(lengths[first : first + each]) for first in range(0, len(lengths), each)], most)
    return [[share.part(each * run.start, each * run.stop)] for run in runs]

"""The loop of offline generation: a fixed number of slots, each with a row; a finished row's slot goes to the next one.

A plain batch decodes until its longest answer is done, and most of its rows have ended long before. Here keys and
values lie in buffers that are written in place, and the next prompt's are put where a finished row's were (iteration
level scheduling; Yu et al., 2022, Orca), so that few computed tokens are thrown away.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from raytune_ft.models.config import DecodingConfig

_ROOM = 64
"""Steps for which the buffers have room before they are laid out anew."""


@dataclass(frozen=True)
class Job:
    """A prompt with its number, the most tokens of its answer, and the seed of its own random stream."""

    number: int
    prompt: Sequence[int]
    limit: int
    seed: int


def has_plain_cache(model: Any) -> bool:
    """Whether every layer keeps the keys and values of all tokens, and nothing else (no window, no recurrent state)."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = DynamicCache(config=causal.config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def decode(
    model: Any, tokenizer: Any, jobs: Sequence[Job], decoding: DecodingConfig, *, stops: Sequence[int], slots: int
) -> Iterator[tuple[int, list[int]]]:
    """Numbers and answer tokens (the one that ended it included) of the jobs, as they end.

    Args:
        model: a causal language model with a plain cache, whose attention takes padding masks.
        tokenizer: to look for stop texts.
        jobs: longest prompts first.
        decoding: sampling and stop texts.
        stops: tokens that end an answer.
        slots: most rows at once.
    """
    waiting = deque(jobs)
    rows: list[_Row | None] = [None] * min(slots, len(jobs))
    batch = _Batch(model, len(rows), pad=(list(stops) or [0])[0])
    while waiting or any(rows):
        free = [slot for slot, row in enumerate(rows) if row is None]
        if waiting and 4 * len(free) >= len(rows):
            places = free[: len(waiting)]
            for slot in places:
                rows[slot] = _Row(waiting.popleft())
            logits = batch.fill(places, [row.job.prompt for slot in places if (row := rows[slot])])
        else:
            if not waiting and 4 * len(free) >= len(rows):
                kept = [slot for slot, row in enumerate(rows) if row is not None]
                batch.keep(kept)
                rows = [rows[slot] for slot in kept]
            places = [slot for slot, row in enumerate(rows) if row is not None]
            logits = batch.step([row.tokens[-1] if row else batch.pad for row in rows], places)[places]
        for slot, token in zip(
            places, _next(logits, [row for slot in places if (row := rows[slot])], decoding), strict=True
        ):
            row = rows[slot]
            assert row is not None
            row.tokens.append(token)
            if token in stops or len(row.tokens) == row.job.limit or _said_stop(tokenizer, row.tokens, decoding.stop):
                rows[slot] = None
                yield row.job.number, row.tokens


class _Row:
    """A job that is being answered, and its tokens so far."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.tokens: list[int] = []


class _SlotLayer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped
    """Keys and values of one layer in buffers, [slots, heads, room, head size] each, written in place."""

    def __init__(self, keys: Tensor, values: Tensor, used: int) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.buffers, self.used = (keys, values), used

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes the states of the next tokens behind those that are there."""
        end = self.used + key_states.shape[2]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.used : end] = states
        self.used = end
        keys, values = (buffer[:, :, :end] for buffer in self.buffers)
        return keys, values

    def get_seq_length(self) -> int:
        """Tokens in the buffers, padding included."""
        return self.used


class _Batch:
    """The slots' keys, values and masks; every row ends at the same column, and is padded before it."""

    def __init__(self, model: Any, slots: int, *, pad: int) -> None:
        self.model, self.pad = model, pad
        self.device = model.device
        self.lengths = torch.zeros(slots, dtype=torch.long, device=self.device)
        self.mask = torch.zeros(slots, 0, dtype=torch.long, device=self.device)
        self.cache: Any = None

    @property
    def used(self) -> int:
        """Columns that are written."""
        return int(self.cache.layers[0].used)

    def fill(self, slots: list[int], prompts: list[Sequence[int]]) -> Tensor:
        """Computes prompts, none longer than `used`, into free slots; their last logits, [slots, vocabulary]."""
        longest = max(map(len, prompts))
        ids = torch.tensor([[self.pad] * (longest - len(p)) + list(p) for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        fresh = DynamicCache()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = self._forward(ids, mask, positions, fresh)
        if self.cache is None:
            self._lay_out(fresh, longest)
        places = torch.tensor(slots, device=self.device)
        start, end = self.used - longest, self.used
        self.mask[places] = 0
        self.mask[places, start:end] = mask
        self.lengths[places] = mask.sum(1)
        for layer, new in zip(self.cache.layers, fresh.layers, strict=True):
            for buffer, states in zip(layer.buffers, (new.keys, new.values), strict=True):
                buffer[places, :, start:end] = states
        return logits

    def step(self, tokens: list[int], live: list[int]) -> Tensor:
        """Computes one more token of every slot; logits, [slots, vocabulary]."""
        if self.used == self.mask.shape[1]:
            self._make_room(live)
        self.mask[:, self.used] = 1
        ids = torch.tensor([[token] for token in tokens], device=self.device)
        logits = self._forward(ids, self.mask[:, : self.used + 1], self.lengths[:, None], self.cache)
        self.lengths += 1
        return logits

    def keep(self, slots: list[int]) -> None:
        """Gives up all other slots."""
        places = torch.tensor(slots, dtype=torch.long, device=self.device)
        self.mask, self.lengths = self.mask[places], self.lengths[places]
        self._replace([tuple(buffer[places] for buffer in layer.buffers) for layer in self.cache.layers], self.used)

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        out = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = out.logits[:, -1]
        return logits

    def _lay_out(self, fresh: Any, longest: int) -> None:
        slots = len(self.lengths)
        self.mask = self.mask.new_zeros(slots, longest + _ROOM)
        shapes = [(layer.keys, layer.values) for layer in fresh.layers]
        empty = [tuple(s.new_zeros(slots, s.shape[1], longest + _ROOM, s.shape[3]) for s in pair) for pair in shapes]
        self._replace(empty, longest)

    def _make_room(self, live: list[int]) -> None:
        """Moves all columns to the left, over those that are padding in every live row, with room behind them."""
        first = int(self.mask[live].argmax(1).min())
        used = self.used - first

        def moved(old: Tensor, dim: int) -> Tensor:
            shape = list(old.shape)
            shape[dim] = used + _ROOM
            new = old.new_zeros(shape)
            new.narrow(dim, 0, used).copy_(old.narrow(dim, first, used))
            return new

        self.mask = moved(self.mask, 1)
        self._replace([tuple(moved(buffer, 2) for buffer in layer.buffers) for layer in self.cache.layers], used)

    def _replace(self, buffers: Sequence[tuple[Tensor, ...]], used: int) -> None:
        self.cache = Cache(layers=[_SlotLayer(keys, values, used) for keys, values in buffers])


def _next(logits: Tensor, rows: Sequence[_Row], decoding: DecodingConfig) -> list[int]:
    """The next token of each row, by [rows, vocabulary] logits."""
    if decoding.temperature == 0:
        return [int(token) for token in logits.argmax(-1).tolist()]
    draws = [uniform(row.job.seed, len(row.tokens)) for row in rows]
    return sampled(torch.softmax(logits.float() / decoding.temperature, -1), draws, decoding.top_p)


def sampled(probabilities: Tensor, draws: Sequence[float], top_p: float) -> list[int]:
    """One token a row: `draws` in [0, 1) on the cumulated probabilities, likeliest first, within `top_p` of them.

    Args:
        probabilities: [rows, vocabulary].
        draws: one a row.
        top_p: the smallest set of tokens with this probability is drawn from (Holtzman et al., 2020).
    """
    ordered, tokens = probabilities.double().sort(dim=-1, descending=True)
    sums = ordered.cumsum(-1)
    # A token is kept if those before it have not reached top_p yet; the likeliest one always is.
    kept = ((sums - ordered) < top_p).sum(-1, keepdim=True)
    mass = sums.gather(-1, kept - 1)
    wanted = torch.tensor(draws, dtype=torch.double, device=sums.device)[:, None] * mass
    place = torch.minimum((sums <= wanted).sum(-1, keepdim=True), kept - 1)
    return [int(token) for token in tokens.gather(-1, place)[:, 0].tolist()]


def uniform(seed: int, step: int) -> float:
    """The number in [0, 1) that decides the token at `step`: a row's own, whatever shares its batch."""
    return (xxhash.xxh64_intdigest(f"{seed}:{step}".encode()) >> 11) / 2**53


def _said_stop(tokenizer: Any, tokens: list[int], stops: Sequence[str]) -> bool:
    """Whether the end of an answer holds a stop text; a token has a byte at least, but for special ones."""
    if not stops:
        return False
    tail = max(len(stop.encode()) for stop in stops) + 8
    text = tokenizer.decode(tokens[-tail:], skip_special_tokens=True)
    return any(stop in text for stop in stops)

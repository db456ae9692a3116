"""Batched generation of answers to prompts of mixed lengths.

Prompts are sorted by length and share batches by a token budget; a row that is done makes room for the next prompt
(`models.decoding`). The answers come back in the order of the prompts, and none depends on what shared its batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch
import xxhash

from raytune_ft.models.attention import attention
from raytune_ft.models.collate import group_by_budget
from raytune_ft.models.config import DecodingConfig
from raytune_ft.models.decoding import Decoder
from raytune_ft.models.loading import LoadedModel
from raytune_ft.models.scoring import context_tokens


@dataclass(frozen=True)
class Completion:
    """An answer: its text without stop tokens, its token ids, and why it ended."""

    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length"]


@torch.inference_mode()
def generate(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    decoding: DecodingConfig,
    *,
    token_budget: int = 8192,
    seeds: Sequence[int] | None = None,
    on_answers: Callable[[Mapping[int, Completion]], None] | None = None,
    stop_ids: Sequence[int] | None = None,
) -> list[Completion]:
    """Answers to `prompts`, in their order.

    An answer ends at a stop token or text, after `max_new_tokens`, or where the model's context ends.

    Args:
        loaded: the model.
        prompts: token ids, each ending with the generation prompt.
        decoding: length, sampling and stop texts.
        token_budget: most tokens (prompt and answer, padding included) of one batch.
        seeds: of each prompt's own random stream; by default the settings' seed with the prompt's place.
        on_answers: told the answers, by the places of their prompts, as they come.
        stop_ids: tokens that end an answer; by default the chat's. an empty one lets every answer reach its limit.
    """
    answers: dict[int, Completion] = {}
    seeds = seeds or [row_seed(decoding.seed, str(place)) for place in range(len(prompts))]
    with attention(loaded.model, "sdpa"):
        for found in _found(loaded, prompts, decoding, token_budget=token_budget, seeds=seeds, stop_ids=stop_ids):
            answers |= found
            if on_answers is not None:
                on_answers(found)
    return [answers[number] for number in range(len(prompts))]


def row_seed(seed: int, row: str) -> int:
    """The seed of a row's own random stream: the same wherever, and with whatever, the row is answered."""
    return xxhash.xxh64_intdigest(f"{seed}:{row}".encode())


def _found(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    decoding: DecodingConfig,
    *,
    token_budget: int,
    seeds: Sequence[int],
    stop_ids: Sequence[int] | None,
) -> Iterator[dict[int, Completion]]:
    context = context_tokens(loaded.model)
    room = [context - len(prompt) if context else decoding.max_new_tokens for prompt in prompts]
    limits = [max(1, min(decoding.max_new_tokens, left)) for left in room]
    lengths = [len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)]
    if getattr(loaded.model, "_is_stateful", False):  # its recurrent state cannot be joined to that of others
        for group in group_by_budget(lengths, token_budget, padded=True):
            torch.manual_seed(seeds[group[0]])
            batch = _generate_batch(loaded, [prompts[number] for number in group], decoding)
            yield dict(zip(group, batch, strict=True))
        return
    own = [
        decoding.model_copy(update={"max_new_tokens": limit, "seed": seed})
        for limit, seed in zip(limits, seeds, strict=True)
    ]
    for wave, slots in waves(lengths, token_budget):
        wave.sort(key=lambda number: -len(prompts[number]))
        yield from _refilled(loaded, {number: (prompts[number], own[number]) for number in wave}, slots, stop_ids)


def _refilled(
    loaded: LoadedModel,
    asked: Mapping[int, tuple[Sequence[int], DecodingConfig]],
    slots: int,
    stop_ids: Sequence[int] | None,
) -> Iterator[dict[int, Completion]]:
    """Answers as they end; whenever a quarter of the slots is free, the next prompts join (Yu et al., 2022, Orca)."""
    decoder = Decoder(loaded, stop_ids=stop_ids)
    waiting = deque(asked)
    numbers: dict[int, int] = {}
    while waiting or decoder.rows:
        free = slots - len(decoder.rows)
        if waiting and 4 * free >= slots:
            joining = []
            for number in islice(waiting, free):
                row = decoder.new_row(loaded, *asked[number], whole=True)
                numbers[id(row)] = number
                joining.append(row)
            for _ in joining:
                waiting.popleft()
            decoder.join(joining)
            stepped = joining
        else:
            stepped = decoder.step()
        done = {
            numbers.pop(id(row)): Completion(row.stream.text, row.token_ids, row.finish_reason)
            for row in stepped
            if row.finish_reason is not None
        }
        if done:
            yield done


def waves(lengths: Sequence[int], token_budget: int) -> list[tuple[list[int], int]]:
    """Rows, longest first, in runs that share a number of slots: that which `token_budget` has for its longest row.

    A run ends where the budget has room for twice the slots, so that one long row does not narrow all others.
    """
    found: list[tuple[list[int], int]] = []
    for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        slots = max(1, token_budget // max(1, lengths[number]))
        if not found or slots >= 2 * found[-1][1]:
            found.append(([], slots))
        found[-1][0].append(number)
    return found


def _generate_batch(loaded: LoadedModel, prompts: list[Sequence[int]], decoding: DecodingConfig) -> list[Completion]:
    from transformers import GenerationConfig

    tokenizer, stops = loaded.tokenizer, list(loaded.chat.stop_ids)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (stops or [0])[0]
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=loaded.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=loaded.device)
    sampling: dict[str, Any] = {"do_sample": False}
    if decoding.temperature > 0:
        sampling = {"do_sample": True, "temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0}
    settings = GenerationConfig(
        max_new_tokens=decoding.max_new_tokens, eos_token_id=stops or None, pad_token_id=pad, use_cache=True, **sampling
    )
    extra = {"stop_strings": list(decoding.stop), "tokenizer": tokenizer} if decoding.stop else {}
    out = loaded.model.generate(input_ids=ids, attention_mask=mask, generation_config=settings, **extra)[:, longest:]
    # A row that ended on a stop text is padded while the others of its batch go on.
    ends = {*stops, pad}
    return [_completion(loaded, row, decoding, stops=ends) for row in out.tolist()]


def _completion(loaded: LoadedModel, tokens: list[int], decoding: DecodingConfig, *, stops: set[int]) -> Completion:
    end = next((place for place, token in enumerate(tokens) if token in stops), None)
    kept = tokens if end is None else tokens[:end]
    text = loaded.tokenizer.decode(kept, skip_special_tokens=True)
    cuts = [text.find(stop) for stop in decoding.stop if stop in text]
    if cuts:
        text = text[: min(cuts)]
    return Completion(text, kept, "stop" if end is not None or cuts else "length")

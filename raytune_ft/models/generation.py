"""Batched generation of answers to prompts of mixed lengths.

Prompts are sorted by length and share batches by a token budget; a row that is done makes room for the next prompt
(`models.decoding`). The answers come back in the order of the prompts, and none depends on what shared its batch.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import xxhash

from raytune_ft.core.errors import RunError, first_line
from raytune_ft.models.adapter_slots import AdapterSlots
from raytune_ft.models.attention import OWN, attention
from raytune_ft.models.config import DecodingConfig
from raytune_ft.models.decoding import Decoder, Row
from raytune_ft.models.loading import LoadedModel
from raytune_ft.models.memory import TokenBudget, is_out_of_memory, release_memory
from raytune_ft.models.neighbours import generate_alone, why_answered_alone
from raytune_ft.models.scoring import context_tokens

logger = logging.getLogger("raytune_ft")


@dataclass(frozen=True)
class Completion:
    """An answer: its text without stop tokens, its token ids, why it ended, and by which token, if by one."""

    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length"]
    stop_token: int | None = None

    @property
    def said_ids(self) -> list[int]:
        """All that the model said: the tokens, and the one that ended the answer."""
        return self.token_ids if self.stop_token is None else [*self.token_ids, self.stop_token]


@torch.inference_mode()
def generate(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    decoding: DecodingConfig,
    *,
    token_budget: int | TokenBudget = 8192,
    seeds: Sequence[int] | None = None,
    on_answers: Callable[[Mapping[int, Completion]], None] | None = None,
    stop_ids: Sequence[int] | None = None,
    adapters: AdapterSlots | None = None,
    slots: Sequence[int] | None = None,
) -> list[Completion]:
    """Answers to `prompts`, in their order.

    An answer ends at a stop token or text, after `max_new_tokens`, or where the model's context ends. Where memory runs
    out, what is not answered yet is begun again in smaller batches, which changes no answer.

    Args:
        loaded: the model.
        prompts: token ids, each ending with the generation prompt.
        decoding: length, sampling and stop texts.
        token_budget: most tokens (prompt and answer, padding included) of one batch; a `TokenBudget` keeps in mind what
            memory had room for.
        seeds: of each prompt's own random stream; by default the settings' seed with the prompt's place.
        on_answers: told the answers, by the places of their prompts, as they come.
        stop_ids: tokens that end an answer; by default the chat's and the model's own. With none, every answer reaches
            its limit.
        adapters: upon the model, from which each prompt has its own.
        slots: of each prompt's adapter; 0 is the bare model, and the default.

    Raises:
        RunError: if memory does not hold a single prompt with its answer.
    """
    answers: dict[int, Completion] = {}
    seeds = seeds or [row_seed(decoding.seed, str(place)) for place in range(len(prompts))]
    budget = token_budget if isinstance(token_budget, TokenBudget) else TokenBudget(token_budget)
    asked = _Asked(prompts, seeds, slots or [0] * len(prompts))
    make_decoder = partial(Decoder, loaded, adapters, stop_ids=stop_ids)
    alone = _Alone(loaded, loaded.stop_ids if stop_ids is None else stop_ids, adapters)
    waiting = list(range(len(prompts)))
    with attention(loaded.model, OWN):
        while waiting:
            reason = None
            try:
                left = asked.only(waiting)
                for some in _found(loaded, left, decoding, budget.tokens, make_decoder=make_decoder, alone=alone):
                    found = {waiting[place]: answer for place, answer in some.items()}
                    answers |= found
                    if on_answers is not None:
                        on_answers(found)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason = first_line(error)
            waiting = [number for number in waiting if number not in answers]
            if waiting and reason is not None:
                _make_room(budget, asked.only(waiting), decoding, reason)
    return [answers[number] for number in range(len(prompts))]


def _make_room(budget: TokenBudget, left: _Asked, decoding: DecodingConfig, reason: str) -> None:
    shortest = min(map(len, left.prompts)) + decoding.max_new_tokens
    if not budget.halve(shortest):
        raise RunError(
            f"answers: memory does not hold one prompt with its answer ({reason}). Lower max_new_tokens, leave long "
            "prompts out, or take a quantized or smaller model"
        )
    release_memory()
    logger.warning(
        "answers: out of memory; the %d that are left are begun again with at most %d tokens at a time",
        len(left.prompts),
        budget.tokens,
    )


def row_seed(seed: int, row: str) -> int:
    """The seed of a row's own random stream: the same wherever, and with whatever, the row is answered."""
    return xxhash.xxh64_intdigest(f"{seed}:{row}".encode())


@dataclass(frozen=True)
class _Asked:
    """Prompts, and by their places the seed of each and the slot of its adapter."""

    prompts: Sequence[Sequence[int]]
    seeds: Sequence[int]
    slots: Sequence[int]

    def only(self, places: Sequence[int]) -> _Asked:
        """Those at some places."""
        prompts = [self.prompts[place] for place in places]
        return _Asked(prompts, [self.seeds[place] for place in places], [self.slots[place] for place in places])


def _found(
    loaded: LoadedModel,
    asked: _Asked,
    decoding: DecodingConfig,
    token_budget: int,
    *,
    make_decoder: Callable[[], Decoder],
    alone: _Alone,
) -> Iterator[dict[int, Completion]]:
    prompts, context = asked.prompts, context_tokens(loaded.model)
    room = [context - len(prompt) if context else decoding.max_new_tokens for prompt in prompts]
    limits = [max(1, min(decoding.max_new_tokens, left)) for left in room]
    lengths = [len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)]
    own = [
        decoding.model_copy(update={"max_new_tokens": limit, "seed": seed})
        for limit, seed in zip(limits, asked.seeds, strict=True)
    ]
    if why_answered_alone(loaded.model) is not None:
        for number, prompt in enumerate(prompts):
            yield {number: alone.answer(prompt, own[number], asked.slots[number])}
        return
    for wave, places in waves(lengths, token_budget):
        wave.sort(key=lambda number: -len(prompts[number]))
        decoder = make_decoder()

        def row(number: int, decoder: Decoder = decoder) -> Row:
            return decoder.new_row(loaded, prompts[number], own[number], whole=True, slot=asked.slots[number])

        yield from _refilled(decoder, wave, places, row)


def _refilled(
    decoder: Decoder, wave: Sequence[int], places: int, make_row: Callable[[int], Row]
) -> Iterator[dict[int, Completion]]:
    """Answers as they end; whenever a quarter of the places is free, the next rows join (Yu et al., 2022, Orca)."""
    waiting = deque(wave)
    numbers: dict[int, int] = {}
    while waiting or decoder.rows:
        free = places - len(decoder.rows)
        if waiting and 4 * free >= places:
            joining = []
            for _ in range(min(free, len(waiting))):
                row = make_row(number := waiting.popleft())
                numbers[id(row)] = number
                joining.append(row)
            decoder.join(joining)
            stepped = joining
        else:
            stepped = decoder.step()
        done = {
            numbers.pop(id(row)): Completion(row.stream.text, row.token_ids, row.finish_reason, row.stop_token)
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


@dataclass(frozen=True)
class _Alone:
    """Answers to one prompt at a time by transformers' own loop, for models that keep more than keys and values."""

    loaded: LoadedModel
    stop_ids: Sequence[int]
    adapters: AdapterSlots | None

    def answer(self, prompt: Sequence[int], decoding: DecodingConfig, slot: int) -> Completion:
        """The answer to a prompt, drawn by the settings' seed, with the adapter in a slot."""
        options: dict[str, Any] = {}
        if decoding.temperature > 0:
            options = {"do_sample": True, "temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0}
        if decoding.stop:
            options |= {"stop_strings": list(decoding.stop), "tokenizer": self.loaded.tokenizer}
        torch.manual_seed(decoding.seed)
        with self.adapters.rows([slot]) if self.adapters else nullcontext():
            out = generate_alone(self.loaded, prompt, self.stop_ids, decoding.max_new_tokens, **options)
        return self._completion(out[0, len(prompt) :].tolist(), decoding)

    def _completion(self, tokens: list[int], decoding: DecodingConfig) -> Completion:
        stopped = tokens[-1] if tokens and tokens[-1] in self.stop_ids else None
        kept = tokens if stopped is None else tokens[:-1]
        text = self.loaded.tokenizer.decode(kept, skip_special_tokens=True)
        cuts = [text.find(stop) for stop in decoding.stop if stop in text]
        if cuts:
            text = text[: min(cuts)]
        return Completion(text, kept, "stop" if stopped is not None or cuts else "length", stopped)

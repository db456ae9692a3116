"""Batched generation of answers to prompts of mixed lengths.

Prompts are sorted by length and share batches by a token budget; a row that is done makes room for the next prompt
(`models.refilling`). The answers come back in the order of the prompts, and none depends on what shared its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import xxhash

from raytune_ft.models.attention import attention
from raytune_ft.models.collate import group_by_budget
from raytune_ft.models.config import DecodingConfig
from raytune_ft.models.loading import LoadedModel
from raytune_ft.models.refilling import Job, decode, has_plain_cache
from raytune_ft.models.scoring import context_tokens
from raytune_ft.models.virtual import VirtualTokens


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
    """
    answers: dict[int, Completion] = {}
    seeds = seeds or [row_seed(decoding.seed, str(place)) for place in range(len(prompts))]
    with attention(loaded.model, "sdpa"):
        for found in _found(loaded, prompts, decoding, token_budget, seeds):
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
    token_budget: int,
    seeds: Sequence[int],
) -> Iterator[dict[int, Completion]]:
    context = context_tokens(loaded.model)
    room = [context - len(prompt) if context else decoding.max_new_tokens for prompt in prompts]
    limits = [max(1, min(decoding.max_new_tokens, left)) for left in room]
    lengths = [len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)]
    if VirtualTokens.of(loaded.model) is not None or not has_plain_cache(loaded.model):
        for group in group_by_budget(lengths, token_budget, padded=True):
            torch.manual_seed(seeds[group[0]])
            batch = _generate_batch(loaded, [prompts[number] for number in group], decoding)
            yield dict(zip(group, batch, strict=True))
        return
    for wave, slots in waves(lengths, token_budget):
        jobs = [Job(number, prompts[number], limits[number], seeds[number]) for number in wave]
        jobs.sort(key=lambda job: -len(job.prompt))
        answered = decode(loaded.model, loaded.tokenizer, jobs, decoding, stops=loaded.chat.stop_ids, slots=slots)
        for number, tokens in answered:
            yield {number: _completion(loaded, tokens, decoding, stops=set(loaded.chat.stop_ids))}


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
    virtual = VirtualTokens.of(loaded.model)
    if virtual is not None and virtual.kind == "PROMPT_TUNING":
        embeddings, mask = _behind_virtual(loaded.model, virtual, ids, mask)
        base = loaded.model.get_base_model()
        out = base.generate(inputs_embeds=embeddings, attention_mask=mask, generation_config=settings, **extra)
    else:
        out = loaded.model.generate(input_ids=ids, attention_mask=mask, generation_config=settings, **extra)
        out = out[:, longest:]
    # A row that ended on a stop text is padded while the others of its batch go on.
    ends = {*stops, pad}
    return [_completion(loaded, row, decoding, stops=ends) for row in out.tolist()]


def _behind_virtual(
    model: Any, virtual: VirtualTokens, ids: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """[prompts, longer, width] embeddings, padding first, then the virtual tokens, then the prompt; and their mask.

    PEFT itself puts them before the padding, and an answer then depends on how much of that its row has.
    """
    learned = virtual.embeddings()[0]
    tokens = model.get_input_embeddings()(ids)
    learned = learned.to(tokens.dtype)
    padding = (mask == 0).sum(dim=1).tolist()
    rows = [torch.cat([row[:count], learned, row[count:]]) for row, count in zip(tokens, padding, strict=True)]
    ones = mask.new_ones(len(ids), virtual.count)
    return torch.stack(rows), torch.cat([mask, ones], dim=1)


def _completion(loaded: LoadedModel, tokens: list[int], decoding: DecodingConfig, *, stops: set[int]) -> Completion:
    end = next((place for place, token in enumerate(tokens) if token in stops), None)
    kept = tokens if end is None else tokens[:end]
    text = loaded.tokenizer.decode(kept, skip_special_tokens=True)
    cuts = [text.find(stop) for stop in decoding.stop if stop in text]
    if cuts:
        text = text[: min(cuts)]
    return Completion(text, kept, "stop" if end is not None or cuts else "length")

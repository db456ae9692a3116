"""Batched generation of answers to prompts of mixed lengths.

Prompts are sorted by length and put into batches by a token budget, so that little is padded; the answers come back
in the order of the prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from raytune_ft.models.attention import attention
from raytune_ft.models.collate import group_by_budget
from raytune_ft.models.config import DecodingConfig
from raytune_ft.models.loading import LoadedModel
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
    on_batch: Callable[[int], None] | None = None,
) -> list[Completion]:
    """Answers to `prompts`, in their order.

    Args:
        loaded: the model.
        prompts: token ids, each ending with the generation prompt.
        decoding: length, sampling and stop texts.
        token_budget: most tokens (prompt and answer, padding included) of one batch.
        on_batch: told the number of answers after each batch.
    """
    answers: dict[int, Completion] = {}
    lengths = [len(prompt) + decoding.max_new_tokens for prompt in prompts]
    if decoding.temperature > 0:
        torch.manual_seed(decoding.seed)
    with attention(loaded.model, "sdpa"):
        for group in group_by_budget(lengths, token_budget, padded=True):
            batch = _generate_batch(loaded, [prompts[number] for number in group], decoding)
            answers.update(zip(group, batch, strict=True))
            if on_batch is not None:
                on_batch(len(group))
    return [answers[number] for number in range(len(prompts))]


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
    return [_completion(loaded, row, decoding) for row in out.tolist()]


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


def _completion(loaded: LoadedModel, tokens: list[int], decoding: DecodingConfig) -> Completion:
    # A row that ended on a stop text is padded while the others of its batch go on.
    stops = {*loaded.chat.stop_ids, loaded.tokenizer.pad_token_id}
    end = next((place for place, token in enumerate(tokens) if token in stops), None)
    kept = tokens if end is None else tokens[:end]
    text = loaded.tokenizer.decode(kept, skip_special_tokens=True)
    cuts = [text.find(stop) for stop in decoding.stop if stop in text]
    if cuts:
        text = text[: min(cuts)]
    return Completion(text, kept, "stop" if end is not None or cuts else "length")

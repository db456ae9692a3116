"""What answers requests: a model in this process that takes a batch of mixed requests and gives each its own answer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from raytune_ft.core.records import Message
from raytune_ft.models.config import DecodingConfig, Precision
from raytune_ft.models.generation import Completion, generate
from raytune_ft.models.loading import LoadedModel, load_model
from raytune_ft.models.virtual import VirtualTokens


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt's token ids (they end with the generation prompt), and how its answer is decoded.

    `seeded` says that the seed is the client's: the answer must then be the same in any company.
    """

    prompt_ids: tuple[int, ...]
    decoding: DecodingConfig
    seeded: bool = False


class TransformersEngine:
    """Anything that `transformers` and `peft` load: full precision, bitsandbytes, adapters, pruned folders."""

    def __init__(self, loaded: LoadedModel, *, num_threads: int = 1) -> None:
        import torch

        torch.set_num_threads(num_threads)
        # bitsandbytes' int8 layers warn at each call that they cast their input to fp16
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        self.loaded = loaded

    @classmethod
    def load(
        cls, reference: str, *, precision: Precision = Precision.AUTO, device: str | None = None, num_threads: int = 1
    ) -> Self:
        """The engine for a model reference.

        Raises:
            ModelError: if the model cannot be loaded.
        """
        return cls(load_model(reference, precision=precision, device=device), num_threads=num_threads)

    @property
    def context_tokens(self) -> int | None:
        """Most tokens of prompt and answer together; None where the model names no limit."""
        limit = getattr(self.loaded.model.config, "max_position_embeddings", None)
        virtual = VirtualTokens.of(self.loaded.model)
        return int(limit) - (virtual.count if virtual else 0) if limit else None

    def prompt_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """The conversation through the chat template, as in training.

        Raises:
            DataError: if the template refuses the conversation.
        """
        return tuple(self.loaded.chat.prompt_ids(messages))

    def answer(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        """One answer a request, in order; what can be decoded together is one padded batch."""
        answers: dict[int, Completion] = {}
        for places in batches(requests):
            group = [requests[place] for place in places]
            longest = max(request.decoding.max_new_tokens for request in group)
            decoding = group[0].decoding.with_overrides(max_new_tokens=longest)
            prompts = [request.prompt_ids for request in group]
            budget = len(prompts) * (max(map(len, prompts)) + longest)
            found = generate(self.loaded, prompts, decoding, token_budget=budget)
            for place, request, completion in zip(places, group, found, strict=True):
                answers[place] = self._shortened(completion, request.decoding)
        return [answers[place] for place in range(len(requests))]

    def _shortened(self, completion: Completion, decoding: DecodingConfig) -> Completion:
        """The completion as it would be with this request's own token limit instead of its batch's."""
        limit = decoding.max_new_tokens
        if len(completion.token_ids) < limit:
            return completion
        ids = completion.token_ids[:limit]
        text = self.loaded.tokenizer.decode(ids, skip_special_tokens=True)
        cuts = [text.find(stop) for stop in decoding.stop if stop in text]
        return Completion(text[: min(cuts)] if cuts else text, ids, "stop" if cuts else "length")


def batches(requests: Sequence[GenerationRequest]) -> list[list[int]]:
    """Places of the requests that are decoded together.

    Greedy ones share a batch whatever their seeds; sampled ones share it (and its random stream) if they sample alike
    and did not ask for a seed; a seeded one is alone, since its answer may not depend on its neighbours.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for place, request in enumerate(requests):
        decoding = request.decoding
        key: tuple[object, ...] = (decoding.stop,)
        if decoding.temperature > 0:
            key += (decoding.temperature, decoding.top_p, place if request.seeded else None)
        groups.setdefault(key, []).append(place)
    return list(groups.values())

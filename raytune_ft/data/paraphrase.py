"""Paraphrases that a model writes: kept only when close in meaning, different in words, and with the same numbers."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from raytune_ft.core.records import Message
from raytune_ft.data.config_augmentation import AugmentationConfig
from raytune_ft.models.config import DecodingConfig, Precision
from raytune_ft.models.embedding import load_embedder
from raytune_ft.models.generation import Completion, generate
from raytune_ft.models.loading import LoadedModel, load_model

_REQUESTS = (
    "Rewrite the text below in other words. Keep its meaning, every name and every number. Reply with the rewritten "
    "text only.\n\n{}",
    "Say the following differently, so that it asks for exactly the same. Answer with the new wording only.\n\n{}",
    "Paraphrase this request without changing what is asked. Give nothing but the paraphrase.\n\n{}",
)
_WORD = re.compile(r"\w+")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


@dataclass(frozen=True)
class Paraphrase:
    """A text in other words, or why what the model wrote was not taken."""

    text: str | None = None
    reason: str | None = None


def paraphrase(
    texts: Sequence[str], requests: Sequence[int], model: str, embedder: str, config: AugmentationConfig
) -> list[Paraphrase]:
    """A paraphrase of each text, judged.

    The model decodes greedily in full precision, so that what it writes does not depend on what shares its batch.

    Args:
        texts: what to say in other words.
        requests: for each, a number that chooses how the model is asked.
        model: reference of the model that writes.
        embedder: reference of the model that tells closeness in meaning.
        config: how close and how different.
    """
    if not texts:
        return []
    loaded = _model(model)
    asked = [_REQUESTS[number % len(_REQUESTS)].format(text) for text, number in zip(texts, requests, strict=True)]
    prompts = [loaded.chat.prompt_ids([Message("user", text)]) for text in asked]
    written = generate(loaded, prompts, DecodingConfig(max_new_tokens=config.max_new_tokens))
    candidates = [_unquoted(completion.text, text) for completion, text in zip(written, texts, strict=True)]
    vectors = load_embedder(embedder).embed([*texts, *candidates]).vectors
    cosines = (vectors[: len(texts)] * vectors[len(texts) :]).sum(1).tolist()
    return [
        judged(text, candidate, cosine, completion, config)
        for text, candidate, cosine, completion in zip(texts, candidates, cosines, written, strict=True)
    ]


def judged(text: str, candidate: str, cosine: float, completion: Completion, config: AugmentationConfig) -> Paraphrase:
    """The candidate as a paraphrase of `text`, or the first reason against it."""
    if completion.finish_reason == "length":
        return Paraphrase(reason="cut off at max_new_tokens")
    if not candidate:
        return Paraphrase(reason="empty")
    if Counter(_NUMBER.findall(text)) != Counter(_NUMBER.findall(candidate)):
        return Paraphrase(reason="other numbers")
    if cosine < config.min_similarity:
        return Paraphrase(reason="far in meaning")
    if word_overlap(text, candidate) > config.max_overlap:
        return Paraphrase(reason="nearly the same words")
    return Paraphrase(candidate)


def word_overlap(one: str, other: str) -> float:
    """Jaccard similarity of the sets of words of two texts, case aside; 1 where neither has any."""
    words, others = (set(_WORD.findall(text.lower())) for text in (one, other))
    return len(words & others) / len(words | others) if words | others else 1.0


def _unquoted(written: str, text: str) -> str:
    """What a model wrote, without the quotation marks that models like to put around it."""
    written = written.strip()
    if len(written) > 1 and written[0] + written[-1] in {'""', "“”"} and text.strip()[:1] != written[0]:
        return written[1:-1].strip()
    return written


@functools.lru_cache(maxsize=1)
def _model(reference: str) -> LoadedModel:
    return load_model(reference, precision=Precision.FP32)

"""What a reward model gives the answers: the models' own, once all of them have answered."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from raytune_ft.core.errors import DataError
from raytune_ft.core.grammar import number_of
from raytune_ft.core.records import Message, Record
from raytune_ft.core.storage import Location
from raytune_ft.evaluation.inference import over_on_worker
from raytune_ft.evaluation.results import ModelScores, on_disk
from raytune_ft.models.chat import Chat
from raytune_ft.models.config import Precision
from raytune_ft.models.references import shared_model

logger = logging.getLogger("raytune_ft")


@dataclass(frozen=True)
class Judged:
    """A prompt and an answer to it, which was cut off or ended."""

    prompt: tuple[Message, ...]
    answer: str
    cut_off: bool = False
    tools: str | None = None


_CHUNK = 1024
"""Answers that are sent, and judged, at a time."""


def rewarded(
    models: Sequence[ModelScores], records: Sequence[Record], reward_model: str, precision: Precision, storage: Location
) -> list[ModelScores]:
    """The models with a reward for each of their answers.

    Args:
        models: with their answers to `records`, in this order.
        records: what was asked.
        reward_model: folder, artifact, URI or hub id.
        precision: of its weights.
        storage: where the nodes find what lies in this machine's cache.

    Raises:
        DataError: if a conversation is longer than the reward model's context, or a reward is no number.
        ModelError: if the reward model cannot be loaded.
    """
    asked = (
        Judged(record.prompt, answer.answer or "", answer.finish_reason == "length", record.tools)
        for model in models
        for record, answer in zip(records, model.answers, strict=True)
    )
    judged = number_of(len(models) * len(records), "answer is", "answers are")
    logger.info("Evaluation: %s judged by the reward model %s", judged, reward_model)
    chunks = iter(lambda: list(itertools.islice(asked, _CHUNK)), [])
    given = iter(over_on_worker(rewards_of, shared_model(reward_model, storage), precision, chunks=chunks))
    return [
        replace(model, answers=on_disk(replace(answer, reward=next(given)) for answer in model.answers))
        for model in models
    ]


def rewards_of(reward_model: str, precision: Precision, chunks: Iterable[Sequence[Judged]]) -> list[float]:
    """The reward of each answer, in order; run where the weights are to be loaded.

    Raises:
        DataError: see `rewarded`.
        ModelError: if the model cannot be loaded.
    """
    import torch

    from raytune_ft.core.cluster import usable_cpus
    from raytune_ft.models.rewarding import load_reward_model, rewards
    from raytune_ft.models.scoring import context_tokens

    torch.set_num_threads(usable_cpus())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = load_reward_model(reward_model, precision=precision, device=device)
    context = context_tokens(loaded.model)
    found: list[float] = []
    for judged in chunks:
        rows = [conversation_ids(loaded.chat, one) for one in judged]
        longest = max(map(len, rows), default=0)
        if context is not None and longest > context:
            raise DataError(
                f"reward: a prompt with its answer has {longest} tokens, and the reward model {reward_model} takes "
                f"{context}; leave long rows out, lower decoding.max_new_tokens, or give another reward model"
            )
        found += rewards(loaded, rows)
    bad = [reward for reward in found if not math.isfinite(reward)]
    if bad:
        raise DataError(f"reward: {len(bad)} of {len(found)} rewards are no numbers; check {reward_model} for NaN")
    return found


def conversation_ids(chat: Chat, judged: Judged) -> list[int]:
    """Token ids of prompt and answer as the template writes them; a cut-off answer is without what would end it."""
    messages = (*judged.prompt, Message("assistant", judged.answer))
    ids: list[int] = list(
        chat.tokenizer(chat.render(messages, tools=judged.tools), add_special_tokens=False)["input_ids"]
    )
    if judged.cut_off:
        last = max((place for place, token in enumerate(ids) if token in chat.stop_ids), default=len(ids))
        return ids[:last]
    return ids

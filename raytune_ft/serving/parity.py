"""Whether an engine answers as the trained model did, by the golden answers that lie beside the model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from raytune_ft.core.errors import DataError, ModelError
from raytune_ft.core.records import Message
from raytune_ft.models.chat import Chat
from raytune_ft.models.config import DecodingConfig
from raytune_ft.models.golden import GOLDEN, GoldenAnswer, read_golden
from raytune_ft.models.layout import LayoutMaker
from raytune_ft.models.references import ModelReference
from raytune_ft.serving.engines import TransformersEngine
from raytune_ft.serving.tickets import GenerationRequest

_DAYS = 10 * 366
"""How old golden answers may be whose prompts have the date in them."""


def golden_folder(reference: ModelReference) -> Path | None:
    """The folder that a model's golden answers would lie in: its adapter's, or its own, if it is a folder."""
    folder = reference.adapter or Path(reference.base)
    return folder if folder.is_dir() else None


def check_parity(engine: TransformersEngine, folder: Path, tolerance: float, *, adapter: str | None = None) -> float:
    """Replays a folder's golden answers through `engine`; the mean difference of log-probabilities, in nats.

    Without golden answers it is 0.

    Raises:
        ModelError: if the prompts have other tokens, or the difference is above `tolerance`.
    """
    golden = read_golden(folder)
    if golden is None:
        return 0.0
    for place, answer in enumerate(golden.answers, start=1):
        _check_prompt(engine.chat(adapter), answer, f"{folder / GOLDEN}: answer {place}")
    differences: list[float] = []

    def replay() -> None:
        differences.extend(asyncio.run(_replayed(engine, golden.answers, adapter)))

    # In a thread of its own, with its own event loop: the caller's may be the one that is starting this server.
    thread = threading.Thread(target=replay)
    thread.start()
    thread.join()
    if not differences:
        raise ModelError(f"{folder / GOLDEN}: the golden answers could not be replayed")
    mean = sum(differences) / len(differences)
    if not mean <= tolerance:
        raise ModelError(
            f"{folder / GOLDEN}: the served model gives the trained model's answers other probabilities: the logs "
            f"differ by {mean:.2f} nats on average, and golden_tolerance is {tolerance:g}. Its weights are damaged, or "
            "quantized too coarsely."
        )
    return mean


def _check_prompt(chat: Chat, answer: GoldenAnswer, where: str) -> None:
    messages = [Message(turn.role, turn.content) for turn in answer.messages]
    if not messages and not answer.text:
        return
    try:
        ids = chat.prompt_ids(messages) if messages else _ids(chat, answer.text)
        same = ids == answer.prompt_ids or (bool(messages) and _is_of_another_day(chat, messages, answer.prompt_ids))
    except DataError as error:
        raise ModelError(f"{where}: {error}; the folder has another chat template than in training") from None
    if not same:
        raise ModelError(
            f"{where}: the prompt has other tokens than in training ({len(ids)} instead of {len(answer.prompt_ids)}): "
            "the folder has another chat template or tokenizer"
        )


def _ids(chat: Chat, text: str) -> list[int]:
    return list(chat.tokenizer(text, add_special_tokens=False)["input_ids"])


def _is_of_another_day(chat: Chat, messages: Sequence[Message], recorded: Sequence[int]) -> bool:
    """Whether the template writes the date, and wrote the recorded prompt on some day of the last years."""
    asked = False
    day = datetime.now()

    def strftime_now(form: str) -> str:
        nonlocal asked
        asked = True
        return day.strftime(form)

    names: Any = {**chat.tokenizer.special_tokens_map, "strftime_now": strftime_now}
    maker = LayoutMaker(chat.tokenizer.get_chat_template(), names)
    for back in range(-1, _DAYS):  # from tomorrow on, where another time zone may have trained
        day = datetime.now() - timedelta(days=back)
        if _ids(chat, maker.render(messages, add_generation_prompt=True)) == recorded:
            return True
        if not asked:
            return False
    return False


async def _replayed(engine: TransformersEngine, answers: list[GoldenAnswer], adapter: str | None) -> list[float]:
    differences: list[float] = []
    for answer in answers:
        ids = [*answer.prompt_ids, *answer.token_ids]
        request = GenerationRequest(ids, DecodingConfig(max_new_tokens=1), adapter, top_logprobs=0, echo=True)
        (progress,) = await engine.answer(request)
        if progress.error is not None:
            raise progress.error
        served = progress.prompt_logprobs[len(answer.prompt_ids) - 1 :]
        differences += [abs(entry.logprob - wanted) for entry, wanted in zip(served, answer.logprobs, strict=True)]
    return differences

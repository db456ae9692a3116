"""Golden answers of a trained model: what it says to a greeting and to the first validation rows.

They lie beside the weights, and a server replays them before it serves.
"""

from __future__ import annotations

import logging
from typing import Any

from raytune_ft.core.errors import DataError
from raytune_ft.core.records import Message
from raytune_ft.models.attention import OWN, attention
from raytune_ft.models.chat import Chat
from raytune_ft.models.golden import Golden, golden_answers, golden_continuations
from raytune_ft.models.loading import LoadedModel
from raytune_ft.models.references import resolve_model
from raytune_ft.training.answers import Question
from raytune_ft.training.batches import TokenRows
from raytune_ft.training.config import FineTuningConfig

logger = logging.getLogger("raytune_ft")

_ROWS, _TOKENS = 2, 16
_GREETING = (Message("user", "Hello"),)
"""Goes through the chat template, which the rows have behind them already."""


def golden_of(
    model: Any, tokenizer: Any, config: FineTuningConfig, validation: TokenRows | None, device: str
) -> Golden | None:
    """The trained model's answers; None if there is nothing to ask.

    `model` holds its final weights, whole, on `device`.
    """
    loaded = LoadedModel(model, tokenizer, Chat(tokenizer), resolve_model(config.model_path), device)
    rows = [validation[number] for number in range(min(_ROWS, len(validation)))] if validation is not None else []
    prompts = [question.prompt for row in rows if (question := Question.of(row)) is not None]
    model.eval()
    with attention(model, OWN):
        answers = golden_continuations(loaded, prompts, max_new_tokens=_TOKENS) if prompts else []
        try:
            answers += golden_answers(loaded, [_GREETING], max_new_tokens=_TOKENS).answers
        except DataError as error:
            logger.info("golden answers: none to a greeting, which the chat template refuses (%s)", error)
    return Golden(answers=answers) if answers else None

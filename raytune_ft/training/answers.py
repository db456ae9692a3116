"""Answers to validation rows while training goes on: what the model generates, measured against the row's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from raytune_ft.core.errors import DataError
from raytune_ft.models.chat import Chat, Encoded
from raytune_ft.models.config import DecodingConfig
from raytune_ft.models.generation import generate
from raytune_ft.models.loading import LoadedModel, resolve_model
from raytune_ft.training.batches import TokenRows
from raytune_ft.training.config import FineTuningConfig
from raytune_ft.training.engine import Trainee
from raytune_ft.training.loop import Learner, Metrics
from raytune_ft.training.peers import Peers

_MORE_TOKENS = 8
"""How much longer than the longest reference an answer may get before it is cut."""


@dataclass(frozen=True)
class Question:
    """What stands before a row's last answer, and that answer with the tokens that end it."""

    prompt: list[int]
    answer: list[int]

    @classmethod
    def of(cls, row: Encoded) -> Question | None:
        """The question of a row; None if nothing stands before its last run of supervised tokens."""
        last = max((place for place, kept in enumerate(row.supervised) if kept), default=-1)
        first = last
        while first > 0 and row.supervised[first - 1]:
            first -= 1
        return cls(row.input_ids[:first], row.input_ids[first : last + 1]) if first > 0 else None


class AnswerCheck:
    """A metric of generated answers to the first rows of the validation split, shared by all ranks."""

    def __init__(self, model: Any, tokenizer: Any, config: FineTuningConfig, rows: Sequence[Encoded], peers: Peers):
        from raytune_ft.evaluation.metrics import METRICS  # only a run that asks for one waits for metrics to load

        found = [Question.of(row) for row in rows]
        questions = [question for question in found if question is not None]
        if not questions:
            raise DataError("eval_generation_rows: no validation row has anything to answer; set it to 0")
        self._name = config.eval_generation_metric
        self._metric, self._peers = METRICS[self._name](), peers
        self._texts = [str(tokenizer.decode(q.answer, skip_special_tokens=True)).strip() for q in questions]
        self._metric.check(self._texts)
        self._questions = questions
        longest = max(len(question.answer) for question in questions)
        self._decoding = DecodingConfig(max_new_tokens=longest + _MORE_TOKENS)
        reference = resolve_model(config.model_path)
        self._loaded = LoadedModel(model, tokenizer, Chat(tokenizer), reference, peers.device)

    def measure(self) -> Metrics:
        """``eval_<metric>`` over all rows; under several ranks each answers a share, and all call it."""
        numbers = range(self._peers.rank, len(self._questions), self._peers.world_size)
        chosen = list(numbers) or [0]  # a rank without rows still has to know what is added up
        self._loaded.model.eval()
        answers = generate(self._loaded, [self._questions[number].prompt for number in chosen], self._decoding)
        self._loaded.model.train()
        columns = self._metric.columns(
            predictions=[answer.text for answer in answers], references=[self._texts[number] for number in chosen]
        )
        sums = torch.tensor([float(np.sum(column)) for column in columns.values()], dtype=torch.float64)
        totals = self._peers.total(sums if numbers else torch.zeros_like(sums))
        values = self._metric.values(
            {name: np.asarray(total) for name, total in zip(columns, totals.tolist(), strict=True)}
        )
        return {f"eval_{self._name}": float(values[self._name.facts.headline])}


@dataclass
class AnsweringLearner:
    """A learner whose evaluation also measures generated answers."""

    learner: Learner
    answers: AnswerCheck

    @classmethod
    def beside(
        cls, learner: Learner, trainee: Trainee, config: FineTuningConfig, validation: TokenRows | None, peers: Peers
    ) -> Learner:
        """The learner itself, if no answers are wanted."""
        count = min(config.eval_generation_rows, 0 if validation is None else len(validation))
        if validation is None or not count:
            return learner
        rows = [validation[number] for number in range(count)]
        return cls(learner, AnswerCheck(trainee.model, trainee.tokenizer, config, rows, peers))

    def step(self, batch: Any, step: int) -> Metrics:
        """The learner's own step."""
        return self.learner.step(batch, step)

    def evaluate(self) -> Metrics:
        """The learner's evaluation, with the answers' metric."""
        return {**self.learner.evaluate(), **self.answers.measure()}

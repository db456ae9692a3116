"""Answers to validation rows while training goes on: what the model generates, measured against the row's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from raytune_ft.core.errors import DataError
from raytune_ft.core.grammar import number_of
from raytune_ft.models.adapter_slots import AdapterSlots
from raytune_ft.models.chat import Chat, Encoded
from raytune_ft.models.config import DecodingConfig
from raytune_ft.models.generation import generate
from raytune_ft.models.loading import LoadedModel
from raytune_ft.models.references import resolve_model
from raytune_ft.training.batches import Rows
from raytune_ft.training.config import FineTuningConfig
from raytune_ft.training.loop import Learner, Metrics
from raytune_ft.training.peers import Peers

_MORE_TOKENS = 8
"""How much longer than the longest reference an answer may get before it is cut."""


@dataclass(frozen=True)
class Question:
    """What stands before a row's last answer, and that answer with the tokens that end it.

    Where a row asks and does not answer, the answer is empty; `reference` is then what would be right, if it is known.
    """

    prompt: list[int]
    answer: list[int]
    reference: str | None = None

    @classmethod
    def of(cls, row: Encoded) -> Question | None:
        """The question of a row; None if nothing stands before its last run of supervised tokens."""
        last = max((place for place, kept in enumerate(row.supervised) if kept), default=None)
        if last is None:
            return cls(row.input_ids, []) if row.input_ids else None
        first = last
        while first > 0 and row.supervised[first - 1]:
            first -= 1
        return cls(row.input_ids[:first], row.input_ids[first : last + 1]) if first > 0 else None


class AnswerCheck:
    """A metric of generated answers to the first rows of the validation split."""

    def __init__(self, loaded: LoadedModel, config: FineTuningConfig, rows: Sequence[Encoded]) -> None:
        """Prepares the questions of `rows`.

        Raises:
            DataError: if no row has anything to answer, or the metric does not fit the rows' own answers.
        """
        from raytune_ft.evaluation.metrics import make_metric  # only a run that asks for one waits for metrics to load

        found = [Question.of(row) for row in rows]
        self._questions = [question for question in found if question is not None]
        if not self._questions:
            raise DataError("eval_generation_rows: no validation row has anything to answer; set it to 0")
        self.shortfall: str | None = None  # in words, if fewer rows are answered than were asked for
        self._loaded, self._name = loaded, config.eval_generation_metric
        self._metric = make_metric(self._name, config.resolved())
        decode = loaded.tokenizer.decode
        self._texts = [str(decode(q.answer, skip_special_tokens=True)).strip() for q in self._questions]
        self._metric.check(self._texts)
        longest = max(len(question.answer) for question in self._questions)
        self._decoding = DecodingConfig(max_new_tokens=longest + _MORE_TOKENS)

    @classmethod
    def wanted(
        cls, config: FineTuningConfig, validation: Rows | None, model: Any, tokenizer: Any, device: str
    ) -> AnswerCheck | None:
        """The check that the settings ask for; None where they ask for none, or nothing is evaluated.

        Raises:
            DataError: see above.
        """
        count = min(config.eval_generation_rows, 0 if validation is None else len(validation))
        if validation is None or not count:
            return None
        loaded = LoadedModel(model, tokenizer, Chat(tokenizer), resolve_model(config.model_path), device)
        made = cls(loaded, config, [validation[number] for number in range(count)])
        if len(made) < config.eval_generation_rows:
            made.shortfall = (
                f"eval_generation_rows: {config.eval_generation_rows} asked for, {len(made)} answered: of "
                f"{number_of(len(validation), 'validation row')}, "
                f"{number_of(count - len(made), 'has', 'have')} nothing to answer"
            )
        return made

    def __len__(self) -> int:
        """Rows that are answered."""
        return len(self._questions)

    def measure(self, peers: Peers) -> Metrics:
        """``eval_<metric>`` over all rows; under several ranks each answers a share, and all call it."""
        mine = range(peers.rank, len(self._questions), peers.world_size)
        (answers,) = self._answers([mine], None)
        sums = self._sums(dict(zip(mine, answers, strict=True)))
        totals = peers.total(torch.tensor(list(sums.values()), dtype=torch.float64)).tolist()
        return self._value(dict(zip(sums, totals, strict=True)))

    def measure_each(self, adapters: AdapterSlots, slots: Sequence[int], *, token_budget: int) -> list[Metrics]:
        """As `measure`, of each of several adapters upon the model; all of them answer in one batch."""
        every = range(len(self._questions))
        answered = self._answers([every for _ in slots], adapters, slots=slots, token_budget=token_budget)
        return [self._value(self._sums(dict(enumerate(answers)))) for answers in answered]

    def _answers(
        self, asked: Sequence[range], adapters: AdapterSlots | None, *, slots: Sequence[int] = (0,), **options: Any
    ) -> list[list[str]]:
        """For each slot the answers to the questions that it is asked."""
        prompts = [self._questions[number].prompt for numbers in asked for number in numbers]
        of_rows = [slot for slot, numbers in zip(slots, asked, strict=True) for _ in numbers]
        model = self._loaded.model
        model.eval()
        try:
            answers = iter(generate(self._loaded, prompts, self._decoding, adapters=adapters, slots=of_rows, **options))
        finally:
            model.train()
        return [[next(answers).text for _ in numbers] for numbers in asked]

    def _sums(self, answers: Mapping[int, str]) -> dict[str, float]:
        """The metric's columns, added up over the questions that were answered here."""
        # Which columns there are depends on all references, so all ranks and adapters have the same.
        texts = [answers.get(number, "") for number in range(len(self._questions))]
        columns = self._metric.columns(predictions=texts, references=self._texts)
        return {name: float(np.sum(column[list(answers)])) for name, column in columns.items()}

    def _value(self, sums: Mapping[str, float]) -> Metrics:
        values = self._metric.values({name: np.asarray(total) for name, total in sums.items()})
        return {f"eval_{self._name}": float(values[self._name.facts.headline])}


@dataclass
class AnsweringLearner:
    """A learner whose evaluation also measures generated answers."""

    learner: Learner
    answers: AnswerCheck
    peers: Peers

    def step(self, batch: Any, step: int) -> Metrics:
        """The learner's own step."""
        return self.learner.step(batch, step)

    def evaluate(self) -> Metrics:
        """The learner's evaluation, with the answers' metric."""
        return {**self.learner.evaluate(), **self.answers.measure(self.peers)}

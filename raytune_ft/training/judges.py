"""Who rewards an answer: a metric, by the row's own answer, or a reward model, by what people preferred."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from raytune_ft.core.errors import DataError, ModelError
from raytune_ft.models.chat import Chat
from raytune_ft.models.generation import Completion
from raytune_ft.models.loading import load_tokenizer
from raytune_ft.models.rewarding import load_reward_model, rewards
from raytune_ft.training.answers import Question
from raytune_ft.training.batches import PromptRows, TokenRows
from raytune_ft.training.config_alignment import ReinforcementConfig


class Judge(Protocol):
    """Gives a reward to each of several answers; higher is better."""

    def rewards(self, questions: Sequence[Question], answers: Sequence[Completion]) -> list[float]:
        """One number for each question and its answer."""


class MetricJudge:
    """Each answer's metric, by the row's own answer or reference; where lower is better, with its sign turned."""

    def __init__(self, config: ReinforcementConfig, chat: Chat) -> None:
        from raytune_ft.evaluation.metrics import make_metric  # only a run that asks for one waits for metrics to load

        assert config.reward_metric is not None
        self._metric = make_metric(config.reward_metric, config.resolved())
        self._sign = -1.0 if config.reward_metric.facts.lower_is_better else 1.0
        self._tokenizer = chat.tokenizer

    def rewards(self, questions: Sequence[Question], answers: Sequence[Completion]) -> list[float]:
        """The metric of each answer.

        Raises:
            DataError: if it does not fit a row's own answer.
        """
        references = [_right(self._tokenizer, question) for question in questions]
        self._metric.check_each(references)
        columns = self._metric.columns(predictions=[answer.text for answer in answers], references=references)
        return [self._sign * float(score) for score in self._metric.row_scores(columns)]


def refuse_misfits(splits: Mapping[str, TokenRows], config: ReinforcementConfig, tokenizer: Any) -> None:
    """Checks that the metric can measure by every row's own answer or reference, a part of the rows at a time.

    Raises:
        DataError: with the split and the number of the first row that does not fit.
    """
    if config.reward_metric is None:
        return
    from raytune_ft.evaluation.metrics import make_metric
    from raytune_ft.evaluation.row_metric import RowMetric

    metric = make_metric(config.reward_metric, config.resolved())
    if type(metric).misfit is RowMetric.misfit and type(metric).check is RowMetric.check:
        return  # whatever a reference is
    for split, rows in splits.items():
        if not isinstance(rows, PromptRows):
            continue
        try:
            metric.check(_references(rows, tokenizer))
        except DataError as error:
            raise DataError(f"{config.dataset_path}: {split} split: {error}") from None


def _references(rows: PromptRows, tokenizer: Any) -> Iterator[str]:
    for numbers in rows.parts():
        for row, reference in rows.read(numbers):
            question = Question.of(row) or Question([], [])
            yield _right(tokenizer, question if question.answer else replace(question, reference=reference))


def _right(tokenizer: Any, question: Question) -> str:
    """What a row's metric compares with: its reference, else its own answer."""
    if question.reference is not None:
        return question.reference
    return str(tokenizer.decode(question.answer, skip_special_tokens=True)).strip()


class ModelJudge:
    """A reward model's score of the whole conversation, as the chat template writes it."""

    def __init__(self, config: ReinforcementConfig, chat: Chat, device: str) -> None:
        """Loads the model.

        Raises:
            ModelError: if it is no reward model, or reads other tokens than the model writes.
        """
        assert config.reward_model_path is not None
        if load_tokenizer(config.reward_model_path).get_vocab() != chat.tokenizer.get_vocab():
            raise ModelError(
                f"reward_model_path: {config.reward_model_path} has other tokens than {config.model_path}; train a "
                "reward model upon a base of the same family (`raytune-ft reward`)"
            )
        self._loaded = load_reward_model(config.reward_model_path, precision=config.precision, device=device)
        self._tail = list(chat.tail_ids)

    def rewards(self, questions: Sequence[Question], answers: Sequence[Completion]) -> list[float]:
        """The scores; an answer that was cut off is judged as it is."""
        rows = [
            [*question.prompt, *answer.said_ids, *(self._tail if answer.stop_token is not None else [])]
            for question, answer in zip(questions, answers, strict=True)
        ]
        return rewards(self._loaded, rows)


def make_judge(config: ReinforcementConfig, chat: Chat, device: str) -> Judge:
    """The judge that the settings ask for."""
    return MetricJudge(config, chat) if config.reward_metric is not None else ModelJudge(config, chat, device)

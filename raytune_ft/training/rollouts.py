"""Answers of the model as it is now, judged, and laid out as batches that it learns from.

An answer is a function of (seed, step, row, number): the same on any rank, and after a restart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from raytune_ft.core.errors import DataError
from raytune_ft.models.attention import SEGMENTS, use_attention
from raytune_ft.models.chat import Chat, Encoded
from raytune_ft.models.collate import group_by_budget, pack
from raytune_ft.models.config import DecodingConfig
from raytune_ft.models.generation import Completion, generate, row_seed
from raytune_ft.models.loading import LoadedModel, load_model
from raytune_ft.models.memory import TokenBudget
from raytune_ft.models.references import resolve_model
from raytune_ft.models.scoring import CausalParts, target_losses
from raytune_ft.training.answers import Question
from raytune_ft.training.batches import PromptRows, Rows, rank_share, step_rows
from raytune_ft.training.config_alignment import ReinforcementConfig
from raytune_ft.training.judges import make_judge
from raytune_ft.training.loop import Learner, Metrics
from raytune_ft.training.peers import Peers
from raytune_ft.training.policy import RolloutBatch, advantages_of

_SAMPLING = 1.0
"""Temperature: answers are drawn from the distribution that is trained."""


@dataclass(frozen=True)
class StepPrompts:
    """Row numbers of this rank's prompts in a step, by micro-batch; where there are none, `any_row` stands in."""

    shares: list[list[int]]
    any_row: int


def prompt_steps(
    rows: int, config: ReinforcementConfig, *, start: int, peers: Peers, micro_batches: int
) -> Iterator[StepPrompts]:
    """The prompts of one rank for each step after `start`, without end; all ranks have as many micro-batches."""
    for numbers in step_rows(rows, config.global_batch_size, config.seed, start=start):
        yield StepPrompts(rank_share(numbers, peers.rank, peers.world_size, micro_batches), numbers[0])


class Rollouts:
    """Makes and judges answers to rows of a split by the model that is trained."""

    def __init__(self, model: Any, tokenizer: Any, config: ReinforcementConfig, peers: Peers) -> None:
        """Loads the judge, and the reference if one is asked for.

        Raises:
            ModelError: if one of them cannot be loaded, or does not fit.
        """
        self._config, self._peers, self._model = config, peers, model
        self._loaded = LoadedModel(model, tokenizer, Chat(tokenizer), resolve_model(config.model_path), peers.device)
        self._budget = TokenBudget()
        self._judge = make_judge(config, self._loaded.chat, peers.device)
        self._reference = _reference_of(model, config, peers.device) if config.beta else None

    def made(self, rows: Rows, asked: StepPrompts, step: int) -> tuple[list[RolloutBatch], Metrics]:
        """A step's batches, and what all ranks' answers amount to.

        Args:
            rows: the training split.
            asked: this rank's prompts.
            step: number of the step.
        """
        group, seed = self._config.num_generations, self._config.seed
        numbers = [number for share in asked.shares for number in share for _ in range(group)]
        questions = [question_of(rows, number) for number in numbers]
        seeds = [row_seed(seed, f"{step}:{number}:{place % group}") for place, number in enumerate(numbers)]
        answers = self._answers(questions, _SAMPLING, seeds)
        rewards = self._judge.rewards(questions, answers) if questions else []
        gains = advantages_of(rewards, group, scaled=self._config.scale_rewards)
        batches, done = [], 0
        for share in asked.shares:
            mine = slice(done, done + len(share) * group)
            done = mine.stop
            batches += self._batches(questions[mine], answers[mine], gains[mine])
        self._fill_up(batches, rows, asked.any_row)
        return batches, self._measured(rewards, answers, group)

    def judged(self, rows: Rows, count: int) -> Metrics:
        """What the greedy answers to a split's first rows are worth; all ranks answer a share, and all call it."""
        mine = range(self._peers.rank, count, self._peers.world_size)
        questions = [question_of(rows, number) for number in mine]
        answers = self._answers(questions, 0.0, [0] * len(questions))
        rewards = self._judge.rewards(questions, answers) if questions else []
        lengths = [len(answer.token_ids) for answer in answers]
        sums = torch.tensor([sum(rewards), sum(lengths), len(rewards)], dtype=torch.float64)
        reward, tokens, total = self._peers.total(sums).tolist()
        return {"eval_reward": reward / max(1.0, total), "eval_answer_tokens": tokens / max(1.0, total)}

    def _answers(self, questions: Sequence[Question], temperature: float, seeds: Sequence[int]) -> list[Completion]:
        if not questions:
            return []
        decoding = DecodingConfig(max_new_tokens=self._config.max_new_tokens, temperature=temperature)
        self._model.eval()
        try:
            prompts = [question.prompt for question in questions]
            return generate(self._loaded, prompts, decoding, seeds=seeds, token_budget=self._budget)
        finally:
            self._model.train()

    def _batches(
        self, questions: Sequence[Question], answers: Sequence[Completion], gains: np.ndarray[Any, Any]
    ) -> list[RolloutBatch]:
        """The rows of a micro-batch, in as many batches as the budget of tokens wants."""
        rows = [_row(question, answer) for question, answer in zip(questions, answers, strict=True)]
        budget = self._config.max_tokens_per_micro_batch
        lengths = [len(row.input_ids) for row in rows]
        groups = [list(range(len(rows)))] if budget is None else group_by_budget(lengths, budget)
        return [self._batch([rows[place] for place in places], gains[places]) for places in groups if places]

    def _batch(self, rows: Sequence[Encoded], gains: np.ndarray[Any, Any]) -> RolloutBatch:
        packed = pack(rows)
        known = torch.zeros(len(packed.targets))
        batch = RolloutBatch(**vars(packed), advantages=torch.from_numpy(gains), reference=known)
        if self._reference is None:
            return batch
        with torch.no_grad(), self._reference.within():
            said = -target_losses(self._reference.parts, batch.to(self._peers.device))
        return replace(batch, reference=said.cpu())

    def _fill_up(self, batches: list[RolloutBatch], rows: Rows, any_row: int) -> None:
        """Adds batches without targets until every rank has as many, so that all take part in every reduction."""
        counts = torch.zeros(self._peers.world_size, dtype=torch.float64)
        counts[self._peers.rank] = len(batches)
        missing = int(self._peers.total(counts).max()) - len(batches)
        if missing:
            empty = self._batch([rows[any_row]], np.zeros(1, np.float32)).without_targets()
            batches += [empty] * missing

    def _measured(self, rewards: Sequence[float], answers: Sequence[Completion], group: int) -> Metrics:
        table = np.asarray(rewards, np.float64).reshape(-1, group)
        mine = [
            *(table.sum(), table.std(1, ddof=1).sum() if len(table) else 0.0, (np.ptp(table, 1) == 0).sum()),
            sum(len(answer.token_ids) for answer in answers),
            sum(answer.finish_reason == "length" for answer in answers),
            *(len(answers), len(table)),
        ]
        reward, spread, equal, tokens, cut, count, prompts = self._peers.total(
            torch.tensor([float(number) for number in mine], dtype=torch.float64)
        ).tolist()
        return {
            "reward": reward / max(1.0, count),
            "reward_deviation": spread / max(1.0, prompts),
            "equal_rewards_share": equal / max(1.0, prompts),
            "answer_tokens": tokens / max(1.0, count),
            "cut_off_share": cut / max(1.0, count),
        }


def refuse_unjudged(splits: Mapping[str, Rows], config: ReinforcementConfig) -> None:
    """Checks that every row has what a metric compares answers with.

    Raises:
        DataError: with the number of rows that have neither an answer nor a reference.
    """
    if config.reward_metric is None:
        return
    for split, rows in splits.items():
        unjudged = rows.unjudged() if isinstance(rows, PromptRows) else []
        if unjudged:
            raise DataError(
                f"reward_metric: {len(unjudged)} of {len(rows)} {split} rows (the first is row {unjudged[0] + 1}) have "
                "neither an answer nor a `reference` that answers could be compared with; give one, or have a reward "
                "model judge (reward_model_path)"
            )


def question_of(rows: Rows, number: int) -> Question:
    """What a row asks.

    Raises:
        DataError: if nothing stands before its answer.
    """
    found = Question.of(rows[number])
    if found is None:
        raise DataError(f"row {number + 1} of a split has nothing to answer: its text is all supervised")
    if not found.answer and isinstance(rows, PromptRows):
        return replace(found, reference=rows.reference(number))
    return found


def _row(question: Question, answer: Completion) -> Encoded:
    said = answer.said_ids
    return Encoded([*question.prompt, *said], [False] * len(question.prompt) + [True] * len(said))


@dataclass(frozen=True)
class _Reference:
    """The model that the run starts from; `within` turns the trained one into it, where that is its base."""

    parts: CausalParts
    adapted: Any = None

    def within(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.adapted is None else self.adapted.disable_adapter()


def _reference_of(model: Any, config: ReinforcementConfig, device: str) -> _Reference:
    if config.uses_adapter and config.adapter_path is None:
        return _Reference(CausalParts.of(model), model)
    loaded = load_model(config.adapter_path or config.model_path, precision=config.precision, device=device)
    use_attention(loaded.model, SEGMENTS)
    return _Reference(CausalParts.of(loaded.model.requires_grad_(False)))


@dataclass
class RolloutLearner:
    """A learner that answers a step's prompts, has the answers judged, and makes its step on them."""

    learner: Learner
    rollouts: Rollouts
    train: Rows
    validation: Rows | None
    eval_rows: int

    def step(self, batch: StepPrompts, step: int) -> Metrics:
        """Answers the prompts of a step and learns from the rewards."""
        batches, measured = self.rollouts.made(self.train, batch, step)
        return {**self.learner.step(batches, step), **measured}

    def evaluate(self) -> Metrics:
        """Rewards of greedy answers to the validation split."""
        if self.validation is None:
            return {}
        return self.rollouts.judged(self.validation, min(self.eval_rows, len(self.validation)))

"""What a run makes smaller, by the kind of its settings: each objective with the rows it is computed on."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytune_ft.core.errors import DataError
from raytune_ft.core.storage import Location
from raytune_ft.models.scoring import SummedLoss, context_tokens
from raytune_ft.models.virtual import VirtualTokens
from raytune_ft.training.answers import Question
from raytune_ft.training.batches import NoExampleError, PromptRows, TokenRows, say_disliked, step_rows
from raytune_ft.training.config import DistillationConfig, FineTuningConfig
from raytune_ft.training.config_alignment import PreferenceConfig, PreferenceLoss, ReinforcementConfig, RewardConfig
from raytune_ft.training.distill import DistillationLoss, load_teacher
from raytune_ft.training.pairs import PairRows
from raytune_ft.training.peers import Peers
from raytune_ft.training.policy import PolicyLoss
from raytune_ft.training.preference import PairwiseLoss
from raytune_ft.training.ratings import RatedLoss, RatedRows
from raytune_ft.training.reference import ReferencedLoss, ScoredRows, set_reference
from raytune_ft.training.reward import RewardLoss
from raytune_ft.training.schedule import Timetable

logger = logging.getLogger("raytune_ft")

_USED = ("train", "validation")


def make_objective(model: Any, config: FineTuningConfig, device: str) -> SummedLoss:
    """The module from a batch to its summed loss that the settings ask for; a teacher without a share is not loaded."""
    if isinstance(config, DistillationConfig) and config.hard_loss_weight < 1:
        vocabulary = model.get_output_embeddings().weight.shape[0]
        teacher = load_teacher(config.teacher_path, config.precision, device, vocabulary)
        return DistillationLoss(
            model, teacher, temperature=config.temperature, hard_loss_weight=config.hard_loss_weight
        )
    if isinstance(config, ReinforcementConfig):
        return PolicyLoss(model, config.beta)
    if isinstance(config, RewardConfig):
        return RewardLoss(model, config.center_rewards_weight)
    if isinstance(config, PreferenceConfig):
        return RatedLoss(model, config) if config.loss_type is PreferenceLoss.KTO else PairwiseLoss(model, config)
    return SummedLoss(model)


def rows_of(config: FineTuningConfig) -> type[TokenRows]:
    """How the rows of a split are read."""
    if isinstance(config, PreferenceConfig) and config.loss_type is PreferenceLoss.KTO:
        return RatedRows
    if isinstance(config, ReinforcementConfig):
        return PromptRows
    return PairRows if isinstance(config, PreferenceConfig | RewardConfig) else TokenRows


def opened_rows(
    config: FineTuningConfig, splits: dict[str, list[str]], cache: str, *, leads: bool
) -> dict[str, TokenRows]:
    """The rows of the splits that are used; without a validation split that holds disliked answers only."""
    rows: dict[str, TokenRows] = {}
    for split in _USED:
        try:
            if splits.get(split):
                rows[split] = rows_of(config)(splits[split], cache)
        except NoExampleError as error:
            if split == "train":
                raise
            if leads:
                logger.warning("the validation split is left out: %s", error)
    if leads:
        say_disliked(rows)
    return rows


def refuse_too_long(splits: dict[str, TokenRows], model: Any, config: FineTuningConfig) -> None:
    """Checks that the model has a place for every token of a row, and for the virtual ones before it.

    Raises:
        DataError: with the number of rows that are too long, and the longest.
    """
    room = _room(model)
    if room is None:
        return
    for split, rows in splits.items():
        lengths = _lengths_read(rows, room)
        over = int((lengths > room).sum())
        if not over:
            continue
        longest = int(lengths.argmax())
        virtual = VirtualTokens.of(model)
        aside = f" besides {virtual.count} virtual ones (num_virtual_tokens)" if virtual is not None else ""
        remedy = f"Set max_length: {room}, which leaves such rows out" if room > 1 else "Lower num_virtual_tokens"
        raise DataError(
            f"{config.dataset_path}: {over} of {len(rows)} {split} rows have more tokens than the {max(0, room)} that "
            f"{config.model_path} can read{aside}; the longest is row {longest + 1} with {lengths[longest]}. {remedy}, "
            "or take a model with a longer context"
        )


def _room(model: Any) -> int | None:
    """Most tokens of a row, virtual ones aside; None where the model names no limit, or none that counts.

    Scaled rotations reach further than the positions that a model was trained on first.
    """
    room, config = context_tokens(model), model.config.get_text_config()
    if room is None or getattr(config, "alibi", False):
        return None
    scaling = getattr(config, "rope_parameters", None) or {}
    virtual = VirtualTokens.of(model)
    for block in (scaling, *scaling.values()):  # one for all layers, or one for each kind of them
        if isinstance(block, Mapping) and block.get("factor"):
            trained = block.get("original_max_position_embeddings") or config.max_position_embeddings
            room = max(room, int(trained * block["factor"]) - (virtual.count if virtual is not None else 0))
    return room


def _lengths_read(rows: TokenRows, room: int) -> NDArray[Any]:
    """[rows] tokens that the model reads of each row; of one that it answers itself, the prompt and one more."""
    if not isinstance(rows, PromptRows):
        return rows.row_lengths
    lengths = np.zeros_like(rows.row_lengths)
    for number in np.flatnonzero(rows.row_lengths >= room).tolist():
        question = Question.of(rows[number])
        lengths[number] = 0 if question is None else len(question.prompt) + 1
    return lengths


def look_at_start(
    loss: SummedLoss, timetable: Timetable, splits: dict[str, TokenRows], peers: Peers, kept: Location | None
) -> None:
    """What has to be known of the model before its first step: its own scores of all answers that the run will see.

    Args:
        loss: of the model before its first step; all ranks call it.
        timetable: how many steps are made.
        splits: rows by split.
        peers: the ranks.
        kept: the folder that an earlier attempt of this run left its scores in.
    """
    if not isinstance(loss, ReferencedLoss):
        return
    config = loss.config
    for split, rows in splits.items():
        if not isinstance(rows, ScoredRows):
            raise TypeError(f"expected pairs or rated answers, got {type(rows).__name__}")
        seen: Sequence[int] = range(len(rows))
        if split == "train" and timetable.total * config.global_batch_size < len(rows):
            steps = islice(step_rows(len(rows), config.global_batch_size, config.seed), timetable.total)
            seen = sorted(chain.from_iterable(steps))
        if peers.leads:
            logger.info("reference: what the model says of %d %s rows before its first step", len(seen), split)
        set_reference(rows, seen, loss, peers, kept / f"reference-{split}.npy" if kept is not None else None)

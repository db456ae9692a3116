"""What a run makes smaller, by the kind of its settings: each objective with the rows it is computed on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import chain, islice
from typing import Any

from raytune_ft.core.storage import Location
from raytune_ft.models.scoring import SummedLoss
from raytune_ft.training.batches import PromptRows, TokenRows, step_rows
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


def make_objective(model: Any, config: FineTuningConfig, device: str) -> SummedLoss:
    """The module from a batch to its summed loss that the settings ask for."""
    if isinstance(config, DistillationConfig):
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

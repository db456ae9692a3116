"""Offline batch inference: a model's answers to every prompt of some files, as files of conversations."""

from __future__ import annotations

import logging
import time

from raytune_ft.core.artifacts import Artifact
from raytune_ft.core.draft import Draft, begin
from raytune_ft.core.errors import DataError, RunError
from raytune_ft.core.grammar import agreeing, number_of
from raytune_ft.core.manifest import ArtifactKind
from raytune_ft.core.storage import Location
from raytune_ft.evaluation.config_inference import BatchGenerationConfig
from raytune_ft.evaluation.inference import Account, ask_files, close_shards
from raytune_ft.evaluation.kept import PIECES, KeptRows
from raytune_ft.evaluation.prompts import prompt_files
from raytune_ft.evaluation.workload import Target, Workload, parent_of, targets_of

logger = logging.getLogger("raytune_ft")

ANSWERS = "answers"
"""The folder of the answers: JSON lines, one file a shard, each row the conversation with the answer at its end.

``id`` is the prompt's own, where it came with one, else that of its content; ``metadata`` has its other columns."""


def generate(config: BatchGenerationConfig) -> Artifact:
    """Answers every prompt and leaves the answers; rows that an earlier attempt answered are not asked again.

    Raises:
        DataError: if there are no prompts, or a row is none.
        ModelError: if the model cannot be loaded, or the endpoint refuses everybody.
        RunError: if more rows stay without an answer than the settings allow.
    """
    files, source = prompt_files(config.dataset_path, config.split)
    [target] = targets_of({"model": config.model_path}, Location.at(config.output_dir).parent)
    draft = begin(
        config.output_dir,
        ArtifactKind.ANSWERS,
        settings=config.resolved(),
        identity=config.identity(),
        parents=[parent_of(target, role="model"), source],
        keep=(PIECES,),
    )
    if draft.finished is not None:
        logger.info("Generate: found finished in %s", draft.location)
        return draft.finished
    with draft:
        kept = KeptRows(draft.location / PIECES)
        began = time.monotonic()
        work = Workload(
            answers=True,
            decoding=config.decoding,
            precision=config.precision,
            endpoint=config.endpoint,
            keeps_prompt=True,
        )
        account = ask_files(files, target, work, kept, num_actors=config.num_actors, what="generation")
        _check(account, config, kept, target)
        close_shards(sorted(shard for _, shard in account.shards), kept, target, draft.location / ANSWERS)
        kept.delete()
        _count(account, draft, time.monotonic() - began)
    return draft.artifact


def _check(account: Account, config: BatchGenerationConfig, kept: KeptRows, target: Target) -> None:
    if not account.shards:
        raise DataError(f"{config.dataset_path}: holds no rows, so there is nothing to answer")
    if account.failed > config.max_unanswered:
        shard = min(shard for _, shard in account.failures)
        row = min(kept.failed(target.label, shard).values(), key=lambda row: row["position"])
        raise RunError(
            f"{account.failed} of {number_of(account.failed + account.answered, 'row')} "
            f"{agreeing(account.failed, 'has', 'have')} no answer; the first is row {row['position'] + 1} of file "
            f"{int(shard.partition('-')[0]) + 1}: {row['error']}. The others are kept: "
            f"the same command asks for the missing ones only; max_unanswered: {account.failed} goes on without them."
        )


def _count(account: Account, draft: Draft, seconds: float) -> None:
    draft.numbers.update(
        rows=account.answered + account.failed,
        answered=account.answered,
        unanswered=account.failed,
        cut_off=account.cut_off,
        answer_tokens=account.tokens,
        seconds=round(seconds, 1),
    )

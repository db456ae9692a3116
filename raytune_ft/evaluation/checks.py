"""What a report looks at beside its metrics: was a model trained on these rows, and are they like production?"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from raytune_ft.core.errors import RunError
from raytune_ft.core.grammar import number_of
from raytune_ft.core.storage import Location
from raytune_ft.evaluation.config import MeasureConfig
from raytune_ft.evaluation.forgetting import ANSWER_TOKENS, abilities, general_passages, general_questions, losses
from raytune_ft.evaluation.harness import require_harness, run_harness
from raytune_ft.evaluation.inference import ask, leaks_in, on_worker
from raytune_ft.evaluation.kept import KeptRows
from raytune_ft.evaluation.leakage import RowIndex, leak_words, refuse_leaks
from raytune_ft.evaluation.lineage import trained_on
from raytune_ft.evaluation.production import (
    asked_prompts,
    compared_prompts,
    feedback_files,
    production_note,
    production_prompts,
)
from raytune_ft.evaluation.rows import EvaluationRows
from raytune_ft.evaluation.workload import Target, Workload
from raytune_ft.models.config import DecodingConfig
from raytune_ft.models.embedding import shared_embedder
from raytune_ft.models.loading import load_tokenizer
from raytune_ft.models.references import refuse_writer, resolve_model

logger = logging.getLogger("raytune_ft")

_UNREAD = "could not be looked into for leaks"


@dataclass(frozen=True)
class Check:
    """What was found under the check's name in the report, and what a reader has to know of it."""

    name: str
    found: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def refuse_uncheckable(config: MeasureConfig) -> None:
    """Checks, before anything is measured, that what a report looks at beside its metrics is there.

    Raises:
        UserError: naming the setting that leads to nothing usable.
    """
    if config.reward_model_path is not None:
        refuse_writer(resolve_model(config.reward_model_path))
    if config.production_path is not None:
        feedback_files(config.production_path)
    if config.forgetting is not None:
        general_passages(config.forgetting.text_path)
    if config.harness is not None:
        require_harness(config.harness)


def check_leaks(config: MeasureConfig, targets: Sequence[Target], rows: EvaluationRows) -> Check:
    """Looks for the test rows in what each model was trained on, as far as manifests tell (see `leakage`).

    Within one prepared dataset only equal rows and prompts count, since `prepare` has told its splits' near-duplicates
    apart by its own settings.

    Raises:
        DataError: with count and examples, if there are any and the settings do not allow them.
    """
    found: dict[str, Any] = {}
    notes: list[str] = []
    known: dict[str, tuple[list[dict[str, Any]], list[str]]] = {}
    for target in targets:
        data = None if target.is_endpoint else trained_on(target.path)
        if data is None:
            found[target.label] = {"known": False}
            continue
        leaks: list[dict[str, Any]] = []
        for source in data:
            if source.unreadable is not None:
                notes.append(f"{target.label}: {_UNREAD}: {source.unreadable}")
                continue
            if source.digest not in known:
                near = None if source.digest == rows.parent.digest else config.near_duplicate
                known[source.digest] = leaks_in(source.files, RowIndex.of(rows.records, near))
            leaks += known[source.digest][0]
            notes += [f"{target.label}: {_UNREAD}: {reason}" for reason in known[source.digest][1]]
        if not config.allow_leak:
            refuse_leaks(leaks, rows.records, target.label)
        if leaks:
            notes.append(f"Leak: {leak_words(leaks, rows.records, target.label)}. Its values are too good to be true.")
        looked_into = [source.where for source in data if source.unreadable is None]
        found[target.label] = {"known": True, "datasets": looked_into, "rows": len(leaks)}
        found[target.label]["examples"] = leaks[:20]
    for note in notes:
        logger.warning("%s", note)
    return Check("leakage", found, notes)


def check_production(config: MeasureConfig, rows: EvaluationRows, storage: Location) -> Check | None:
    """Compares what the test set asks with what production asks, if the settings name feedback records.

    Raises:
        DataError: if there are none, or the test set asks nothing.
        ModelError: if the embedder cannot be had.
    """
    if config.production_path is None:
        return None
    asked, produced = asked_prompts(rows.records), production_prompts(config.production_path)
    embedder = shared_embedder(config.production_embedder, storage)
    vectors = on_worker(embedded, [asked, produced], embedder)
    found = compared_prompts(asked, produced, tuple(vectors), seed=config.seed)
    note = production_note(found)
    logger.info("%s", note)
    return Check("production", found, [note])


def embedded(sides: Sequence[Sequence[str]], embedder: str) -> list[Any]:
    """The vectors of each side's texts."""
    from raytune_ft.models.embedding import load_embedder

    model = load_embedder(embedder)
    return [model.embed(texts).vectors for texts in sides]


def check_forgetting(config: MeasureConfig, targets: Sequence[Target], kept: KeptRows) -> Check | None:
    """Compares general abilities of each model with those of the first, if the settings ask for it.

    Raises:
        RunError: if an endpoint leaves questions without an answer.
    """
    if config.forgetting is None:
        return None
    settings = config.forgetting
    questions = general_questions()[: settings.max_rows]
    passages = general_passages(settings.text_path)[: settings.max_rows]
    records = [*questions, *passages]
    for local in (True, False):
        work = Workload(
            answers=True,
            likelihoods=local,
            choices=local,
            decoding=DecodingConfig(max_new_tokens=ANSWER_TOKENS),
            precision=config.precision,
            endpoint=config.endpoint,
        )
        asked = [target for target in targets if target.is_endpoint is not local]
        own = records if local else questions
        ask(own, asked, work, kept, num_actors=config.num_actors, what="check of general abilities")
    found = {}
    for target in targets:
        rows = kept.all_answered(target.label)
        missing = len(questions) - sum(place in rows for place in range(len(questions)))
        if missing:
            raise RunError(
                f"forgetting: {number_of(missing, 'general question has', 'general questions have')} no answer of "
                f"{target.label}; run again"
            )
        found[target.label] = abilities(questions, rows, len(passages))
    base, *others = (target.label for target in targets)
    notes = [note for label in others for note in losses(found[base], found[label], settings, base=base, label=label)]
    for note in notes:
        logger.warning("%s", note)
    return Check("forgetting", {"base": base, "models": found, "thresholds": settings.resolved()}, notes)


def check_harness(config: MeasureConfig, targets: Sequence[Target]) -> Check | None:
    """Runs lm-eval's tasks on each model, if the settings name any.

    Raises:
        DataError: if a task's data cannot be had.
        RunError: if lm-eval fails.
    """
    if config.harness is None:
        return None
    found = {
        target.label: on_worker(run_harness, target, config.harness, config.precision, config.endpoint)
        for target in targets
    }
    return Check("harness", {"settings": config.harness.resolved(), "models": found})


def check_templates(targets: Sequence[Target], rows: EvaluationRows) -> list[str]:
    """A note for each model without a chat template, where conversations are to be written in one."""
    if not any(record.messages for record in rows.records):
        return []
    bare = [
        target for target in targets if not target.is_endpoint and load_tokenizer(target.path).chat_template is None
    ]
    notes = [
        f"{target.label} ({target.path}) has no chat template: its prompts are written in the instruction format "
        "(### Instruction / ### Response). If it is a chat model, put its chat_template.jinja into its folder."
        for target in bare
    ]
    for note in notes:
        logger.warning("%s", note)
    return notes

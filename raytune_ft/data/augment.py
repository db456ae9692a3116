"""Augmentation: variants of training rows, whose last instruction is worded otherwise while the answer stays.

Which rows get variants, of which kind and with which chances, follows from seed and row id alone, so blocks and workers
cannot change it. Every variant says in its metadata what it is (``augmented``) and of which row (``augmented_from``).
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from raytune_ft.core.digest import short_hash
from raytune_ft.core.records import RECORD_SCHEMA, Record
from raytune_ft.data.blocks import Blocks
from raytune_ft.data.config_augmentation import Augmentation, AugmentationConfig
from raytune_ft.data.rows import TOKEN_FIELDS, mark, prompt_hash
from raytune_ft.data.tokenize import TokenPolicy, add_tokens, chat_for
from raytune_ft.data.wording import mistyped, reworded, thinned

BINS = 1 << 16
TAKEN = "augmentation: another row has this prompt"
_KEY = "asked"
_NOTHING = {
    Augmentation.WORDING: "no rule fits",
    Augmentation.CHARACTERS: "no word may change",
    Augmentation.WORDS: "no word may change",
}


@dataclass(frozen=True)
class Quota:
    """Variants of each row: `whole`, and one more where the row's bin (of `BINS`) is below `cut`."""

    whole: int
    cut: int

    @classmethod
    def of(cls, ratio: float, counts: Mapping[int, int]) -> Quota:
        """The quota that comes nearest to `ratio` from below.

        Args:
            ratio: most variants for each row.
            counts: rows that may have variants, by bin.
        """
        whole = int(ratio)
        left = int((ratio - whole) * sum(counts.values()) + 1e-9)
        for place in sorted(counts):
            left -= counts[place]
            if left < 0:
                return cls(whole, place)
        return cls(whole, BINS)

    def variants(self, place: int) -> int:
        """How many variants a row in a bin has."""
        return self.whole + (place < self.cut)


def count_bins(rows: pa.Table, seed: int) -> pa.Table:
    """How many rows that may have variants lie in each bin: columns `bin` and `rows`."""
    eligible = [_bin(row_id, seed) for row_id in _eligible(rows).column("id").to_pylist()]
    bins, counts = np.unique(np.array(eligible, np.int64), return_counts=True)
    return pa.table({"bin": pa.array(bins, pa.int64()), "rows": pa.array(counts, pa.int64())})


def augmented(rows: Blocks, config: AugmentationConfig, seed: int, **settings: Any) -> Blocks:
    """The rows with their variants, those rejected whose prompt another row has.

    Args:
        rows: settled, with `folder`.
        config: what to make.
        seed: of `prepare`.
        settings: of `augment_rows`.
    """
    rows = rows.kept()
    counts: Counter[int] = Counter()
    for found in rows.map(count_bins, seed=seed).table().to_pylist():
        counts[found["bin"]] += found["rows"]
    made = rows.map(augment_rows, config=config, quota=Quota.of(config.ratio, counts), seed=seed, **settings)
    return made.map(_with_key).by_key(_KEY).map(refuse_taken)


def _with_key(rows: pa.Table) -> pa.Table:
    keys = [int(prompt, 16) >> 2 for prompt in rows.column("prompt").to_pylist()]
    return rows.append_column(_KEY, pa.array(keys, pa.int64()))


def _eligible(rows: pa.Table) -> pa.Table:
    return rows.filter(pa.array(_may_vary(rows), pa.bool_()))


def _may_vary(rows: pa.Table) -> list[bool]:
    """Usable training rows that no weight doubled, whose prompt ends with what a user says."""
    usable = rows.column("reason").to_pylist()
    folders = rows.column("folder").to_pylist()
    copies = rows.column("copy").to_pylist() if "copy" in rows.column_names else [0] * rows.num_rows
    found = []
    for reason, folder, copy, turns in zip(usable, folders, copies, rows.column("messages"), strict=True):
        eligible = reason is None and folder == "train" and not copy
        roles = [turn["role"] for turn in turns.as_py() or ()] if eligible else []
        asked = roles[:-1] if roles[-1:] == ["assistant"] else roles
        found.append(asked[-1:] == ["user"])
    return found


def _bin(row_id: str, seed: int) -> int:
    return int(short_hash(f"{seed}:augment:{row_id}")[:4], 16)


@dataclass(frozen=True)
class _Variant:
    place: int
    kind: Augmentation
    record: Record
    rng: random.Random
    number: int


def augment_rows(
    rows: pa.Table,
    config: AugmentationConfig,
    quota: Quota,
    seed: int,
    *,
    paraphraser: str | None = None,
    embedder: str | None = None,
    model: str | None = None,
    policy: TokenPolicy | None = None,
) -> pa.Table:
    """The rows with their variants behind them; column ``made`` says of those what made them.

    A source row's ``notes`` count the variants that could not be made, by kind and reason.

    Args:
        rows: settled, with ``folder``.
        config: what to make.
        quota: how many of each row.
        seed: of `prepare`.
        paraphraser: reference of the model that writes paraphrases, where there are any.
        embedder: reference of the model that judges them.
        model: the variants are tokenized for it, where there is one.
        policy: of the tokens.
    """
    if "made" not in rows.column_names:
        rows = rows.append_column("made", pa.nulls(rows.num_rows, pa.string()))
    wanted = _wanted(rows, config, quota, seed)
    texts = _texts(wanted, config, paraphraser, embedder)
    sources: list[int] = []
    made: list[tuple[Record, str]] = []
    unmade: dict[int, list[str]] = {}
    seen: set[tuple[int, str]] = set()
    for variant, (text, reason) in zip(wanted, texts, strict=True):
        if text is None or text == _instruction(variant.record) or (variant.place, text) in seen:
            unmade.setdefault(variant.place, []).append(f"{variant.kind}: {reason or 'the same again'}")
            continue
        seen.add((variant.place, text))
        sources.append(variant.place)
        made.append((_worded(variant, text), f"augmented: {variant.kind}"))
    rows = _with_unmade(rows, unmade)
    if not made:
        return rows
    return pa.concat_tables([rows, _made_rows(rows.take(pa.array(sources)), made, model, policy)])


def _wanted(rows: pa.Table, config: AugmentationConfig, quota: Quota, seed: int) -> list[_Variant]:
    places = np.flatnonzero(_may_vary(rows))
    found = []
    for place, row in zip(
        places.tolist(), rows.take(pa.array(places, pa.int64())).select(RECORD_SCHEMA.names).to_pylist(), strict=True
    ):
        for number in range(quota.variants(_bin(row["id"], seed))):
            rng = random.Random(f"{seed}:augment:{row['id']}:{number}")
            found.append(_Variant(place, rng.choice(config.kinds), Record.from_row(row), rng, number))
    return found


def _texts(
    wanted: Sequence[_Variant], config: AugmentationConfig, paraphraser: str | None, embedder: str | None
) -> list[tuple[str | None, str | None]]:
    """The varied instruction of each variant, or why there is none."""
    found: list[tuple[str | None, str | None]] = []
    for variant in wanted:
        text, answer = _instruction(variant.record), _answers(variant.record)
        varied = None
        if variant.kind is Augmentation.WORDING:
            varied = reworded(text, variant.rng)
        elif variant.kind is Augmentation.CHARACTERS:
            varied = mistyped(text, config.character_rate, answer, variant.rng)
        elif variant.kind is Augmentation.WORDS:
            varied = thinned(text, config.word_rate, answer, variant.rng)
        found.append((varied, None if varied is not None else _NOTHING.get(variant.kind)))
    asked = [place for place, variant in enumerate(wanted) if variant.kind is Augmentation.PARAPHRASE]
    if asked and paraphraser is not None and embedder is not None:
        from raytune_ft.data.paraphrase import paraphrase  # loads transformers, which most processes do without

        texts = [_instruction(wanted[place].record) for place in asked]
        requests = [wanted[place].rng.randrange(1 << 16) + wanted[place].number for place in asked]
        written = paraphrase(texts, requests, paraphraser, embedder, config)
        for place, result in zip(asked, written, strict=True):
            found[place] = (result.text, result.reason)
    return found


def _instruction(record: Record) -> str:
    return record.prompt[-1].content


def _answers(record: Record) -> str:
    """All that answers the instruction: what it repeats of the instruction must not change there."""
    turns = (*record.messages[len(record.prompt) :], *record.chosen, *record.rejected)
    return "\n".join([*(f"{turn.content}\n{turn.tool_calls or ''}" for turn in turns), record.reference or ""])


def _worded(variant: _Variant, text: str) -> Record:
    record, at = variant.record, len(variant.record.prompt) - 1
    messages = (
        *record.messages[:at],
        replace(record.messages[at], content=text),
        *record.messages[at + 1 :],
    )
    tags = {"augmented": str(variant.kind), "augmented_from": record.id}
    return replace(record, messages=messages, metadata={**record.metadata, **tags})


def _with_unmade(rows: pa.Table, unmade: Mapping[int, list[str]]) -> pa.Table:
    if not unmade:
        return rows
    notes: list[str | None] = rows.column("notes").to_pylist()
    for place, reasons in unmade.items():
        notes[place] = json.dumps({**json.loads(notes[place] or "{}"), "unmade": reasons}, sort_keys=True)
    return rows.set_column(rows.schema.get_field_index("notes"), "notes", pa.array(notes, pa.string()))


def _made_rows(
    sources: pa.Table, made: Sequence[tuple[Record, str]], model: str | None, policy: TokenPolicy | None
) -> pa.Table:
    """The variants as rows like `sources`: what was counted of the source row is not counted again."""
    names = sources.column_names
    written = pa.Table.from_pylist([record.to_row() for record, _ in made], schema=RECORD_SCHEMA)
    prompts = [prompt_hash(record) for record, _ in made]
    columns: dict[str, Any] = {name: written.column(name) for name in RECORD_SCHEMA.names}
    columns["made"] = pa.array([cause for _, cause in made], pa.string())
    columns |= {name: pa.nulls(len(made), pa.string()) for name in ("format", "notes") if name in names}
    columns |= {name: pa.array(prompts, pa.string()) for name in ("group", "prompt") if name in names}
    columns |= {"question": pa.nulls(len(made), pa.int64())} if "question" in names else {}
    for name, column in columns.items():
        sources = sources.set_column(names.index(name), sources.schema.field(name), column)
    if model is not None and policy is not None:
        tokens = [*(field.name for field in TOKEN_FIELDS), "chat"]
        sources = add_tokens(sources.drop_columns(tokens), chat_for(model, policy.template), policy).select(names)
    return sources


def refuse_taken(rows: pa.Table) -> pa.Table:
    """The rows with a reason on each variant whose prompt another row has; all rows of a `prompt` must be together."""
    if _KEY in rows.column_names:
        rows = rows.drop_columns(_KEY)
    rows = rows.sort_by([(name, "ascending") for name in ("prompt", "file", "position", "id")])
    prompts, made, reasons = (rows.column(name).to_pylist() for name in ("prompt", "made", "reason"))
    owned = {prompt for prompt, cause, reason in zip(prompts, made, reasons, strict=True) if _is_first(cause, reason)}
    found: list[str | None] = []
    for prompt, cause, reason in zip(prompts, made, reasons, strict=True):
        variant = cause is not None and cause.startswith("augmented")
        found.append(TAKEN if variant and reason is None and prompt in owned else None)
        if variant and reason is None:
            owned.add(prompt)
    rows = mark(rows, found)
    folders = [
        "rejected" if reason is not None else folder
        for reason, folder in zip(rows.column("reason").to_pylist(), rows.column("folder").to_pylist(), strict=True)
    ]
    return rows.set_column(rows.schema.get_field_index("folder"), "folder", pa.array(folders, pa.string()))


def _is_first(cause: str | None, reason: str | None) -> bool:
    return reason is None and not (cause or "").startswith("augmented")

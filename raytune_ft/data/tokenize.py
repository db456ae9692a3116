"""Tables of rows to token ids and masks of one model's chat template; what cannot be trained on gets its reason."""

from __future__ import annotations

import functools
import gc
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raytune_ft.core.artifacts import Artifact
from raytune_ft.core.digest import short_hash
from raytune_ft.core.errors import DataError
from raytune_ft.core.manifest import Parent
from raytune_ft.core.records import RECORD_SCHEMA, Record, table_to_records
from raytune_ft.core.storage import Location, source_digest
from raytune_ft.data.config import DataCollectionConfig, OverLength
from raytune_ft.data.over_length import can_split, ends_here, split_record, truncated
from raytune_ft.data.rows import TOKEN_FIELDS, UNANSWERED, mark, with_remarks
from raytune_ft.models.chat import Chat, TokenRow, conversation_of
from raytune_ft.models.config import TrainOn
from raytune_ft.models.layout import ToolsIgnoredError
from raytune_ft.models.loading import load_tokenizer
from raytune_ft.models.references import resolve_model

TEMPLATE_FILE = "chat_template.jinja"
"""File of a dataset with the chat template it is prepared for, where that is not its model's own."""

_SLICE = 1024
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
"""Files that decide the tokens."""
_VOCABULARIES = (
    "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.model",
    "sentencepiece.bpe.model", "spm.model", "spm_char.model", "source.spm", "target.spm", "target_vocab.json",
    "vocab-src.json", "vocab-tgt.json", "bpe.codes", "dict.txt", "tekken.json",
)  # fmt: skip
"""Files that decide the tokens, too, where there is no ``tokenizer.json``, as transformers names them."""


@dataclass(frozen=True)
class TokenPolicy:
    """What decides the tokens of a row beside the tokenizer: `template` is Jinja text, None the model's own."""

    max_length: int
    over_length: OverLength = OverLength.DROP
    train_on: TrainOn = TrainOn.ALL_ASSISTANT_TURNS
    template: str | None = None
    special_tokens: Literal["reject", "keep"] = "reject"
    unanswered: Literal["reject", "keep"] = "reject"

    @classmethod
    def of(cls, config: DataCollectionConfig, template: str | None) -> TokenPolicy:
        """The policy of `prepare`; `template` is what the setting of this name led to."""
        return cls(
            config.max_length,
            config.over_length,
            config.train_on,
            template,
            config.special_tokens_in_text,
            config.unanswered,
        )

    def takes_as_prompt(self, record: Record) -> bool:
        """Whether a record is kept as a prompt, since it ends with what is asked."""
        if self.unanswered != "keep" or not record.messages or record.chosen:
            return False
        return record.messages[-1].role != "assistant"


def policy_of_dataset(dataset: Artifact, max_length: int) -> TokenPolicy:
    """What a dataset's settings and template say about its tokens, with another length."""
    settings = dataset.manifest.settings
    return TokenPolicy(
        max_length,
        OverLength(settings.get("over_length", OverLength.DROP)),
        TrainOn(settings.get("train_on", TrainOn.ALL_ASSISTANT_TURNS)),
        template_beside(dataset.location),
        settings.get("special_tokens_in_text", "reject"),
        settings.get("unanswered", "reject"),
    )


def template_beside(dataset: Location) -> str | None:
    """The chat template that a dataset was prepared for, where that is not its model's own."""
    file = dataset / TEMPLATE_FILE
    return file.read().decode("utf-8") if file.is_file() else None


def adopt_template(tokenizer: Any, files: Sequence[str]) -> None:
    """Gives a tokenizer, which is saved with the model, the template that a dataset's `files` were made with."""
    Chat(tokenizer, template_beside(Location.at(files[0]).parent.parent))


def template_parents(setting: str, template: str | None) -> list[Parent]:
    """The manifest's entry for a template that lies in a file: its content counts, not its name."""
    if template is None or setting in {template, "instruction"}:
        return []
    return [Parent(role="template", where=setting, digest=short_hash(template))]


@functools.lru_cache(maxsize=4)
def chat_for(model: str, template: str | None = None) -> Chat:
    """The chat of a model, by its own template or a given one, loaded once a process."""
    chat = Chat(load_tokenizer(model), template)
    gc.freeze()  # what is imported and loaded by now stays: walked again and again, it would cost a tenth of the time
    return chat


def tokenizer_parent(model: str) -> Parent:
    """A manifest's entry for the tokenizer of `model`, whose digest changes with its files, not with the weights."""
    folder = Path(resolve_model(model).tokenizer_source)
    names = _TOKENIZER_FILES if (folder / "tokenizer.json").exists() else (*_TOKENIZER_FILES, *_VOCABULARIES)
    files = [folder / name for name in names if (folder / name).exists()]
    content = [[path.name, source_digest(path)] for path in files] or [[model, ""]]
    return Parent(role="tokenizer", where=model, digest=short_hash(json.dumps(content)))


@dataclass
class Tokens:
    """The tokens of a row (and of a preference's rejected answer), or the reason why it has none to train on."""

    row: TokenRow | None = None
    rejected: TokenRow | None = None
    reason: str | None = None
    remark: str | None = None

    @property
    def length(self) -> int:
        """Tokens of the longer answer."""
        return max(len(row.ids) for row in (self.row, self.rejected) if row is not None)


def add_tokens(rows: pa.Table, chat: Chat, policy: TokenPolicy) -> pa.Table:
    """The table with `TOKEN_FIELDS`, the chat's fingerprint in ``chat``, and a reason on rows not to be trained on.

    Those are rows over the policy's length, rows without a supervised token, and conversations that the model's
    template refuses; their tokens are null. Rows that `split_rows` is to split have neither tokens nor a reason.

    Raises:
        DataError: at the first row that is too long, where the policy is to raise.
    """
    parts = []
    for start in range(0, max(rows.num_rows, 1), _SLICE):
        part = rows.slice(start, _SLICE)
        usable = np.flatnonzero(part.column("reason").is_null().to_numpy())
        found = [Tokens() for _ in range(part.num_rows)]
        records = table_to_records(part.take(usable).select(RECORD_SCHEMA.names))
        tested = part.column("is_test").take(usable).to_pylist() if "is_test" in part.column_names else ()
        for place, tokens in zip(usable, tokenize(chat, records, policy, tested), strict=True):
            found[place] = tokens
        parts.append(_with_columns(part, found, chat))
    return pa.concat_tables(parts)


def tokenize(chat: Chat, records: Sequence[Record], policy: TokenPolicy, tested: Sequence[bool] = ()) -> list[Tokens]:
    """The tokens of each record, within the policy's length.

    Where `tested` says that a record is for the test alone, a prompt with a reference needs no supervised token. A
    prompt that the policy keeps has none either: its tokens end where the answer begins.

    Raises:
        DataError: as `add_tokens`.
    """
    found = _encoded(chat, records, policy)
    for record, tokens, is_test in zip(records, found, tested or [False] * len(records), strict=True):
        if tokens.row is None:
            continue
        kept = policy.takes_as_prompt(record)
        if kept or asks_only(record):
            if not kept and not is_test:
                tokens.row, tokens.reason = None, f"{UNANSWERED}: nothing to train on"
            elif tokens.length > policy.max_length:
                tokens.row, tokens.reason = None, f"too long: {_too_long(tokens, record, policy)}"
            elif kept:
                tokens.remark = UNANSWERED
            continue
        if tokens.length > policy.max_length:
            _fit(tokens, chat, record, policy)
        if tokens.row is not None and not all(row.supervised.any() for row in (tokens.row, tokens.rejected) if row):
            cut = f": {policy.over_length} took it" if tokens.remark else ""
            tokens.row = tokens.rejected = tokens.remark = None
            tokens.reason = f"no supervised token{cut}"
    return found


def asks_only(record: Record) -> bool:
    """Whether a record is a prompt with a reference, and no answer to learn."""
    answered = any(message.role == "assistant" for message in (*record.messages, *record.chosen))
    return record.reference is not None and bool(record.messages) and not answered


def _encoded(chat: Chat, records: Sequence[Record], policy: TokenPolicy) -> list[Tokens]:
    found = [Tokens() for _ in records]
    conversations, owners = [], []
    for record, tokens in zip(records, found, strict=True):
        if not record.messages:
            encoded = chat.encode_text(record.text or "", closed=ends_here(record))
            tokens.row = TokenRow(np.array(encoded.input_ids, np.int32), np.array(encoded.supervised, np.bool_))
            continue
        try:
            sides = [conversation_of(record, rejected=side) for side in (False, True)[: 2 if record.rejected else 1]]
        except DataError as error:
            tokens.reason = str(error)
            continue
        spelled = next(filter(None, map(chat.special_text, sides)), None)
        if spelled is not None and policy.special_tokens == "reject":
            tokens.reason = f"special token in the text: {spelled}"
            continue
        if policy.takes_as_prompt(record):
            try:
                ids = chat.prompt_ids(record.messages, tools=record.tools)
            except DataError as error:
                tokens.reason = _of_template(error)
            else:
                tokens.row = TokenRow(np.array(ids, np.int32), np.zeros(len(ids), np.bool_))
            continue
        conversations += sides
        owners += [(tokens, side) for side in ("row", "rejected")[: len(sides)]]
    for (tokens, side), encoded_row in zip(owners, chat.encode_batch(conversations, policy.train_on), strict=True):
        if isinstance(encoded_row, DataError):
            tokens.reason = tokens.reason or _of_template(encoded_row)
        else:
            setattr(tokens, side, encoded_row)
    for tokens in found:
        if tokens.reason is not None:
            tokens.row = tokens.rejected = None
    return found


def _of_template(error: DataError) -> str:
    return str(error) if isinstance(error, ToolsIgnoredError) else f"chat template: {error}"


def _fit(tokens: Tokens, chat: Chat, record: Record, policy: TokenPolicy) -> None:
    too_long = _too_long(tokens, record, policy)
    if policy.over_length in {OverLength.TRUNCATE_LEFT, OverLength.TRUNCATE_RIGHT}:
        cut, bos = tokens.length - policy.max_length, chat.tokenizer.bos_token_id
        for side in ("row", "rejected"):
            row = getattr(tokens, side)
            if row is not None:
                setattr(tokens, side, truncated(row, policy.max_length, policy.over_length, bos=bos, cut=cut))
        if tokens.row and tokens.rejected and _same_answers(tokens.row, tokens.rejected):
            tokens.row = tokens.rejected = None
            tokens.reason = f"nothing to compare: {policy.over_length} took what chosen and rejected differ in"
            return
        tokens.remark = str(policy.over_length)
        return
    tokens.row = tokens.rejected = None
    if policy.over_length is OverLength.SPLIT and can_split(record):
        return
    why = ", and it cannot be split" if policy.over_length is OverLength.SPLIT else ""
    tokens.reason = f"too long: {too_long}{why}"


def _same_answers(row: TokenRow, rejected: TokenRow) -> bool:
    ours, theirs = row.ids[row.supervised], rejected.ids[rejected.supervised]
    return len(ours) > 0 and np.array_equal(ours, theirs)


def _too_long(tokens: Tokens, record: Record, policy: TokenPolicy) -> str:
    """By how much, in words; where that ends the run, they are raised."""
    words = f"{tokens.length} tokens, at most {policy.max_length}"
    if policy.over_length is OverLength.RAISE:
        raise DataError(
            f"{record.source}: row {record.position + 1}: has {words}. Raise max_length, or set over_length to drop, "
            "truncate_left, truncate_right or split."
        )
    return words


def split_rows(rows: pa.Table, chat: Chat, policy: TokenPolicy) -> pa.Table:
    """The table of `add_tokens` with each row that is to be split as its pieces, in its place.

    Column ``made`` says ``split`` of every piece but the first. What is true of the whole row stays with the first
    piece alone: its format and notes, which are counted. Pieces that cannot be trained on have a reason.
    """
    waiting = pc.and_(pc.is_null(rows.column("reason")), pc.is_null(rows.column("input_ids")))
    places = np.flatnonzero(waiting.to_numpy())
    none = pa.nulls(rows.num_rows, pa.string())
    if "made" not in rows.column_names:
        rows = rows.append_column("made", none)
    parts, done = [], 0
    for place in places.tolist():
        parts += [rows.slice(done, place - done), _pieces(rows.slice(place, 1), chat, policy)]
        done = place + 1
    return pa.concat_tables([*parts, rows.slice(done)]) if parts else rows


def _pieces(row: pa.Table, chat: Chat, policy: TokenPolicy) -> pa.Table:
    (record,) = table_to_records(row.select(RECORD_SCHEMA.names))
    pieces = split_record(chat, record, policy.max_length)
    found = []
    for start in range(0, len(pieces), _SLICE):
        found += tokenize(chat, pieces[start : start + _SLICE], policy)
    for tokens in found:
        if tokens.row is None and tokens.reason is None:
            tokens.reason = f"too long: a part of more than {policy.max_length} tokens that cannot be split"
    # The columns of the row that are no part of its record (its file, its place) are repeated; the record is replaced.
    replaced = [*RECORD_SCHEMA.names, *(field.name for field in TOKEN_FIELDS), "chat"]
    repeated = row.drop_columns(replaced).take([0] * len(pieces))
    written = pa.Table.from_pylist([piece.to_row() for piece in pieces], schema=RECORD_SCHEMA)
    first: dict[str, Any] = {"made": [row.column("made")[0].as_py()] + ["split"] * (len(pieces) - 1)}
    for name in ("format", "notes"):
        if name in row.column_names:
            first[name] = [row.column(name)[0].as_py()] + [None] * (len(pieces) - 1)
    for field in RECORD_SCHEMA:
        repeated = repeated.append_column(field, written.column(field.name))
    for name, values in first.items():
        repeated = repeated.set_column(repeated.column_names.index(name), name, pa.array(values, pa.string()))
    return _with_columns(repeated, found, chat).select(row.column_names)


def _with_columns(rows: pa.Table, found: Sequence[Tokens], chat: Chat) -> pa.Table:
    sides: Mapping[str, list[TokenRow | None]] = {
        "": [tokens.row for tokens in found],
        "rejected_": [tokens.rejected for tokens in found],
    }
    columns = {
        f"{side}{name}": _lists([None if row is None else getattr(row, part) for row in column], kind)
        for side, column in sides.items()
        for name, part, kind in (("input_ids", "ids", pa.int32()), ("supervised", "supervised", pa.bool_()))
    }
    for field in TOKEN_FIELDS:
        rows = rows.append_column(field, columns[field.name])
    rows = rows.append_column("chat", pa.array([chat.fingerprint] * rows.num_rows, pa.string()))
    rows = with_remarks(rows, [tokens.remark for tokens in found])
    return mark(rows, [tokens.reason for tokens in found])


def _lists(rows: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """A list column from arrays; None becomes null."""
    lengths = np.array([0 if row is None else len(row) for row in rows], np.int32)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    present = [row for row in rows if row is not None]
    values = pa.array(np.concatenate(present), kind) if present else pa.array([], kind)
    return pa.ListArray.from_arrays(offsets, values, mask=pa.array([row is None for row in rows], pa.bool_()))

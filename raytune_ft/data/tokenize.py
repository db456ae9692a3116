"""Tables of rows to token ids and masks of one model's chat template; what cannot be trained on gets its reason."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pyarrow as pa

from raytune_ft.core.errors import DataError
from raytune_ft.core.manifest import Parent
from raytune_ft.core.records import Record, table_to_records
from raytune_ft.core.storage import source_digest
from raytune_ft.data.rows import TOKEN_FIELDS, mark, short_hash
from raytune_ft.models.chat import Chat, Encoded, encode_record
from raytune_ft.models.loading import load_tokenizer, resolve_model

_SLICE = 256
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip


@functools.lru_cache(maxsize=2)
def chat_for(model: str) -> Chat:
    """The chat of a model, loaded once a process."""
    return Chat(load_tokenizer(model))


def tokenizer_parent(model: str) -> Parent:
    """A manifest's entry for the tokenizer of `model`, whose digest changes with its files, not with the weights."""
    folder = Path(resolve_model(model).tokenizer_source)
    files = [folder / name for name in _TOKENIZER_FILES if (folder / name).exists()]
    content = [[path.name, source_digest(path)] for path in files] or [[model, ""]]
    return Parent(role="tokenizer", where=model, digest=short_hash(json.dumps(content)))


def add_tokens(rows: pa.Table, chat: Chat, max_length: int) -> pa.Table:
    """The table with `TOKEN_FIELDS`, the chat's fingerprint in ``chat``, and a reason on rows not to be trained on.

    Those are rows over `max_length` tokens, rows without a supervised token, and conversations that the model's
    template refuses; their tokens are null. A preference is tokenized as its prompt with the chosen continuation.
    """
    ids: list[list[int] | None] = []
    masks: list[list[bool] | None] = []
    reasons: list[str | None] = []
    for start in range(0, rows.num_rows, _SLICE):
        part = rows.slice(start, _SLICE)
        for record, rejected in zip(table_to_records(part), part.column("reason").to_pylist(), strict=True):
            encoded, reason = (None, None) if rejected is not None else encode(chat, record, max_length)
            ids.append(encoded.input_ids if encoded else None)
            masks.append(encoded.supervised if encoded else None)
            reasons.append(reason)
    for field, values in zip(TOKEN_FIELDS, (ids, masks), strict=True):
        rows = rows.append_column(field, pa.array(values, field.type))
    rows = rows.append_column("chat", pa.array([chat.fingerprint] * rows.num_rows, pa.string()))
    return mark(rows, reasons)


def encode(chat: Chat, record: Record, max_length: int) -> tuple[Encoded | None, str | None]:
    """The tokens of a record, or the reason why it has none to train on."""
    if record.chosen:
        record = Record(messages=record.messages + record.chosen)
    try:
        encoded = encode_record(chat, record)
    except DataError as error:
        return None, f"chat template: {error}"
    if len(encoded.input_ids) > max_length:
        return None, f"too long: {len(encoded.input_ids)} tokens, at most {max_length}"
    if not any(encoded.supervised):
        return None, "no supervised token"
    return encoded, None

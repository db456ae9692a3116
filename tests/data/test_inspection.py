from __future__ import annotations

import io
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pytest
from rich.console import Console
from typer.testing import CliRunner

from raytune_ft.core.artifacts import Artifact
from raytune_ft.core.draft import begin
from raytune_ft.core.errors import DataError
from raytune_ft.core.manifest import ArtifactKind
from raytune_ft.core.records import Message, Record, records_to_table
from raytune_ft.core.storage import Location
from raytune_ft.data.inspection import inspect_rows, pieces, print_rows, to_html, visible
from raytune_ft.data.rows import REJECTED_SCHEMA
from raytune_ft.data.shards import write_file
from raytune_ft.data.tokenize import TokenPolicy, add_tokens, chat_for, tokenizer_parent

HOSTILE = "<script>alert(1)</script> \x1b[31m & \"'{{ 7*7 }}"
RECORDS = [
    Record(messages=(Message("user", "yes?"), Message("assistant", "naïve 🎉")), source="a.jsonl", position=3),
    Record(messages=(Message("user", HOSTILE), Message("assistant", "red")), metadata={"x": HOSTILE}),
    Record(
        messages=(Message("user", "no?"),), chosen=(Message("assistant", "A"),), rejected=(Message("assistant", "B"),)
    ),
    Record(messages=(Message("user", "no?"), Message("assistant", "A")), label=False),
]


def dataset_of(where: Path, model: str, *, tokens: bool = True) -> Artifact:
    """A dataset artifact of two files, as `prepare` writes them."""
    chat = chat_for(model)
    draft = begin(where, ArtifactKind.DATASET, settings={}, parents=[tokenizer_parent(model)] if tokens else [])
    with draft:
        for number, part in enumerate((RECORDS[:2], RECORDS[2:])):
            rows = records_to_table(part)
            for field in list(REJECTED_SCHEMA)[-2:]:
                rows = rows.append_column(field, pa.nulls(rows.num_rows, pa.string()))
            rows = add_tokens(rows, chat, TokenPolicy(200)) if tokens else rows
            write_file(rows, Location.at(where), f"train/0000{number}.parquet")
        draft.numbers |= {"rows_train": 4} | ({"chat_fingerprint": chat.fingerprint} if tokens else {})
    return draft.artifact


def test_rows_are_shown_with_their_masks_and_origin(tiny_model: Path, tmp_path: Path) -> None:
    dataset_of(tmp_path / "d", str(tiny_model))
    first, _, preference, kto = inspect_rows(str(tmp_path / "d"), rows=9)
    assert first.origin == "a.jsonl:4"
    (side,) = first.sides
    assert "".join(p.text for p in side.pieces if p.supervised) == "naïve 🎉<|im_end|>"
    assert [p.text for p in side.pieces if p.special] == ["<|im_start|>", "<|im_end|>"] * 2
    assert [p.text for p in side.pieces if "🎉" in p.text] == ["🎉"] or any(p.text == " 🎉" for p in side.pieces)
    assert [s.name for s in preference.sides] == ["chosen", "rejected"]
    said = ["".join(p.text for p in s.pieces if p.supervised) for s in preference.sides]
    assert said == ["A<|im_end|>", "B<|im_end|>"]
    assert kto.notes == "label false"
    assert [row.number for row in inspect_rows(str(tmp_path / "d"), rows=3)] == [1, 2, 3]


def test_pieces_hold_every_token_once(tiny_model: Path) -> None:
    chat = chat_for(str(tiny_model))
    encoded = chat.encode([Message("user", "é漢字"), Message("assistant", "🎉é ok")])
    found = list(pieces(chat, encoded.input_ids, encoded.supervised))
    assert [token for piece in found for token in piece.ids] == encoded.input_ids
    assert "".join(p.text for p in found) == chat.tokenizer.decode(encoded.input_ids)


def test_the_terminal_shows_supervised_text_in_green_and_obeys_no_escape(tiny_model: Path, tmp_path: Path) -> None:
    dataset_of(tmp_path / "d", str(tiny_model))
    out = io.StringIO()
    print_rows(inspect_rows(str(tmp_path / "d"), rows=2), Console(file=out, force_terminal=True, width=200))
    text = out.getvalue()
    assert "\x1b[4;32mnaïve 🎉\x1b[0m\x1b[1;4;32m<|im_end|>\x1b[0m" in text
    assert "\x1b[31m" not in text
    assert "␛[31m" in text
    assert visible("a\x9b\nb") == "a\ufffd\nb"


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        assert not {name for name, _ in attrs} & {"src", "href", "onload", "onclick"}

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_needs_nothing_else_and_hostile_text_stays_text(tiny_model: Path, tmp_path: Path) -> None:
    dataset_of(tmp_path / "d", str(tiny_model))
    page = _Page()
    page.feed(to_html(inspect_rows(str(tmp_path / "d"), rows=4), title="<b>d</b>"))
    assert not page.tags & {"script", "link", "img", "iframe", "b"} - {"b"}
    assert HOSTILE in page.text
    assert "<b>d</b>" in page.text
    assert "naïve 🎉" in page.text.replace("\n", "")


def test_what_cannot_be_shown_is_said(tiny_model: Path, tmp_path: Path) -> None:
    dataset_of(tmp_path / "plain", str(tiny_model), tokens=False)
    with pytest.raises(DataError, match="was prepared without a model"):
        inspect_rows(str(tmp_path / "plain"), rows=1)
    dataset_of(tmp_path / "d", str(tiny_model))
    with pytest.raises(DataError, match="has no split 'test'; it has train"):
        inspect_rows(str(tmp_path / "d"), rows=1, split="test")
    other = tmp_path / "other"
    other.mkdir()
    for file in tiny_model.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    (other / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(DataError, match="another tokenizer or chat template"):
        inspect_rows(str(tmp_path / "d"), rows=1, model=str(other))


def test_the_command_prints_rows_or_writes_a_page(tiny_model: Path, tmp_path: Path) -> None:
    from raytune_ft.cli import app

    dataset_of(tmp_path / "d", str(tiny_model))
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "d"), "--rows", "1"])
    assert shown.exit_code == 0
    assert "a.jsonl:4" in shown.stdout
    written = CliRunner().invoke(app, ["inspect", str(tmp_path / "d"), "--html", str(tmp_path / "page.html")])
    assert written.exit_code == 0
    assert "🎉" in (tmp_path / "page.html").read_text(encoding="utf-8")
    wrong = CliRunner().invoke(app, ["inspect", str(tmp_path / "d"), "--split", "nope"])
    assert wrong.exit_code == 2
    assert "has no split" in wrong.stderr
    page = tmp_path / "page.html" / "p.html"
    nowhere = CliRunner().invoke(app, ["inspect", str(tmp_path / "d"), "--html", str(page)])
    assert nowhere.exit_code == 2
    assert "p.html: the storage refused" in nowhere.stderr

"""Test rows that a model was trained on are found by row, by prompt and by text, and stop the evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest

from raytune_ft.core.draft import begin
from raytune_ft.core.errors import DataError
from raytune_ft.core.manifest import ArtifactKind, Parent
from raytune_ft.core.records import Message, Record, records_to_table
from raytune_ft.evaluation.leakage import (
    KINDS,
    UNREADABLE,
    RowIndex,
    find_leaks,
    first_of_each,
    leak_words,
    refuse_leaks,
)
from raytune_ft.evaluation.lineage import trained_on


def row(asked: str, said: str) -> Record:
    return Record(messages=(Message("user", asked), Message("assistant", said)))


WORDS = [f"w{n}" for n in range(24)]
TEST = [
    row("what is the capital of France", "Paris"),
    row("how many legs has a spider", "eight"),
    row(" ".join(WORDS), "long"),
    row("something else", "entirely"),
]


def write(path: Path, records: list[Record]) -> str:
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(records_to_table(records), path)
    else:
        path.write_text("".join(json.dumps({"messages": [vars(m) for m in r.messages]}) + "\n" for r in records))
    return str(path)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_each_way_of_leaking_is_found_with_its_place(tmp_path: Path, suffix: str) -> None:
    nearly = WORDS.copy()
    nearly[23] = "other"
    training = [row("x", "y"), TEST[0], row("How many legs  has a SPIDER", "8"), row(" ".join(nearly), "long")]
    where = write(tmp_path / f"train{suffix}", training)
    found = find_leaks(pa.table({"uri": [where]}), RowIndex.of(TEST, 0.8)).to_pylist()
    leaks = first_of_each(found)
    assert [(leak["row"], leak["kind"]) for leak in leaks] == [(0, KINDS[0]), (1, KINDS[2]), (2, KINDS[3])]
    assert [leak["where"] for leak in leaks] == [f"{where}, row {n}" for n in (2, 3, 4)]
    # 25 words give 21 sequences; the last but one word differs, which is in 2 of them.
    assert leaks[2]["similarity"] == pytest.approx(19 / 23)
    with pytest.raises(DataError, match=r"^3 of 4 rows are in what m was trained on \(1 as the same row, 1 as"):
        refuse_leaks(leaks, TEST, "m")
    assert "row 3" in leak_words(leaks, TEST, "m")


def talk(*said: str) -> Record:
    return Record(messages=tuple(Message(("user", "assistant")[at % 2], text) for at, text in enumerate(said)))


@pytest.mark.parametrize("near", [0.8, None])
def test_rows_inside_longer_ones_and_prompts_on_the_way_are_found(tmp_path: Path, near: float | None) -> None:
    thirteen = " ".join(WORDS[:13])
    tests = [row("A?", "a"), row("B?", "b"), row("A?", "other"), row("C?", "b"), Record(text=thirteen)]
    tests += [Record(text=" ".join(WORDS[:12])), row("A?", "a"), row("D?", "d"), Record(text=f"{thirteen}?")]
    system = Message("system", "Be brief.")
    training = [
        Record(messages=(system, *talk(" a?", "A", "b?", "B", "C?", "c").messages)),
        row("x", f"{' '.join(WORDS[:20])}."),
        Record(messages=talk("E?").messages, chosen=talk("", "", "D?", "d").messages[1:]),
    ]
    where = write(tmp_path / "train.parquet", training)
    leaks = first_of_each(find_leaks(pa.table({"uri": [where]}), RowIndex.of(tests, near)).to_pylist())
    part, prompt = KINDS[1:3]
    if near is None:  # of the same dataset, whose prompts were told apart
        assert [(leak["row"], leak["kind"]) for leak in leaks] == [(row, part) for row in (0, 1, 4, 6, 7)]
        return
    kinds = [(leak["row"], leak["kind"]) for leak in leaks]
    # Row 3 is asked in the third turn only, after others; row 5 has less than thirteen words; row 8 ends otherwise.
    assert kinds == [(0, part), (1, part), (2, prompt), (4, part), (6, part), (7, part)]
    told = leak_words(leaks, tests, "m")
    assert told.startswith("6 of 9 rows are in what m was trained on (5 as a part, 1 as the same prompt): ")
    assert f"row 1 ('A?') is a part of {where}, row 1; " in told


def under(system: str, *said: str) -> Record:
    return Record(messages=(Message("system", system), *talk(*said).messages))


def test_a_question_is_the_same_under_another_system_turn(tmp_path: Path) -> None:
    training = [under("Be brief.", "How many legs has a spider?", "8"), under("Be brief.", "x", "y")]
    files = pa.table({"uri": [write(tmp_path / "train.parquet", training)]})
    tests = [under("Be kind.", "How many legs has a spider?", "eight"), under("Be brief.", "And an ant?", "6")]
    leaks = first_of_each(find_leaks(files, RowIndex.of(tests, 0.8)).to_pylist())
    assert [(leak["row"], leak["kind"]) for leak in leaks] == [(0, KINDS[2])], "a shared system turn is no leak"


def test_within_a_dataset_rows_are_told_apart_by_their_system_turns_as_prepare_does(tmp_path: Path) -> None:
    asked = f"Is this review good or bad? {' '.join(WORDS)}"
    training = [under(f"review {n}", asked, "good") for n in range(3)]
    files = pa.table({"uri": [write(tmp_path / "train.parquet", training)]})
    tests = [under("review 7", asked, "good"), under("Review  2", asked, "bad"), talk(asked, "bad")]
    same, other = (first_of_each(find_leaks(files, RowIndex.of(tests, near)).to_pylist()) for near in (None, 0.8))
    assert [(leak["row"], leak["kind"]) for leak in same] == [(1, KINDS[2]), (2, KINDS[2])]
    assert [leak["row"] for leak in other] == [0, 1, 2]


def test_every_copy_of_a_test_row_counts(tmp_path: Path) -> None:
    where = write(tmp_path / "train.jsonl", [TEST[0]])
    found = find_leaks(pa.table({"uri": [where]}), RowIndex.of([TEST[0], TEST[1], TEST[0]], 0.8)).to_pylist()
    assert [leak["row"] for leak in first_of_each(found)] == [0, 2]


def test_a_file_of_another_format_is_named_and_hides_no_leak_of_others(tmp_path: Path) -> None:
    other = tmp_path / "pairs.jsonl"
    other.write_text('{"prompt": "x", "chosen": "y", "rejected": "z"}\n')
    files = pa.table({"uri": [str(other), write(tmp_path / "train.jsonl", [TEST[0]])]})
    leak, unread = find_leaks(files, RowIndex.of(TEST, 0.8)).to_pylist()
    assert (leak["row"], unread["kind"]) == (0, UNREADABLE)
    assert unread["where"].startswith(f"{other}:1: has neither `messages` nor `text`; run `raytune-ft prepare`")


def test_what_is_less_alike_or_not_asked_for_is_no_leak(tmp_path: Path) -> None:
    nearly = WORDS.copy()
    nearly[12] = "other"
    table = pa.table({"uri": [write(tmp_path / "train.jsonl", [row(" ".join(nearly), "long")])]})
    # 5 of 21 sequences hold the changed word: 16 / 26.
    assert find_leaks(table, RowIndex.of(TEST, 0.62)).num_rows == 0
    assert find_leaks(table, RowIndex.of(TEST, 0.61)).num_rows == 1
    assert find_leaks(table, RowIndex.of(TEST, None)).num_rows == 0


def test_a_row_that_was_met_often_is_told_once_in_the_plainest_way() -> None:
    met = [
        {"row": 3, "kind": KINDS[3], "similarity": 0.9, "where": "a"},
        {"row": 3, "kind": KINDS[0], "similarity": 1.0, "where": "b"},
        {"row": 1, "kind": KINDS[2], "similarity": 1.0, "where": "b"},
    ]
    assert first_of_each(met) == [met[2], met[1]]


def model_artifact(folder: Path, tiny: Path, parents: list[Parent]) -> Path:
    import shutil

    with begin(folder, ArtifactKind.MODEL, settings={}, parents=parents) as draft:
        for file in tiny.iterdir():
            shutil.copy(file, draft.folder / file.name)
    return folder


def test_lineage_goes_through_models_to_the_rows_they_were_trained_on(tiny_model: Path, tmp_path: Path) -> None:
    write(tmp_path / "rows" / "train.jsonl", TEST)
    data = Parent(role="dataset", where=str(tmp_path / "rows"), digest="d1")
    gone = Parent(role="dataset", where=str(tmp_path / "gone"), digest="d2")
    trained = model_artifact(tmp_path / "trained", tiny_model, [data, gone])
    quantized = model_artifact(tmp_path / "small", tiny_model, [Parent(role="model", where=str(trained), digest="m")])
    found = trained_on(str(quantized))
    assert found is not None
    assert [[file.name for file in source.files] for source in found] == [["train.jsonl"], []]
    assert found[1].unreadable is not None
    assert trained_on(str(tiny_model)) is None


def test_a_model_that_it_was_made_from_and_that_is_gone_is_told(tiny_model: Path, tmp_path: Path) -> None:
    named = [Parent(role="model", where=where, digest=where) for where in ("starter:x", "org/name", "http://host/v1#m")]
    gone = Parent(role="model", where=str(tmp_path / "moved"), digest="m")
    assert trained_on(str(model_artifact(tmp_path / "made", tiny_model, named))) == []
    found = trained_on(str(model_artifact(tmp_path / "small", tiny_model, [*named, gone])))
    assert found is not None
    assert [source.unreadable for source in found] == [
        f"{tmp_path}/moved, which it was made from, is not there any more"
    ]

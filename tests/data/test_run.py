from __future__ import annotations

import contextlib
import json
import logging
import threading
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from raytune_ft.core.artifacts import open_artifact
from raytune_ft.core.errors import DataError
from raytune_ft.core.records import table_to_records
from raytune_ft.data import components, near, run
from raytune_ft.data.config import DataCollectionConfig
from raytune_ft.data.openings import COMMON, MOST_PROMPTS
from raytune_ft.data.prepared import PreparedDataset
from raytune_ft.data.run import DataCollector, prepare, tokenized_splits

pytestmark = pytest.mark.ray


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def questions(first: int, last: int) -> list[dict[str, Any]]:
    return [{"question": f"What is {n}?", "answer": f"{n} is {n}.", "n": n} for n in range(first, last)]


@pytest.fixture
def source(tmp_path: Path) -> str:
    """Forty usable questions, a duplicate, a second answer to the first question, and an empty answer."""
    extra = [*questions(3, 4), {"question": "What is 0?", "answer": "Nothing."}, {"question": "Why?", "answer": " "}]
    return write_jsonl(tmp_path / "source.jsonl", [*questions(0, 40), *extra])


def test_the_guides_block_prepares_and_exports(
    source: str, tmp_path: Path, ray_cluster: object, caplog: pytest.LogCaptureFixture
) -> None:
    collector = DataCollector(DataCollectionConfig(sources=[source], output_path=str(tmp_path / "out")))
    dataset = collector.prepare()
    numbers = dataset.artifact.numbers
    assert (numbers["rows_in"], numbers["rows_made"], numbers["rows_out"], numbers["rows_rejected"]) == (43, 0, 41, 2)
    assert numbers["rejected"] == {"duplicate": 1, "empty answer": 1}
    assert {split: len(rows) for split, rows in dataset.items()} == {"train": 33, "validation": 4, "test": 4}
    prompts = {split: {row["messages"][0]["content"] for row in rows} for split, rows in dataset.items()}
    assert sum(map(len, prompts.values())) == len(set.union(*prompts.values())) == 40
    assert dataset.artifact.read_json("account.json")["rows_out"] == 41
    exported = Path(collector.export(dataset))
    assert sum(len((exported / f"{s}.jsonl").read_text().splitlines()) for s in dataset) == 41
    assert DataCollector(collector.config).prepare().artifact.manifest == dataset.artifact.manifest
    with caplog.at_level(logging.INFO, logger="raytune_ft"):
        prepare(collector.config.with_overrides(output_format="csv"))
    assert "prepare: the dataset is Parquet; csv is what `DataCollector.export` writes" in caplog.messages


def test_blocks_and_workers_change_neither_content_nor_order(
    source: str, tmp_path: Path, ray_cluster: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = Path(source).read_text().splitlines(keepends=True)
    (tmp_path / "test.jsonl").write_text(lines[0])
    settings = {"test_sources": [str(tmp_path / "test.jsonl")]}
    whole = prepare(DataCollectionConfig(sources=[source], output_path=str(tmp_path / "whole"), **settings))
    monkeypatch.setattr(run, "_FEW_ROWS", 0)
    parts = prepare(DataCollectionConfig(sources=[source], output_path=str(tmp_path / "parts"), **settings))
    assert parts.manifest.files == whole.manifest.files
    assert whole.numbers["rejected"] == {"duplicate": 2, "empty answer": 1, "prompt is in test_sources": 1}
    assert whole.numbers["rows_test"] == 1


def kill_workers(stop: threading.Event, killed: list[str]) -> None:
    """Kills the first two workers that are seen at a step over blocks, with SIGKILL."""
    while not stop.wait(0.005) and len(killed) < 2:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                title = process.cmdline()[:1]
                if title and title[0].startswith("ray::") and "MapBatches" in title[0]:
                    process.kill()
                    killed.append(title[0])
                    break


def test_killed_workers_change_nothing(tmp_path: Path, tiny_model: Path, ray_cluster: object) -> None:
    source = write_jsonl(tmp_path / "source.jsonl", questions(0, 4000))
    settings: dict[str, Any] = {"sources": [source], "model_path": str(tiny_model), "quality": {"report": False}}
    whole = prepare(DataCollectionConfig(**settings, output_path=str(tmp_path / "whole")))
    stop, killed = threading.Event(), []
    killer = threading.Thread(target=kill_workers, args=(stop, killed))
    killer.start()
    try:
        hurt = prepare(DataCollectionConfig(**settings, output_path=str(tmp_path / "hurt")))
    finally:
        stop.set()
        killer.join()
    assert len(killed) == 2
    assert hurt.manifest.files == whole.manifest.files
    assert hurt.numbers == whole.numbers


def test_tokens_are_made_once_for_a_chat_template(
    source: str, tmp_path: Path, tiny_model: Path, ray_cluster: object
) -> None:
    plain = prepare(DataCollectionConfig(sources=[source], output_path=str(tmp_path / "plain"), test_split=0.0))
    splits = tokenized_splits(plain.location.uri, str(tiny_model), tmp_path / "tokens")
    made = open_artifact(tmp_path / "tokens")
    assert splits == {split: [str(tmp_path / f"tokens/{split}/00000.parquet")] for split in ("train", "validation")}
    assert tokenized_splits(made.location.uri, str(tiny_model), tmp_path / "unused") == splits
    assert not (tmp_path / "unused").exists()
    limit = made.numbers["tokens_longest"] - 1
    shorter = tokenized_splits(made.location.uri, str(tiny_model), tmp_path / "short", max_length=limit)
    short = open_artifact(tmp_path / "short")
    assert short.numbers["tokens_longest"] <= limit
    assert short.numbers["rejected"] == {"too long": made.numbers["rows_out"] - short.numbers["rows_out"]}
    assert shorter["train"] == [str(tmp_path / "short/train/00000.parquet")]
    at_once = tokenized_splits(source, str(tiny_model), tmp_path / "file")
    assert [Path(name).read_bytes() for name in at_once["train"]] == [Path(n).read_bytes() for n in splits["train"]]


def test_prompts_without_an_answer_are_kept_for_learning_from_rewards_alone(
    tmp_path: Path, tiny_model: Path, ray_cluster: object
) -> None:
    rows = [{"prompt": f"order {n} red", **({"reference": "yes"} if n % 2 else {})} for n in range(40)]
    source = write_jsonl(tmp_path / "source.jsonl", rows)
    settings: dict[str, Any] = {"sources": [source], "output_path": str(tmp_path / "kept"), "near_duplicates": "keep"}
    made = prepare(DataCollectionConfig(**settings, unanswered="keep"))
    assert (made.numbers["rows_out"], made.numbers["rows_rejected"]) == (40, 0)
    splits = tokenized_splits(made.location.uri, str(tiny_model), tmp_path / "tokens", prompts=True)
    tokens = open_artifact(tmp_path / "tokens")
    assert tokens.numbers["remarks"] == {"a prompt without an answer": 40}
    references = [pq.read_table(files).column("reference") for files in splits.values()]
    assert (sum(map(len, references)), sum(column.null_count for column in references)) == (40, 20)
    for dataset in (made, tokens):
        with pytest.raises(DataError, match=r"40 rows are prompts without an answer.*raytune-ft reinforce"):
            tokenized_splits(dataset.location.uri, str(tiny_model), tmp_path / "tokens")
    with pytest.raises(DataError, match=r"no row is left to train on.*40 a prompt without.*set unanswered: keep"):
        tokenized_splits(source, str(tiny_model), tmp_path / "file")


def test_a_broken_line_is_named_and_the_mended_file_goes_to_the_same_folder(
    tmp_path: Path, ray_cluster: object, caplog: pytest.LogCaptureFixture
) -> None:
    source = write_jsonl(tmp_path / "source.jsonl", questions(0, 12))
    Path(source).write_text(Path(source).read_text() + '{"question": \n')
    config = DataCollectionConfig(sources=[source], output_path=str(tmp_path / "out"))
    with pytest.raises(
        DataError, match=r"source.jsonl:13: malformed JSON: Expecting value.*on_bad_row: reject"
    ) as told:
        prepare(config)
    assert "UDF" not in str(told.value)
    lenient = config.with_overrides(on_bad_row="reject", output_path=str(tmp_path / "lenient"))
    kept = prepare(lenient)
    rejected = _rejected(kept.local())
    assert [(row["raw"], row["position"]) for row in rejected] == [('{"question": ', 12)]
    write_jsonl(tmp_path / "source.jsonl", questions(0, 12))
    with caplog.at_level(logging.WARNING, logger="raytune_ft"):
        assert prepare(config).numbers["rows_out"] == 12
    assert "validation is 8.3% of the rows; the guide recommends 10% to 15%" in caplog.text


def _rejected(folder: Path) -> list[dict[str, Any]]:
    table = pq.read_table(folder / "rejected/00000.parquet")
    assert len(table_to_records(table)) == table.num_rows
    return list(table.to_pylist())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n\n", "source.jsonl: holds no rows"),
        ('{"question": "a", "answer": ""}\n', "no row is left to train on: 1 row in, .*rejected: 1 empty answer"),
        ('{"foo": 1}\n', "source.jsonl:1: unknown columns: foo"),
    ],
)
def test_input_without_a_usable_row_is_refused_and_mended_input_takes_its_place(
    text: str, message: str, tmp_path: Path, ray_cluster: object
) -> None:
    config = DataCollectionConfig(sources=[str(tmp_path / "source.jsonl")], output_path=str(tmp_path / "out"))
    (tmp_path / "source.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        prepare(config)
    (tmp_path / "source.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    mended = prepare(config.with_overrides(validation_split=0.0, test_split=0.0))
    assert mended.numbers["rows_out"] == 1
    assert len(mended.manifest.failures) == 1


@pytest.mark.parametrize(
    ("row", "changes", "found"),
    [
        (
            {
                "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
                "tools": '[{"name": "f", "parameters": {"type": "object", "properties": {}}}]',
            },
            {},
            r"3 rows in, 0 usable .*rejected: 3 tools \(such as 'tools: the chat template ignores them.*'\); give a "
            r"chat template that writes tools",
        ),
        (
            {"question": "a", "answer": "b " * 300},
            {"max_length": 64},
            r"rejected: 3 too long \(such as 'too long: \d+ tokens, at most 64'\); raise max_length, or set",
        ),
    ],
)
def test_rows_that_are_all_rejected_say_why_and_what_to_do(
    row: dict[str, Any], changes: dict[str, Any], found: str, tiny_model: Path, tmp_path: Path, ray_cluster: object
) -> None:
    source = write_jsonl(tmp_path / "source.jsonl", [row] * 3)
    settings = {"sources": [source], "output_path": str(tmp_path / "out"), "model_path": str(tiny_model)}
    with pytest.raises(DataError, match=found):
        prepare(DataCollectionConfig(**settings, drop_duplicates=False, near_duplicates="keep", **changes))


def test_many_rejected_rows_come_with_a_remedy(
    tiny_model: Path, tmp_path: Path, ray_cluster: object, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [*questions(0, 12), {"question": "long", "answer": "b " * 300}, {"question": "longer", "answer": "c " * 300}]
    source = write_jsonl(tmp_path / "source.jsonl", rows)
    settings = {"sources": [source], "output_path": str(tmp_path / "out"), "model_path": str(tiny_model)}
    with caplog.at_level(logging.WARNING, logger="raytune_ft"):
        prepare(DataCollectionConfig(**settings, max_length=256))
    assert "14% of the rows were left out as 'too long': raise max_length, or set over_length to split" in caplog.text


def talks(count: int) -> list[dict[str, Any]]:
    """Rows of 30 words, of which every fifth is nearly like the one before, and two make a conversation."""
    rows = []
    for number in range(count):
        words = " ".join(f"w{number - (number % 5 == 4)}_{place}" for place in range(30))
        told = {"prompt": f"Tell {number}", "completion": f"{words} {number}", "conversation_id": number // 2}
        rows.append({**told, "topic": "ab"[number % 2]})
    return rows


def test_splits_and_near_duplicates_are_the_same_in_one_task_and_by_shuffles(
    tmp_path: Path, ray_cluster: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = write_jsonl(tmp_path / "bench.jsonl", [{"stem": talks(8)[7]["completion"]}])
    settings = {
        "sources": [write_jsonl(tmp_path / "talks.jsonl", talks(100))],
        "benchmarks": [benchmark],
        "stratify_by": "topic",
    }
    with pytest.raises(DataError, match=r"1 row shares 13 words.*talks.jsonl:7 \('w7 0 w7 1.*bench.jsonl:0"):
        prepare(DataCollectionConfig(output_path=str(tmp_path / "refused"), **settings))
    settings["on_leak"] = "reject"
    whole = prepare(DataCollectionConfig(output_path=str(tmp_path / "whole"), **settings))
    assert whole.numbers["rejected"] == {"near-duplicate": 20, "benchmark overlap": 1}
    assert whole.numbers["distance_from_whole"]["test"].keys() == {"topic"}  # all of one length, of one source
    splits = PreparedDataset(whole).values()
    talked = [{json.loads(row["metadata"])["conversation_id"] for row in rows} for rows in splits]
    assert sum(map(len, talked)) == len(set.union(*talked)) == 50
    monkeypatch.setattr(run, "_FEW_ROWS", 0)
    monkeypatch.setattr(components, "FEW_EDGES", 0)
    monkeypatch.setattr(near, "FEW_BYTES", 0)
    parts = prepare(DataCollectionConfig(output_path=str(tmp_path / "parts"), **settings))
    files = [name for name in whole.manifest.files if name.endswith((".parquet", "account.json"))]
    assert {name: parts.manifest.files.get(name) for name in files} == {n: whole.manifest.files[n] for n in files}


def test_prefixes_of_a_conversation_are_in_one_split_in_one_task_and_by_shuffles(
    tmp_path: Path, ray_cluster: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    def turns(*said: str) -> dict[str, Any]:
        return {"messages": [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(said)]}

    rows = []
    for number in range(40):
        talk = [f"What about {number}?", f"so {number}", f"And {number * 7}?", f"it is {number}"]
        rows += [turns(*talk[:2]), turns(*talk), turns(talk[0].upper(), *talk[1:])]
    rows += [turns("Hi", "Hello", f"How much is {number}?", f"much {number}") for number in range(MOST_PROMPTS + 1)]
    settings: dict[str, Any] = {"sources": [write_jsonl(tmp_path / "talks.jsonl", rows)], "near_duplicates": "keep"}
    settings["quality"] = {"report": False}
    whole = prepare(DataCollectionConfig(output_path=str(tmp_path / "whole"), **settings))
    monkeypatch.setattr(run, "_FEW_ROWS", 0)
    monkeypatch.setattr(components, "FEW_EDGES", 0)
    parts = prepare(DataCollectionConfig(output_path=str(tmp_path / "parts"), **settings))
    assert parts.manifest.files == whole.manifest.files
    assert whole.numbers["remarks"] == {COMMON: MOST_PROMPTS + 1}
    asked = [{row["messages"][0]["content"].upper() for row in rows} for rows in PreparedDataset(whole).values()]
    assert set.intersection(*asked) == {"HI"}
    assert sum(map(len, asked)) == 40 + 3


def test_weights_of_sources_are_made_or_left_out_in_training_alone_and_accounted_for(
    source: str, tmp_path: Path, ray_cluster: object
) -> None:
    other = write_jsonl(tmp_path / "other.jsonl", questions(100, 140))
    config = DataCollectionConfig(
        sources=[source, other], output_path=str(tmp_path / "out"), source_weights={source: 2.0, other: 0.5}
    )
    dataset = DataCollector(config).prepare()
    numbers = dataset.artifact.numbers
    assert numbers["rows_in"] + numbers["rows_made"] == numbers["rows_out"] + numbers["rows_rejected"]
    trained = [row["source"] for row in dataset["train"]]
    assert numbers["made"] == {"source weight": trained.count("source.jsonl") // 2}
    assert trained.count("source.jsonl") == 2 * len(
        {r["id"] for r in dataset["train"] if r["source"] == "source.jsonl"}
    )
    assert numbers["rejected"]["source weight"] > 0
    held = [row["id"] for split in ("validation", "test") for row in dataset[split]]
    assert len(held) == len(set(held))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_by": "m"}, r"group_by: no row has 'm' in its metadata \(there are, among others, n\)"),
        ({"columns": {"system": "nosuch"}}, "columns.system: no row of the sources has a column 'nosuch'"),
        ({"source_weights": 0.0}, "source_weights: leave out every row of the training split"),
    ],
)
def test_settings_that_no_row_answers_to_are_refused(
    changes: dict[str, Any], message: str, source: str, tmp_path: Path, ray_cluster: object
) -> None:
    given = {name: {source: value} if name == "source_weights" else value for name, value in changes.items()}
    with pytest.raises(DataError, match=message):
        prepare(DataCollectionConfig(sources=[source], output_path=str(tmp_path / "out"), **given))

"""Offline batch inference: every prompt of the files has its answer, in order, whoever computed it."""

from __future__ import annotations

import datetime
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raytune_ft.core.config import load_config
from raytune_ft.core.errors import ArtifactError, ConfigError, DataError, RunError
from raytune_ft.core.records import Message, Record, records_to_table
from raytune_ft.core.storage import Location
from raytune_ft.evaluation.config_inference import BatchGenerationConfig, EndpointConfig
from raytune_ft.evaluation.generate import generate
from raytune_ft.evaluation.kept import PIECES, KeptRows
from raytune_ft.evaluation.prompts import prompt_files, prompt_record, read_shards
from raytune_ft.evaluation.shards import ShardActor, close_shard, fault_in
from raytune_ft.evaluation.workload import Target, Workload
from raytune_ft.models.config import DecodingConfig


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Two files of prompts: 300 lines of JSON, and 5 rows of Parquet."""
    folder = tmp_path / "prompts"
    folder.mkdir()
    rows = [{"prompt": f"order {n}", "metadata": {"n": n}} for n in range(300)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    turns = [[{"role": "user", "content": f"red {n}"}, {"role": "assistant", "content": "old"}] for n in range(5)]
    pq.write_table(pa.table({"messages": turns}), folder / "b.parquet")
    return folder


def rows_of(artifact: Any) -> list[dict[str, Any]]:
    names = sorted(name for name in artifact.manifest.files if name.startswith("answers/"))
    return [json.loads(line) for name in names for line in (artifact / name).read().decode().splitlines()]


def test_files_become_shards_whose_rows_keep_their_places(prompts: Path) -> None:
    files, parent = prompt_files(str(prompts), None)
    assert [file.name for file in files] == ["a.jsonl", "b.parquet"]
    assert parent.role == "dataset"
    table = pa.table({"number": [0, 1], "uri": [file.uri for file in files]})
    found = list(read_shards(table, "m"))
    assert [(part["shard"][0].as_py(), part.num_rows) for part in found] == [
        ("00000-000000000000", 256),
        ("00000-000000000256", 44),
        ("00001-000000000000", 5),
    ]
    assert found[1]["position"].to_pylist() == list(range(256, 300))


def closed(file: Path, tmp_path: Path, model: str) -> list[dict[str, Any]]:
    """What `generate` leaves of a file of prompts, the cluster aside: read, worked off by the actor, and closed."""
    kept, where = KeptRows(Location.at(tmp_path / "pieces")), Location.at(tmp_path / "answers")
    work = Workload(answers=True, keeps_prompt=True)
    work = replace(work, decoding=DecodingConfig(max_new_tokens=2), endpoint=EndpointConfig(max_retries=0))
    for table in read_shards(pa.table({"number": [0], "uri": [str(file)]}), "m"):
        actor = ShardActor([Target("m", model)], work, kept.where.uri, threads=1, concurrency=1)
        done = actor(table)
        assert fault_in(done.to_pylist()[0]) is None
        close_shard(done.select(["shard"]), kept, "m", where)
    return [json.loads(line) for name in where.files() for line in (where / name).read().decode().splitlines()]


def test_an_answer_has_the_id_and_the_columns_of_its_prompt(tmp_path: Path, tiny_model: Path) -> None:
    given: list[dict[str, Any]] = [
        {"id": "u-1", "prompt": "hello", "topic": "x"},
        {"id": 0, "prompt": "hello", "answer": None, "reference": "hi", "metadata": {"id": "m", "k": 1}},
        {"prompt": "hello", "k": 2, "j": 3, "metadata": {"k": 1, "j": 3}},
        {"id": "long", "prompt": "word " * 4000, "n": float("nan")},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    rows = closed(tmp_path / "p.jsonl", tmp_path, str(tiny_model))
    ours = prompt_record({"prompt": "hello"}, "here", 0).id
    assert [row["id"] for row in rows] == ["u-1", 0, ours, "long"]
    assert [row["metadata"] for row in rows] == [
        {"topic": "x"},
        {"id": "m", "k": 1, "reference": "hi"},
        {"k": 1, "k (column)": 2, "j": 3},
        {},
    ]
    assert [len(row["messages"]) for row in rows] == [2, 2, 2, 1]
    assert "tokens" in rows[3]["error"]


def test_rows_that_share_an_id_or_have_one_of_their_own_are_found_again(tmp_path: Path, server: Any) -> None:
    server.behaviour = lambda text, times: (
        (500, "no") if text == "b" and times == 1 else (200, server.completion(text.upper()))
    )
    given = [{"id": "same", "prompt": text} for text in "abc"]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    first = closed(tmp_path / "p.jsonl", tmp_path, server.url)
    assert [(row["id"], row.get("answer")) for row in first] == [("same", "A"), ("same", None), ("same", "C")]
    second = closed(tmp_path / "p.jsonl", tmp_path, server.url)
    assert [(row["id"], row.get("answer")) for row in second] == [("same", "A"), ("same", "B"), ("same", "C")]
    assert sum(server.asked.values()) == 4


def test_parquet_is_read_whole_but_for_bytes_and_datasets_of_ours_without_what_is_worked_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    columns = {
        "id": ["p-1"],
        "prompt": ["one"],
        "day": [datetime.date(2026, 1, 2)],
        "image": [{"bytes": b"\xff" * 1000, "path": "a.png"}],
        "scores": [[1, 2]],
    }
    pq.write_table(pa.table(columns), tmp_path / "theirs.parquet")
    [found] = read_shards(pa.table({"number": [0], "uri": [str(tmp_path / "theirs.parquet")]}), "m")
    assert json.loads(found["metadata"][0].as_py()) == {"day": "2026-01-02", "scores": [1, 2], "id (own)": "p-1"}
    assert "theirs.parquet: columns of bytes are left out: image" in caplog.text

    record = Record(
        messages=(Message("user", "q"),),
        chosen=(Message("assistant", "a"),),
        rejected=(Message("assistant", "b"),),
        reference="r",
        source="s",
        position=7,
        metadata={"id": "u-1"},
    )
    table = records_to_table([record])
    pq.write_table(table.append_column("input_ids", pa.array([[1, 2]])), tmp_path / "ours.parquet")
    (tmp_path / "ours.jsonl").write_text(json.dumps({**table.to_pylist()[0], "input_ids": [1, 2]}) + "\n")
    for name in ("ours.parquet", "ours.jsonl"):
        [found] = read_shards(pa.table({"number": [0], "uri": [str(tmp_path / name)]}), "m")
        metadata = json.loads(found["metadata"][0].as_py())
        assert metadata == {"id": "u-1", "reference": "r", "id (own)": record.id}


def test_every_file_counts_for_what_the_prompts_are(tmp_path: Path) -> None:
    for number in range(65):
        (tmp_path / f"{number:02d}.jsonl").write_text('{"prompt": "a"}\n')
    digests = [prompt_files(str(tmp_path), None)[1].digest]
    (tmp_path / "64.jsonl").write_text('{"prompt": "b"}\n')
    digests.append(prompt_files(str(tmp_path), None)[1].digest)
    (tmp_path / "65.jsonl").write_text('{"prompt": "c"}\n')
    digests.append(prompt_files(str(tmp_path), None)[1].digest)
    assert len(set(digests)) == 3
    assert {len(digest) for digest in digests} == {16}


@pytest.mark.parametrize(
    "bad", ['{"prompt": 5}', '{"prompt": "half \\ud83d"}', '{"prompt": "q", "topic": "\\ud83d"}', "no JSON"]
)
def test_a_row_that_is_no_prompt_ends_its_file_with_the_reason(tmp_path: Path, bad: str) -> None:
    (tmp_path / "p.jsonl").write_text("".join(f'{{"prompt": "q{n}"}}\n' for n in range(300)) + bad + "\n")
    table = pa.table({"number": [0], "uri": [str(tmp_path / "p.jsonl")]})
    found = list(read_shards(table, "m"))
    assert [part.num_rows for part in found] == [256, 1]
    fault = fault_in(found[1].to_pylist()[0])
    assert isinstance(fault, DataError)
    assert str(fault).startswith(f"{tmp_path}/p.jsonl:301: ")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi"},
        {"prompt": [{"role": "user", "content": "hi"}]},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "old"}]},
    ],
)
def test_a_prompt_may_be_text_messages_or_a_conversation(row: dict[str, object]) -> None:
    assert prompt_record(row, "here", 3).prompt == (Message("user", "hi"),)
    assert prompt_record(row, "here", 3).position == 3


@pytest.mark.parametrize("row", [{"text": "raw"}, {"question": "hi"}, [], {"prompt": 5}])
def test_a_row_without_a_prompt_is_refused_with_its_place(row: object) -> None:
    with pytest.raises(DataError, match=r"^here: "):
        prompt_record(row, "here", 0)


def test_no_prompts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there are no such prompts"):
        prompt_files(str(tmp_path / "nowhere"), None)
    with pytest.raises(DataError, match=r"holds no .jsonl or .parquet file"):
        prompt_files(str(tmp_path), None)


def test_a_single_file_has_no_splits(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "hi"}\n')
    with pytest.raises(DataError, match=r"split: .*rows.jsonl is a single file, .*leave split out \(got 'test'\)"):
        prompt_files(str(tmp_path / "rows.jsonl"), "test")


def test_the_url_of_one_operation_is_no_endpoint() -> None:
    with pytest.raises(ConfigError, match="must be the endpoint's base URL"):
        BatchGenerationConfig(model_path="http://host/v1/chat/completions", dataset_path="d")


def test_the_shipped_settings_load() -> None:
    path = Path(__file__).parents[2] / "jobs" / "configs" / "generate.yaml"
    assert load_config(BatchGenerationConfig, path).split == "test"


@pytest.mark.ray
def test_every_prompt_is_answered_in_its_place_as_one_model_alone_would(
    ray_cluster: object, tiny_model: Path, prompts: Path, tmp_path: Path
) -> None:
    from raytune_ft.models import generation
    from raytune_ft.models.loading import load_model

    decoding = DecodingConfig(max_new_tokens=4)
    config = BatchGenerationConfig(
        model_path=str(tiny_model),
        dataset_path=str(prompts),
        output_dir=str(tmp_path / "out"),
        decoding=decoding,
        num_actors=2,
        precision="fp32",
    )
    artifact = generate(config)
    rows = rows_of(artifact)
    asked = [row["messages"][0]["content"] for row in rows]
    assert asked == [f"order {n}" for n in range(300)] + [f"red {n}" for n in range(5)]
    assert [row["metadata"] for row in rows[:2]] == [{"n": 0}, {"n": 1}]
    assert artifact.numbers["rows"] == artifact.numbers["answered"] == 305
    loaded = load_model(str(tiny_model))
    alone = [loaded.chat.prompt_ids([Message("user", text)]) for text in asked[:8]]
    answers = [found.text for found in generation.generate(loaded, alone, decoding)]
    assert [row["messages"][-1] for row in rows[:8]] == [{"role": "assistant", "content": text} for text in answers]
    assert generate(config).digest == artifact.digest


@pytest.mark.ray
@pytest.mark.soak
def test_an_endpoint_answers_files_too_and_what_it_fails_is_asked_again(
    ray_cluster: object, prompts: Path, tmp_path: Path, server: Any
) -> None:
    server.down = True
    server.behaviour = lambda text, times: (
        (500, "no") if server.down and text in {"order 7", "red 1"} else (200, server.completion(text.upper()))
    )
    config = BatchGenerationConfig(
        model_path=server.url,
        dataset_path=str(prompts),
        output_dir=str(tmp_path / "out"),
        endpoint={"max_retries": 0, "concurrency": 8},
    )
    with pytest.raises(RunError, match="2 of 305 rows have no answer; the first is row 8 of file 1: status 500"):
        generate(config)
    told = generate(config.with_overrides(max_unanswered=2, output_dir=str(tmp_path / "told")))
    assert [row["error"][:10] for row in rows_of(told) if "error" in row] == ["status 500"] * 2
    server.down, before = False, sum(server.asked.values())
    artifact = generate(config)
    assert sum(server.asked.values()) == before + 2
    assert [row["messages"][-1]["content"] for row in rows_of(artifact)][:8] == [f"ORDER {n}" for n in range(8)]
    assert artifact.numbers["unanswered"] == 0


@pytest.mark.ray
def test_a_full_disk_ends_it_in_words_and_the_same_call_asks_for_what_is_left(
    ray_cluster: object, small_disk: Any, server: Any, tmp_path: Path
) -> None:
    disk, enlarge = small_disk
    rows = [{"prompt": f"order {n}", "metadata": {"page": "x" * 20_000}} for n in range(300)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    server.behaviour = lambda text, times: (200, server.completion(text.upper()))
    config = BatchGenerationConfig(
        model_path=server.url, dataset_path=str(tmp_path / "a.jsonl"), output_dir=str(disk / "out")
    )
    told = "No space left on device. Make room there, or choose another folder. Then the same command goes on"
    with pytest.raises(ArtifactError, match=told):
        generate(config)
    kept = KeptRows(Location.at(disk / "out" / PIECES)).all_answered("model").values()
    before = [row["messages"][0]["content"] for row in kept]
    assert 0 < len(before) < 300
    enlarge()
    assert generate(config).numbers["answered"] == 300
    assert {server.asked[text] for text in before} == {1}


@pytest.mark.ray
def test_a_row_that_is_no_prompt_is_told_with_its_file_and_line(
    ray_cluster: object, tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"promt": "b"}\n')
    config = BatchGenerationConfig(
        model_path=str(tiny_model), dataset_path=str(tmp_path / "bad.jsonl"), output_dir=str(tmp_path / "out")
    )
    with pytest.raises(DataError, match=r"bad.jsonl:2: has neither `prompt` nor `messages`$"):
        generate(config)
    said = capfd.readouterr()
    assert "Traceback" not in said.out + said.err

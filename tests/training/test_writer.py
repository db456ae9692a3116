"""Checkpoints written in the background: whole when all ranks are done, or given up and said; none too many deleted."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest
import torch
from moto.server import ThreadedMotoServer

from raytune_ft.core.storage import Location
from raytune_ft.training import checkpoint
from raytune_ft.training.checkpoint import write_rank
from raytune_ft.training.folder import CHECKPOINTS, HISTORY
from raytune_ft.training.peers import ALONE, Peers
from raytune_ft.training.session import Seat, train_in_process
from raytune_ft.training.slices import Slice
from raytune_ft.training.writer import CheckpointWriter, Save, delete_old

from ..processes import no_larger_than  # noqa: TID252 - tests are no installed package

WHOLE = torch.arange(12.0)


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture(params=["local", "s3", "gs"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Location:
    if request.param == "local":
        return Location.at(tmp_path / "run")
    if request.param == "gs":
        return Location.at(request.getfixturevalue("gs_bucket")) / "run"
    address = request.getfixturevalue("s3_server")
    for name, value in {"ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    bucket = f"bucket-{len(request.node.name)}-{abs(hash(request.node.name)) % 10**8}"
    boto3.client("s3", endpoint_url=address).create_bucket(Bucket=bucket)
    return Location.at(f"s3://{bucket}/run")


class ThreadPeers(Peers):
    """Ranks that are threads of this process: they agree through a barrier."""

    def __new__(cls, rank: int, barrier: threading.Barrier, said: dict[int, bool]) -> ThreadPeers:
        return super().__new__(cls)

    def __init__(self, rank: int, barrier: threading.Barrier, said: dict[int, bool]) -> None:
        super().__init__(rank, barrier.parties)
        object.__setattr__(self, "barrier", barrier)
        object.__setattr__(self, "said", said)

    def all_say(self, mine: bool) -> bool:
        self.said[self.rank] = mine
        self.barrier.wait(20)
        agreed = all(self.said.values())
        self.barrier.wait(20)  # else the next word of a fast rank would be read by a slow one
        return agreed


def save(step: int, rank: int, world_size: int, best_step: int | None = None) -> Save:
    count = len(WHOLE) // world_size
    part = Slice((3, 4), rank * count, WHOLE[rank * count : (rank + 1) * count] + step)
    return Save(step, {"weights.a": part}, {"of": rank}, best_step)


def on_threads(world_size: int, work: Callable[[Peers], None]) -> None:
    barrier, said = threading.Barrier(world_size), {}
    peers = [ThreadPeers(rank, barrier, said) for rank in range(world_size)]
    threads = [threading.Thread(target=work, args=(one,), daemon=True) for one in peers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)


def test_a_checkpoint_of_three_ranks_is_whole_and_resharded_on_any_storage(storage: Location) -> None:
    def rank(peers: Peers) -> None:
        writer = CheckpointWriter(storage, peers, keep=2, attempt=7)
        for step in (2, 4, 6):
            writer.start(save(step, peers.rank, 3))
        writer.settle()
        assert writer.refused_step is None

    on_threads(3, rank)
    assert storage.folders() == ["step-00000004", "step-00000006"]
    found = checkpoint.newest(storage)
    assert found is not None
    assert found.step == 6
    assert torch.equal(found.read("weights.a", 3, 7), WHOLE[3:10] + 6)
    assert torch.equal(found.whole().weights["a"], WHOLE.view(3, 4) + 6)


def test_no_manifest_before_every_rank_of_this_attempt_is_done(tmp_path: Path) -> None:
    folder = Location.at(tmp_path)
    target = checkpoint.folder_of(folder, 2)
    (target / "rank-00001.6.json").write(b"{}")  # an earlier attempt's
    barrier, said = threading.Barrier(2), {}
    first, second = (CheckpointWriter(folder, ThreadPeers(r, barrier, said), keep=2, attempt=7) for r in (0, 1))
    first.start(save(2, 0, 2))
    part = tmp_path / "step-00000002/rank-00000-of-00002.safetensors"
    while not part.exists():
        pass
    assert checkpoint.newest(folder) is None
    second.start(save(2, 1, 2))
    both = [threading.Thread(target=writer.settle) for writer in (first, second)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join(20)
    found = checkpoint.newest(folder)
    assert found is not None
    assert torch.equal(found.read("weights.a", 0, 12), WHOLE + 2)


def test_a_save_that_storage_refuses_is_said_and_the_run_goes_on(
    settings, splits, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    common = {"save_strategy": "steps", "report_to": [], "save_total_limit": 9, "lora_r": 32}
    unbroken = settings(**common, save_steps=1)
    train_in_process(unbroken, splits, Seat(), output=Location.at(tmp_path / "a"))
    weights = tmp_path / "a/adapter_model.safetensors"
    # A checkpoint has weights, two moments and the best weights; the adapter alone, and all other files, are smaller.
    with caplog.at_level(logging.WARNING, logger="raytune_ft"), no_larger_than(2 * weights.stat().st_size):
        train_in_process(settings(**common, save_steps=2), splits, Seat(), output=Location.at(tmp_path / "b"))
    for step in (2, 4, 6):
        assert f"checkpoint of step {step} could not be written ([Errno 27] File too large" in caplog.text
    assert Location.at(tmp_path / "b" / CHECKPOINTS).folders() == []
    losses = [[json.loads(line)["loss"] for line in (tmp_path / x / HISTORY).read_text().splitlines()] for x in "ab"]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_one_rank_that_cannot_write_gives_up_the_save_of_all(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = Location.at(tmp_path)

    def rank(peers: Peers) -> None:
        writer = CheckpointWriter(folder, peers, keep=2, attempt=7)
        writer.start(save(2, peers.rank, 2))
        writer.settle()
        if peers.rank == 1:  # a folder stands where its file should
            (tmp_path / "step-00000004/rank-00001-of-00002.safetensors/x").mkdir(parents=True)
        peers.all_say(True)
        writer.start(save(4, peers.rank, 2))
        writer.settle()
        assert writer.refused_step == 4
        peers.all_say(True)
        writer.start(save(6, peers.rank, 2))
        writer.settle()
        assert writer.refused_step is None

    with caplog.at_level(logging.WARNING, logger="raytune_ft"):
        on_threads(2, rank)
    assert "checkpoint of step 4 could not be written ([Errno 21] Is a directory" in caplog.text
    assert folder.folders() == ["step-00000002", "step-00000006"]


def written(folder: Location, *steps: int) -> None:
    for step in steps:
        checkpoint.write(folder, checkpoint.Checkpoint(step, {"a": WHOLE}, {}, {}), keep=99)


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [(2, None, [3, 4]), (2, 1, [1, 4]), (1, 1, [1, 4]), (1, 4, [4]), (3, 3, [2, 3, 4]), (2, 9, [3, 4])],
)
def test_the_best_checkpoint_stays_within_the_limit(keep: int, best: int | None, left: list[int], tmp_path) -> None:
    folder = Location.at(tmp_path)
    written(folder, 1, 2, 3, 4)
    delete_old(folder, 4, keep=keep, best_step=best, verified=set())
    assert checkpoint.steps_below(folder) == left


def test_nothing_is_deleted_before_a_newer_one_was_read_and_found_whole(tmp_path, caplog) -> None:
    folder = Location.at(tmp_path)
    written(folder, 1, 2)
    damaged = tmp_path / "step-00000002/rank-00000-of-00001.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    delete_old(folder, 2, keep=1, best_step=None, verified=set())
    assert checkpoint.steps_below(folder) == [1, 2]
    assert "step 2 is not whole (rank-00000-of-00001.safetensors does not match the manifest" in caplog.text
    assert checkpoint.newest(folder).step == 1


def test_unfinished_checkpoints_do_not_count_and_go(tmp_path: Path) -> None:
    folder = Location.at(tmp_path)
    for step in (2, 6):
        checkpoint.write(folder, checkpoint.Checkpoint(step, {"w": torch.ones(2)}, {}, {}), keep=9)
    for step in (4, 8):
        (tmp_path / f"step-0000000{step}").mkdir()
        (tmp_path / f"step-0000000{step}/rank-00000-of-00001.safetensors").write_bytes(b"x")
    delete_old(folder, 6, keep=2, best_step=None, verified={6})
    assert folder.folders() == ["step-00000002", "step-00000006", "step-00000008"]


def test_checkpoints_beyond_the_newest_neither_count_nor_go(tmp_path: Path) -> None:
    """A damaged one was passed over, and the run has not come so far again."""
    folder = Location.at(tmp_path)
    written(folder, 2, 4, 6, 8)
    delete_old(folder, 4, keep=1, best_step=None, verified={4})
    assert checkpoint.steps_below(folder) == [4, 6, 8]


def test_what_was_read_of_a_checkpoint_that_goes_says_nothing_of_those_that_stay(tmp_path: Path, caplog) -> None:
    folder, verified = Location.at(tmp_path), {1}
    written(folder, 1, 2)
    (tmp_path / "step-00000002/progress.json").write_text("[]")
    delete_old(folder, 2, keep=1, best_step=None, verified=verified)
    assert checkpoint.steps_below(folder) == [1, 2] and "step 2 is not whole" in caplog.text
    written(folder, 3)
    delete_old(folder, 3, keep=1, best_step=None, verified=verified)
    assert checkpoint.steps_below(folder) == [3] and 3 in verified  # it was read, and need not be again


def test_a_file_that_does_not_read_back_as_it_was_written_makes_no_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Location.at(tmp_path)
    writer = CheckpointWriter(folder, ALONE, keep=1, attempt=1)
    writer.start(save(2, 0, 1))
    writer.settle()

    def lossy(target: Location, *given: object) -> object:
        files = write_rank(target, *given)  # type: ignore[arg-type]
        for name in files:
            content = Path((target / name).path).read_bytes()
            Path((target / name).path).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        return files

    monkeypatch.setattr("raytune_ft.training.writer.write_rank", lossy)
    writer.start(save(4, 0, 1))
    with caplog.at_level(logging.WARNING, logger="raytune_ft"):
        writer.settle()
    assert writer.refused_step == 4
    assert "step 4 could not be written (rank-00000-of-00001.safetensors does not read back as it was" in caplog.text
    assert folder.folders() == ["step-00000002"]

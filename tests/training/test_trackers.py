"""Trackers: event files by TensorBoard's own protocol, refusals before training, and failures that are counted."""

from __future__ import annotations

import logging
import os
import resource
import shutil
import struct
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from raytune_ft.core.errors import ConfigError, MissingDependencyError
from raytune_ft.core.storage import Location
from raytune_ft.training.config import Tracking
from raytune_ft.training.event_file import EventFile
from raytune_ft.training.trackers import TensorBoard, Trackers, refuse_missing

from ..processes import no_larger_than, unshrinkable_file  # noqa: TID252 - tests are no installed package
from ..wandb_runs import Offline  # noqa: TID252 - tests are no installed package


def scalars(folder: Path) -> list[tuple[int, str, float]]:
    """Step, tag and value of each scalar: records of a length, its checksum, a protocol buffer and its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    (file,) = folder.glob("events.out.tfevents.*")
    data, found = file.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + length])
        found += [(event.step, value.tag, round(value.simple_value, 6)) for value in event.summary.value]
        data = data[16 + length :]
    return found


def records(folder: Path) -> list[bytes]:
    """Each event without its time, after a check of its checksums."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    (file,) = folder.glob("events.out.tfevents.*")
    data, found = file.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        said = data[12 : 12 + length]
        assert struct.unpack("<I", data[8:12])[0] == masked_crc32c(data[:8])
        assert struct.unpack("<I", data[12 + length : 16 + length])[0] == masked_crc32c(said)
        event = Event.FromString(said)
        event.wall_time = 0.0
        found.append(event.SerializeToString())
        data = data[16 + length :]
    return found


def test_event_files_have_every_metric_and_begin_anew_from_the_history(tmp_path: Path) -> None:
    first = TensorBoard(tmp_path)
    first.log({"step": 1, "loss": 9.0})
    first.close("failed")
    again = TensorBoard(tmp_path)
    again.recall([{"step": 1, "loss": 2.0}])
    again.log({"step": 2, "loss": 1.5, "eval_loss": float("nan"), "grad_norm": 0.25})
    again.close("finished")
    assert scalars(tmp_path) == [(1, "loss", 2.0), (2, "loss", 1.5), (2, "grad_norm", 0.25)]


def test_a_full_disk_stops_no_run_and_leaves_whole_records_that_go_on_once_there_is_room(tmp_path: Path) -> None:
    trackers = Trackers.start([Tracking.TENSORBOARD], folder=tmp_path, run="r", settings={})
    rows = [{"step": step, **{f"metric{n}": 1.0 for n in range(9)}} for step in range(100)]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    trackers.log(rows[0])
    (file,) = tmp_path.glob("events.out.tfevents.*")
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 100, before[1]))
    try:
        for row in rows[1:-1]:
            trackers.log(row)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    trackers.log(rows[-1])
    trackers.close("finished")
    assert trackers.failures == {"tensorboard": 98}
    assert [step for step, _, _ in scalars(tmp_path)] == [0] * 9 + [99] * 9


def test_why_events_were_not_written_is_told_also_where_a_half_cannot_be_taken_back(tmp_path: Path) -> None:
    events = EventFile(tmp_path / "first")
    events.close()
    events._file = os.fdopen(unshrinkable_file(), "r+b", buffering=0)
    events.add({"loss": 2.0}, 1)
    with no_larger_than(events._file.tell() + 10), pytest.raises(OSError, match="File too large"):
        events.add({"loss": 1.0}, 2)
    events.add({"loss": 0.5}, 3)
    events._file.seek(0)
    (tmp_path / "events.out.tfevents.1.here").write_bytes(events._file.read())
    events.close()
    assert scalars(tmp_path) == [(1, "loss", 2.0), (3, "loss", 0.5)]


def test_event_files_have_the_checksums_that_tensorboards_own_writer_puts(tmp_path: Path) -> None:
    from tensorboardX import SummaryWriter

    ours, theirs = tmp_path / "ours", SummaryWriter(str(tmp_path / "theirs"))
    tracker = TensorBoard(ours)
    tracker.log({"step": 3, "loss": 0.5})
    tracker.close("finished")
    theirs.add_scalar("loss", 0.5, 3, walltime=0.0)
    theirs.close()
    assert records(tmp_path / "ours") == records(tmp_path / "theirs")


@pytest.mark.parametrize("name", [Tracking.MLFLOW, Tracking.WANDB])
def test_a_tracker_that_is_not_installed_is_refused_with_the_command(
    name: Tracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name.value, None)  # as good as not installed, where it is
    with pytest.raises(MissingDependencyError, match=f"pip install {name}"):
        refuse_missing([Tracking.TENSORBOARD, name])


def test_a_tracker_that_cannot_start_fails_the_run_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"tensorboard cannot start.*nothing was trained"):
        Trackers.start([Tracking.TENSORBOARD], folder=tmp_path / "file", run="r", settings={})


def test_a_tracker_that_fails_later_is_warned_about_once_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    class Full:
        def recall(self, rows):
            pass

        def log(self, row):
            raise OSError("No space left on device")

        def close(self, status):
            raise OSError("No space left on device")

    trackers = Trackers({Tracking.TENSORBOARD: Full()})
    with caplog.at_level(logging.WARNING, logger="raytune_ft"):
        trackers.log({"step": 1, "loss": 1.0})
        trackers.log({"step": 2, "loss": 1.0})
        trackers.close("finished")
    assert trackers.failures == {"tensorboard": 3}
    assert caplog.text.count("No space left") == 1


@pytest.mark.skipif(find_spec("mlflow") is None, reason="the extra `trackers` is not installed")
def test_mlflow_goes_on_with_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/m.db")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/m.db")
    for step in (1, 2):
        trackers = Trackers.start([Tracking.MLFLOW], folder=tmp_path, run="/x/model", settings={"lora_r": 8})
        trackers.log({"step": step, "loss": 3.0 - step})
        trackers.close("finished" if step == 2 else "failed")
        assert trackers.failures == {"mlflow": 0}
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("raytune_ft").experiment_id])
    assert (run.info.status, run.data.params["lora_r"]) == ("FINISHED", "8")
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")] == [(1, 2.0), (2, 1.0)]


def test_wandb_goes_on_with_the_same_run(tmp_path: Path, offline_wandb: Offline) -> None:
    for step in (1, 2):
        trackers = Trackers.start([Tracking.WANDB], folder=tmp_path, run="/x/model", settings={"lora_r": 8})
        trackers.recall([{"step": 1, "loss": 2.0}][: step - 1])  # the run there has it
        trackers.log({"step": step, "loss": 3.0 - step, "eval_loss": float("nan")})
        trackers.close("finished" if step == 2 else "failed")
        assert trackers.failures == {"wandb": 0}
        offline_wandb.anew()
    first, again = offline_wandb.runs()
    assert first.key == again.key and (first.name, first.project) == ("model", "raytune_ft")
    assert first.settings == {"lora_r": 8}
    assert [first.rows, again.rows] == [[{"step": 1, "loss": 2.0}], [{"step": 2, "loss": 1.0}]]
    assert (first.exit_code, again.exit_code) == (1, 0)


def test_a_run_that_begins_anew_in_its_folder_is_another_one_in_trackers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: list[str] = []
    monkeypatch.setattr("raytune_ft.training.trackers.refuse_missing", lambda names: None)
    monkeypatch.setattr("raytune_ft.training.trackers.MLflow", lambda run, settings, key: keys.append(key))

    def begin() -> Trackers:
        kept = Location.at(tmp_path / "model/checkpoints/trackers.txt")
        return Trackers.start([Tracking.MLFLOW], folder=tmp_path, run=str(tmp_path / "model"), settings={}, kept=kept)

    begin()  # which ends before it has a checkpoint: nothing goes on with it
    assert not (tmp_path / "model").exists()
    begin().go_on_later()
    begin()
    shutil.rmtree(tmp_path / "model")
    begin()
    first, second, resumed, anew = keys
    assert second == resumed
    assert len({first, second, anew}) == 3

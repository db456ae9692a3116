"""What storage does not take: the state of a search stays whole, and the search ends."""

from __future__ import annotations

import errno
import logging
import pickle
import re
import resource
from pathlib import Path

import pyarrow.fs
import pytest

from raytune_ft.core.errors import ArtifactError
from raytune_ft.core.storage import Location
from raytune_ft.tuning.config import SweepConfig
from raytune_ft.tuning.refusals import for_ray, raise_noted, told_of
from raytune_ft.tuning.run import HyperparameterSweep


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A file that Ray Tune has written before."""
    file = tmp_path / "sweep/ray/experiment_state.json"
    file.parent.mkdir(parents=True)
    file.write_text("the one before")
    return file


def upload(folder: Path, content: bytes, most: int = resource.RLIM_INFINITY) -> None:
    """Puts a new state over the one in a folder, as Ray does; of a file only so many bytes are taken."""
    staged = folder.parent / "staged"
    staged.mkdir(exist_ok=True)
    (staged / "experiment_state.json").write_bytes(content)
    path, filesystem = for_ray(Location.at(folder))
    filesystem = pickle.loads(pickle.dumps(filesystem))  # as it gets into Ray's processes
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        pyarrow.fs.copy_files(str(staged), path, destination_filesystem=filesystem)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_state_that_is_written_takes_the_place_of_the_one_before(state: Path) -> None:
    upload(state.parent, b"a new one")
    assert state.read_bytes() == b"a new one"
    assert list(state.parent.iterdir()) == [state]
    upload(state.parent, b"")
    assert state.read_bytes() == b""


def test_a_state_that_the_disk_does_not_take_leaves_the_one_before_and_ends_the_search(state: Path) -> None:
    with pytest.raises(OSError, match="File too large") as ended, told_of():
        with pytest.raises(OSError, match="File too large"):  # in a thread of Ray's, which says nothing of it
            upload(state.parent, bytes(1 << 20), most=1 << 16)
        raise_noted()
    assert ended.value.errno == errno.EFBIG
    assert state.read_text() == "the one before"
    assert list(state.parent.iterdir()) == [state]
    with told_of():  # the next search begins without it
        raise_noted()


def test_only_what_storage_does_not_take_is_kept_out_of_ray_tunes_log(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("ray.tune.execution.tune_controller")
    caplog.set_level(logging.WARNING, logger=log.name)  # Ray, once started, says less
    with pytest.raises(OSError, match="full"), told_of():
        log.error("Trial task failed for trial a", exc_info=ZeroDivisionError("no rows"))
        raise_noted()
        log.error("Trial task failed for trial b", exc_info=OSError(errno.ENOSPC, "full"))
        log.warning("no error")
    assert [record.message for record in caplog.records] == ["Trial task failed for trial a", "no error"]
    log.error("another search's", exc_info=OSError(errno.ENOSPC, "full"))
    assert "another search's" in caplog.text


@pytest.mark.ray
def test_a_sweep_ends_on_a_full_disk_and_the_same_call_goes_on_and_keeps_its_finished_trials(
    ray_cluster, small_disk, tiny_model: Path, orders: Path, caplog: pytest.LogCaptureFixture
) -> None:
    disk, enlarge = small_disk
    training = {"model_path": str(tiny_model), "dataset_path": str(orders), "max_steps": 20, "report_to": []}
    config = SweepConfig(
        output_dir=str(disk / "sweep"),
        training={**training, "eval_strategy": "steps", "eval_steps": 2},
        space={"lora_r": [2, 256]},
        scheduler="none",
        max_concurrent_trials=1,
    )
    told = "No space left on device.* Make room there, or choose another folder. Then the same command goes on"
    with caplog.at_level(logging.INFO), pytest.raises(ArtifactError, match=told):
        HyperparameterSweep(config).run()
    [finished] = re.findall("trial lora_r=2: done at step 20.*", caplog.text)
    assert "Traceback" not in caplog.text and "bank stopped" not in caplog.text
    caplog.clear()
    enlarge()
    with caplog.at_level(logging.INFO, logger="raytune_ft"):
        made = HyperparameterSweep(config).run()
    # Ray's state may be seconds older than the end of a trial, which then goes on from its last evaluations.
    assert "trial lora_r=2: step 2," not in caplog.text
    assert set(re.findall("trial lora_r=2: done at step 20.*", caplog.text)) <= {finished}
    assert "trial lora_r=256: done at step 20" in caplog.text
    assert {key: made.numbers[key] for key in ("trials", "failed", "steps")} == {"trials": 2, "failed": 0, "steps": 40}

"""What follows from a step's metrics, by hand."""

from __future__ import annotations

import pytest

from raytune_ft.training.config import FineTuningConfig
from raytune_ft.training.monitor import Monitor
from raytune_ft.training.schedule import Timetable
from raytune_ft.training.trackers import Trackers
from raytune_ft.training.utilization import DevicePeak, Work


def test_utilization_is_held_against_what_all_workers_devices_can_do() -> None:
    config = FineTuningConfig(model_path="m", output_dir="o", dataset_path="d")
    timetable = Timetable.of(config, 8, has_validation=False)
    monitor = Monitor(config, timetable, "cpu", 2, Trackers({}), Work(30.0, 10.0), DevicePeak(200.0, "by hand"))
    measured = monitor.measures({"tokens": 100.0, "supervised": 40.0, "step_s": 20.0})
    # 30 x 100 + 10 x 40 operations in 20 s, of 2 x 200 a second
    assert measured["flop_utilization"] == pytest.approx(3400 / 20 / 400)
    assert measured["supervised_share"] == 0.4

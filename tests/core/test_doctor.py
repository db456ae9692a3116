"""The doctor: what is there is OK, what is missing comes with a way to get it."""

import socket
import sys
from importlib import metadata

import pytest

from raytune_ft.core import doctor
from raytune_ft.core.doctor import Verdict, examine


def by_name(findings):
    return {finding.what: finding for finding in findings}


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_this_machine_has_what_a_run_needs(tmp_path):
    findings = by_name(examine(str(tmp_path)))
    assert [f.what for f in findings.values() if f.verdict == Verdict.MISSING] == []
    assert findings["ray"].found == metadata.version("ray")
    assert findings["Python"].found.startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    assert list(tmp_path.iterdir()) == []  # the probe is gone


def test_a_missing_package_is_missing_and_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(doctor, "REQUIRED", ("no-such-package-at-all",))
    monkeypatch.setattr(doctor, "OPTIONAL", {"no-such-extra-at-all": "bench"})
    required, optional = doctor._packages()
    assert (required.verdict, required.remedy) == (Verdict.MISSING, "pip install raytune-ft")
    assert (optional.verdict, optional.remedy) == (Verdict.NOTE, "pip install 'raytune-ft[bench]'")


def test_no_compiler_is_only_a_note(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    finding = doctor._compiler()
    assert finding.verdict == Verdict.NOTE and finding.remedy.startswith("not needed")


def test_storage_that_is_not_there_is_missing_and_is_not_made(tmp_path):
    finding = doctor._storage(str(tmp_path / "mnt"))
    assert finding.verdict == Verdict.MISSING and "there is no such folder" in finding.found
    assert not (tmp_path / "mnt").exists()


def test_a_bucket_is_written_read_and_cleared(s3_bucket):
    assert doctor._storage(s3_bucket).verdict == Verdict.OK
    gone = doctor._storage("s3://no-such-bucket-here")
    assert gone.verdict == Verdict.MISSING and "credentials" in gone.remedy


def test_a_cluster_that_does_not_answer_is_missing():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but nobody listens
        finding = doctor._cluster(f"127.0.0.1:{taken.getsockname()[1]}")
    assert finding.verdict == Verdict.MISSING and "unset RAY_ADDRESS" in finding.remedy

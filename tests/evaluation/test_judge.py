"""A page for judges whose folder is of no use."""

from __future__ import annotations

from pathlib import Path

import pytest

from raytune_ft.core.errors import ArtifactError
from raytune_ft.evaluation.judge import conclude, judge
from raytune_ft.evaluation.judging import Vote
from raytune_ft.evaluation.votes import VOTES, VotesFile

from .conftest import MakeReport

SAID = {"base": ["a", "b"], "tuned": ["a", "c"]}


def test_a_folder_that_votes_cannot_be_written_into_is_told_before_anyone_votes(
    make_report: MakeReport, tmp_path: Path
) -> None:
    report = make_report("report", SAID)
    (tmp_path / "file").touch()
    for where in ("file", "file/below"):
        with pytest.raises(ArtifactError, match=rf"{where}: the storage refused: .*choose another folder"):
            judge(report.location.path, output_dir=str(tmp_path / where))


def test_a_full_disk_is_told_when_the_page_is_written_and_when_votes_are_summed_up(
    make_report: MakeReport, tmp_path: Path
) -> None:
    report, full = make_report("report", SAID), r"votes: the storage refused: .*No space left on device"
    folder = tmp_path / "votes"
    with VotesFile(folder) as votes:
        votes.append(Vote("ann", "row1", "tuned", "base", "model", "tuned"))
    for name in ("page.html", "report.html"):
        (folder / name).symlink_to("/dev/full")  # takes nothing
    with pytest.raises(ArtifactError, match=full):
        judge(report.location.path, output_dir=str(folder))
    kept = (folder / VOTES).read_text()
    with pytest.raises(ArtifactError, match=full):
        conclude(report.location.path, str(folder))
    assert (folder / VOTES).read_text() == kept
    (folder / "report.html").unlink()
    assert conclude(report.location.path, str(folder)).votes == 1

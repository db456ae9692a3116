from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from raytune_ft.core.errors import ArtifactError, ConfigError
from raytune_ft.evaluation.judging import Vote
from raytune_ft.evaluation.votes import VOTES, VotesFile, parse_votes

from ..processes import no_larger_than, unshrinkable_file  # noqa: TID252 - tests are no installed package

VOTE = Vote("Ünal <b>", "row1", "tuned", "base", "tie", "base", "2026-01-01")

CASTING = """
import itertools, sys
from pathlib import Path
from raytune_ft.evaluation.judging import Vote
from raytune_ft.evaluation.votes import VotesFile
with VotesFile(Path(sys.argv[1])) as votes:
    for number in itertools.count():
        votes.append(Vote("ann", f"row{number}", "tuned", "base", "model", "tuned"))
        print(number, flush=True)
"""


def test_what_was_confirmed_outlives_a_kill(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    caster = subprocess.Popen(
        [sys.executable, "-c", CASTING, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert caster.stdout is not None
    confirmed = [int(caster.stdout.readline()) for _ in range(50)]
    caster.send_signal(signal.SIGKILL)
    caster.wait()
    with VotesFile(tmp_path) as votes:
        rows = [vote.row for vote in votes.votes]
        assert rows[:50] == [f"row{number}" for number in confirmed]
        assert rows == [f"row{number}" for number in range(len(rows))]


def test_an_unfinished_last_line_is_cut_off_and_the_next_vote_is_whole(tmp_path: Path) -> None:
    with VotesFile(tmp_path) as votes:
        votes.append(VOTE)
    whole = (tmp_path / VOTES).read_bytes()
    (tmp_path / VOTES).write_bytes(whole + whole[:40])
    with VotesFile(tmp_path) as votes:
        assert votes.votes == [VOTE]
        votes.append(VOTE)
    assert (tmp_path / VOTES).read_bytes() == whole * 2


def test_a_vote_that_the_disk_does_not_take_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    import resource

    with VotesFile(tmp_path) as votes:
        votes.append(VOTE)
        size = (tmp_path / VOTES).stat().st_size
        before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, before[1]))
        try:
            with pytest.raises(OSError, match=r"part|large"):
                votes.append(VOTE)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)
        assert (tmp_path / VOTES).stat().st_size == size
        assert votes.votes == [VOTE]
        votes.append(VOTE)
    assert len(parse_votes((tmp_path / VOTES).read_text(), "v")) == 2


def test_why_a_vote_was_not_written_is_told_also_where_a_half_of_it_cannot_be_taken_back(tmp_path: Path) -> None:
    with VotesFile(tmp_path) as votes:
        os.close(votes._file)
        votes._file = unshrinkable_file()
        votes.append(VOTE)
        whole = os.fstat(votes._file).st_size
        with no_larger_than(whole + 10), pytest.raises(OSError, match="the disk took only a part of it"):
            votes.append(VOTE)
        with pytest.raises(OSError, match="Operation not permitted"):  # rather than go on from the half of a line
            votes.append(VOTE)
        assert (os.fstat(votes._file).st_size, votes.votes) == (whole + 10, [VOTE])


def test_a_second_server_on_the_same_votes_is_refused(tmp_path: Path) -> None:
    with VotesFile(tmp_path), pytest.raises(ConfigError, match="another `raytune-ft judge` has it open"):
        VotesFile(tmp_path)
    with VotesFile(tmp_path) as votes:
        assert votes.votes == []


@pytest.mark.parametrize("line", ["{}", "not json", '{"judge": 1}', "[]"])
def test_a_damaged_line_is_named(line: str) -> None:
    with pytest.raises(ArtifactError, match=r"votes.jsonl:2: is not a vote"):
        parse_votes(f"\n{line}\n", "votes.jsonl")


def test_a_choice_that_nobody_can_make_is_no_vote() -> None:
    line = '{"judge": "a", "row": "r", "model": "m", "other": "o", "choice": "left", "left": "m"}\n'
    with pytest.raises(ArtifactError, match="expected one of model, other, tie, both bad"):
        parse_votes(line, "v")

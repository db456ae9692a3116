"""The server by plain HTTP: what it tells, what it takes, and what it refuses."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from raytune_ft.cli import app
from raytune_ft.evaluation.judge import JudgingFolder
from raytune_ft.evaluation.judge_server import JudgeServer, judge_name, render_page
from raytune_ft.evaluation.pairs import pairs
from raytune_ft.evaluation.results import read_result
from raytune_ft.evaluation.votes import VOTES, VotesFile

HOSTILE = "</script><script>document.title='owned'</script><!-- <script> &lt; \u2028"
SAID = {"secret-base": ["one", HOSTILE], "secret-tuned": ["two", "three"]}
JSON = {"Content-Type": "application/json"}


@pytest.fixture
def server(make_result: Any, tmp_path: Path) -> Iterator[JudgeServer]:
    with VotesFile(tmp_path) as votes, JudgeServer(pairs(make_result(SAID)), votes) as serving:
        thread = threading.Thread(target=serving.serve_forever, args=(0.02,))
        thread.start()
        yield serving
        serving.shutdown()
        thread.join()


def ask(server: JudgeServer, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, bytes]:
    connection = HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    connection.request(method, path, data, {**JSON, **{name.replace("_", "-"): v for name, v in headers.items()}})
    reply = connection.getresponse()
    content = reply.read()
    connection.close()
    return reply.status, content


def test_the_page_names_no_model_and_what_models_say_cannot_leave_its_place(make_result: Any) -> None:
    page = render_page(pairs(make_result(SAID)))
    assert "secret" not in page
    assert len(re.findall(r"<script", page)) == len(re.findall(r"</script", page)) == 2
    data = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    answers = {pair[side] for pair in json.loads(data.group(1))["pairs"] for side in "ab"}
    assert answers == {"one", "two", "three", HOSTILE}
    assert not re.search(r'(?:src|href)="', page)


def test_a_vote_is_on_disk_when_it_is_confirmed_and_is_told_again(server: JudgeServer, tmp_path: Path) -> None:
    first, second = server.pairs.values()
    for pair, choice in ((first, "a"), (second, "both bad")):
        vote = {"judge": " Ann  Lee ", "pair": pair.id, "choice": choice, "left": "b"}
        assert ask(server, "POST", "/votes", vote) == (200, b'{"saved": true}')
    stored = [json.loads(line) for line in (tmp_path / VOTES).read_text().splitlines()]
    assert [entry["judge"] for entry in stored] == ["Ann Lee"] * 2
    assert stored[0]["choice"] == ("model" if first.labels["a"] == first.model else "other")
    assert stored[0]["left"] == first.labels["b"]
    assert stored[1]["choice"] == "both bad"
    status, content = ask(server, "GET", "/votes?judge=Ann%20Lee")
    assert (status, json.loads(content)["votes"][first.id]) == (200, {"choice": "a", "left": "b"})
    assert json.loads(ask(server, "GET", "/votes?judge=Bob")[1]) == {"votes": {}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pair": "ffff"}, "there is no such pair"),
        ({"choice": "left"}, "choice: must be a, b, tie or both bad"),
        ({"left": "c"}, "left: must be a or b"),
        ({"judge": "  "}, "judge: expected a name of 1 to 80 letters"),
        ({"judge": "x" * 81}, "judge: expected a name"),
        ({"judge": None}, "judge: expected a text"),
        ({"judge": "x" * 5000}, "a vote has at most 4096 bytes"),
    ],
)
def test_what_is_no_vote_is_refused_and_not_stored(
    server: JudgeServer, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    vote = {"judge": "ann", "pair": next(iter(server.pairs)), "choice": "a", "left": "a"}
    status, content = ask(server, "POST", "/votes", {**vote, **change})
    assert (status, words in json.loads(content)["error"]) == (400, True), content
    assert (tmp_path / VOTES).read_bytes() == b""


def test_nonsense_is_answered_with_a_message(server: JudgeServer) -> None:
    assert ask(server, "POST", "/votes", b"{")[0] == 400
    assert ask(server, "POST", "/votes", b"[]")[0] == 400
    assert ask(server, "POST", "/votes", b"[" * 4000)[0] == 400
    assert ask(server, "POST", "/votes", b"{}", Content_Length="\u00b2")[0] == 400
    assert ask(server, "POST", "/elsewhere", {})[0] == 404
    assert ask(server, "GET", "/../../etc/passwd")[0] == 404


def test_other_sites_pages_are_refused(server: JudgeServer, tmp_path: Path) -> None:
    vote = {"judge": "ann", "pair": next(iter(server.pairs)), "choice": "a", "left": "a"}
    assert ask(server, "POST", "/votes", vote, Origin="http://evil.example")[0] == 403
    assert ask(server, "GET", "/", Host="evil.example")[0] == 403
    assert ask(server, "POST", "/votes", vote, Origin="http://localhost:1")[0] == 403
    assert ask(server, "POST", "/votes", vote, Content_Type="text/plain")[0] == 404
    assert (tmp_path / VOTES).read_bytes() == b""
    assert ask(server, "POST", "/votes", vote, Origin=server.url.rstrip("/"))[0] == 200


def test_names_keep_their_letters_and_lose_their_blanks() -> None:
    assert judge_name("  Ünal \t Öz ") == "Ünal Öz"
    with pytest.raises(ValueError, match="expected a name"):
        judge_name("a\u202eb")


def test_votes_join_the_report_and_become_preferences(make_report: Any) -> None:
    report = make_report("report", SAID)
    folder = JudgingFolder.of(str(report.location))
    empty = CliRunner().invoke(app, ["judge", str(report.location), "--summary"])
    assert (empty.exit_code, "holds no votes" in empty.stderr) == (2, True)
    shown = pairs(folder.result)
    with VotesFile(folder.path) as votes, JudgeServer(shown, votes) as server:
        for pair in shown.shown:
            side = next(name for name, label in pair.labels.items() if label == "secret-tuned")
            server.take({"judge": "ann", "pair": pair.id, "choice": side, "left": "a"})
    found = CliRunner().invoke(app, ["judge", str(report.location), "--summary"])
    assert found.exit_code == 0, found.stderr
    assert "People: cannot tell secret-tuned from secret-base on 2 rows (win rate 100%" in found.stdout
    result = read_result(str(report.location))  # the report's own files are as they were
    assert result.judging is not None
    assert result.judging.win_rates[0].win_rate == 1.0
    for name in ("report.html", "report.md"):
        assert "People: cannot tell secret-tuned" in (folder.path / name).read_text()
    assert json.loads((folder.path / "results.json").read_text())["judging"]["votes"] == 2
    lines = (folder.path / "preferences.jsonl").read_text().strip().split("\n")
    assert {json.loads(line)["chosen"][0]["content"] for line in lines} == {"two", "three"}

"""The pages in a real headless Chromium, driven by its keyboard over the DevTools protocol."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raytune_ft.evaluation.pairs import pairs
from raytune_ft.evaluation.results import read_result

from ..browser import PATIENCE_S, Tab  # noqa: TID252 - tests are no installed package

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> &lt;b&gt;"
LONG = "Donaudampfschifffahrt" * 60
SAID = {
    "base": [HOSTILE, "plain 1", "plain 2", "plain 3", "plain 4", "", "same"],
    "tuned": [LONG, HOSTILE * 3, "line\n" * 80, "\u202eabc", "answer 4", "answer 5", "same"],
}


class Server:
    """``raytune-ft judge`` as a process, which can be killed and started again on the same port."""

    def __init__(self, report: str) -> None:
        self.report = report
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        self.start()

    def start(self) -> None:
        # As a terminal starts it: a test run in the background hands down that Ctrl-C is ignored.
        command = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        command += "from raytune_ft.cli import main; main()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", command, "judge", self.report, "--port", str(self.port)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        until = time.monotonic() + PATIENCE_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
                return
            except OSError:
                assert self.process.poll() is None, self.process.communicate()[0]
                assert time.monotonic() < until
                time.sleep(0.05)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(PATIENCE_S)

    def stop(self) -> str:
        """By Ctrl-C; gives what it said."""
        self.process.send_signal(signal.SIGINT)
        said = self.process.communicate(timeout=60)[0]
        assert self.process.returncode == 0, said
        return said


@pytest.fixture
def judging(make_report: Any) -> Iterator[Server]:
    server = Server(str(make_report("report", SAID).location))
    yield server
    if server.process.poll() is None:
        server.kill()


def votes(server: Server) -> list[dict[str, str]]:
    lines = (Path(server.report) / "judging/votes.jsonl").read_text().split("\n")
    return [json.loads(line) for line in lines if line]


def begin(tab: Tab, name: str) -> None:
    tab.wait("document.activeElement.id === 'name'")
    tab.type(name)
    tab.press("Enter")
    tab.wait("!document.getElementById('pair').hidden")


def test_a_judge_votes_by_keyboard_through_hostile_answers_a_reload_and_a_killed_server(
    chromium: str, judging: Server
) -> None:
    by_row = {pair.row: pair for pair in pairs(read_result(judging.report)).shown}
    tab = Tab(chromium)
    tab.open(judging.url)
    begin(tab, "Ann")
    assert tab.text("count") == "0 of 6 judged"  # the same answer twice is not shown

    for number, (key, choice) in enumerate(
        (("ArrowRight", "right"), ("ArrowLeft", "left"), ("t", "tie"), ("b", "both bad")), start=1
    ):
        left, right = tab.text("left-text"), tab.text("right-text")
        tab.press(key)
        tab.wait(f"document.getElementById('count').textContent === '{number} of 6 judged'")
        stored = votes(judging)[-1]
        answers = {label: text or "(an empty answer)" for label, text in by_row[stored["row"]].answers.items()}
        assert len(votes(judging)) == number
        assert (left, right) == (
            answers[stored["left"]],
            answers[stored["model"] if stored["left"] == stored["other"] else stored["other"]],
        )
        if choice in ("left", "right"):
            winner = stored["model"] if stored["choice"] == "model" else stored["other"]
            assert answers[winner] == {"left": left, "right": right}[choice]
        else:
            assert stored["choice"] == choice
        assert tab.value("document.title") == "Which answer is better?"
        assert tab.value("document.images.length") == 0
        assert tab.value("document.documentElement.scrollWidth <= innerWidth")

    tab.send("Page.reload")
    tab.wait("document.getElementById('count').textContent === '4 of 6 judged'")
    assert tab.text("who") == "Ann"

    judging.kill()
    tab.press("ArrowLeft")
    tab.wait("!document.getElementById('problem').hidden")
    assert "The server does not answer" in tab.text("problem")
    assert tab.text("count") == "4 of 6 judged"
    judging.start()
    tab.press("ArrowLeft")
    tab.wait("document.getElementById('count').textContent === '5 of 6 judged'")
    assert tab.value("document.getElementById('problem').hidden")
    assert len(votes(judging)) == 5

    tab.press("z")  # back to it, and another mind
    tab.wait("document.querySelector('[data-choice=left].chosen')")
    tab.press("t")
    tab.wait("!document.querySelector('[data-choice].chosen')")
    tab.press("t")
    tab.wait("!document.getElementById('done').hidden")
    assert [vote["choice"] for vote in votes(judging)][-2:] == ["tie", "tie"]
    assert votes(judging)[4]["row"] == votes(judging)[5]["row"]
    assert "6 of 6 pairs" in tab.text("total")
    assert [problem for problem in tab.problems if "ERR_CONNECTION_REFUSED" not in problem] == []

    said = judging.stop()
    assert "People: cannot tell tuned from base on 6 rows" in said
    result = read_result(judging.report)
    assert result.judging is not None
    assert (result.judging.votes, result.judging.judges) == (6, {"Ann": 6})
    assert result.judging.win_rates[0].votes["tie"] == 3


def test_a_double_click_is_one_vote(chromium: str, judging: Server) -> None:
    tab = Tab(chromium)
    tab.open(judging.url)
    begin(tab, "Ann")
    tab.click("[data-choice=left]", times=2)
    tab.click("[data-choice=tie]")
    tab.wait("document.getElementById('count').textContent === '2 of 6 judged'")
    assert [vote["choice"] for vote in votes(judging)][1:] == ["tie"]


def test_a_reload_goes_on_as_the_judge_of_its_tab_whoever_judges_in_another(chromium: str, judging: Server) -> None:
    tab = Tab(chromium)
    tab.open(judging.url)
    begin(tab, "Ann")
    tab.value("localStorage.setItem('judge', 'Bob')")  # as a second person's tab does
    tab.press("t")
    tab.wait("document.getElementById('count').textContent === '1 of 6 judged'")
    tab.value("document.getElementById('count').textContent = ''")
    tab.send("Page.reload")
    tab.wait("document.getElementById('count').textContent === '1 of 6 judged'")
    assert tab.text("who") == "Ann"


def test_a_second_judge_begins_anew_sees_other_sides_and_agreement_is_told(chromium: str, judging: Server) -> None:
    tab = Tab(chromium)
    tab.open(judging.url)
    left = {}
    for name in ("Bob", "Eve"):
        begin(tab, name)
        for number in range(1, 7):
            left[name, number] = tab.text("left-text")
            tab.press("b" if number == 1 else "ArrowLeft" if "answer" in left[name, number] else "ArrowRight")
            tab.wait(f"document.getElementById('count').textContent === '{number} of 6 judged'")
        tab.value("document.getElementById('rename').click()")
    assert {left["Bob", number] == left["Eve", number] for number in range(1, 7)} == {True, False}
    judging.stop()
    result = read_result(judging.report)
    assert result.judging is not None
    assert result.judging.judges == {"Bob": 6, "Eve": 6}
    assert result.judging.agreements[0].shared == 6


def test_the_report_shows_its_plots_and_runs_nothing(chromium: str, make_report: Any) -> None:
    report = make_report("report", SAID, metrics=["exact_match", "perplexity"])
    tab = Tab(chromium)
    tab.open(f"file://{report.location.path}/report.html")
    assert tab.value("document.title") == "The tuned model against its base"
    assert tab.value("document.scripts.length") == 0
    tab.wait("[...document.images].length >= 3 && [...document.images].every(image => image.naturalWidth > 0)")
    assert tab.value("document.documentElement.scrollWidth <= innerWidth")
    shown = "[...document.querySelectorAll('.every .row')].filter(row => row.offsetParent).length"
    assert tab.value(shown) == 7
    tab.value("document.getElementById('show-all').focus()")
    tab.press("ArrowRight")
    assert tab.value(shown) == 6  # where the answers differ

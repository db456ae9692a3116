"""The pages in a real headless Chromium, driven by its keyboard over the DevTools protocol."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raytune_ft.evaluation.pairs import pairs
from raytune_ft.evaluation.results import read_result

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> &lt;b&gt;"
LONG = "Donaudampfschifffahrt" * 60
SAID = {
    "base": [HOSTILE, "plain 1", "plain 2", "plain 3", "plain 4", "", "same"],
    "tuned": [LONG, HOSTILE * 3, "line\n" * 80, "\u202eabc", "answer 4", "answer 5", "same"],
}
PATIENCE_S = 30
KEYS = {"ArrowLeft": 37, "ArrowRight": 39, "Enter": 13}


class Tab:
    """A page of a running Chromium."""

    def __init__(self, address: str) -> None:
        from websockets.sync.client import connect

        self.socket = connect(address, max_size=None, open_timeout=PATIENCE_S)
        self.numbers = itertools.count(1)
        self.errors: list[str] = []
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv(timeout=PATIENCE_S))
            if message.get("id") == number:
                return dict(message["result"]) if "result" in message else {"exceptionDetails": message["error"]}
            if message.get("method") == "Runtime.exceptionThrown":
                self.errors.append(str(message["params"]))

    def value(self, expression: str) -> Any:
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, expression: str) -> None:
        """Until the expression is true."""
        until = time.monotonic() + PATIENCE_S
        # While a page is left for another, there is nothing to ask, which is an error.
        while (
            self.send("Runtime.evaluate", expression=f"Boolean({expression})").get("result", {}).get("value")
            is not True
        ):
            assert time.monotonic() < until, (expression, self.value("document.body.innerText"), self.errors)
            time.sleep(0.03)

    def open(self, address: str) -> None:
        self.send("Page.navigate", url=address)
        self.wait(f"location.href.startsWith({json.dumps(address)}) && document.readyState === 'complete'")

    def press(self, key: str) -> None:
        code = KEYS.get(key, ord(key[0].upper()))
        what = {"key": key, "windowsVirtualKeyCode": code}
        text = {"text": "\r"} if key == "Enter" else {"text": key} if len(key) == 1 else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", **what, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", **what)

    def type(self, text: str) -> None:
        self.send("Input.insertText", text=text)

    def text(self, name: str) -> str:
        return str(self.value(f"document.getElementById('{name}').textContent"))

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Chromium's first page; skips where none is installed, unless one is required."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        said = "no chromium, chromium-browser or google-chrome is on the PATH"
        if os.environ.get("RAYTUNE_FT_REQUIRE_BROWSER"):
            pytest.fail(said)
        pytest.skip(said)
    folder = tmp_path_factory.mktemp("chromium")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    options += ["--remote-debugging-port=0", "--window-size=1200,900", f"--user-data-dir={folder}", "about:blank"]
    process = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port_file = folder / "DevToolsActivePort"
        until = time.monotonic() + PATIENCE_S
        while not port_file.exists() or "\n" not in port_file.read_text():
            assert process.poll() is None and time.monotonic() < until, "Chromium did not start"
            time.sleep(0.05)
        port = port_file.read_text().split("\n")[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as reply:
            pages = [entry for entry in json.load(reply) if entry["type"] == "page"]
        yield pages[0]["webSocketDebuggerUrl"]
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


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
        command = "from raytune_ft.cli import main; main()"
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
    assert tab.errors == []

    said = judging.stop()
    assert "People: cannot tell tuned from base on 6 rows" in said
    result = read_result(judging.report)
    assert result.judging is not None
    assert (result.judging.votes, result.judging.judges) == (6, {"Ann": 6})
    assert result.judging.win_rates[0].votes["tie"] == 3


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

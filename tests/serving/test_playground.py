"""The playground in a real headless Chromium, driven over the DevTools protocol."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PATIENCE_S = 30


class Tab:
    """A page of a running Chromium."""

    def __init__(self, address: str) -> None:
        from websockets.sync.client import connect

        self.socket = connect(address, max_size=None, open_timeout=PATIENCE_S)
        self.numbers = itertools.count(1)
        self.problems: list[str] = []
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv(timeout=PATIENCE_S))
            if message.get("id") == number:
                return dict(message.get("result", message))
            entry = message.get("params", {}).get("entry", {})
            if message.get("method") == "Runtime.exceptionThrown" or entry.get("level") in {"error", "warning"}:
                self.problems.append(json.dumps(message["params"]))

    def value(self, expression: str) -> Any:
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        return found.get("result", {}).get("value")

    def wait(self, expression: str) -> None:
        """Until the expression is true."""
        until = time.monotonic() + PATIENCE_S
        while self.value(f"Boolean({expression})") is not True:
            assert time.monotonic() < until, (expression, self.value("document.body.innerText"), self.problems)
            time.sleep(0.03)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    """The first page of a Chromium; skips where none is installed, unless one is required."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        said = "no chromium, chromium-browser or google-chrome is on the PATH"
        if os.environ.get("RAYTUNE_FT_REQUIRE_BROWSER"):
            pytest.fail(said)
        pytest.skip(said)
    folder = tmp_path_factory.mktemp("chromium")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    options += ["--remote-debugging-port=0", "--window-size=1200,800", f"--user-data-dir={folder}", "about:blank"]
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
        yield Tab(pages[0]["webSocketDebuggerUrl"])
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


def answers(side: str) -> str:
    return f"[...document.querySelectorAll('#{side} .turn.assistant .text')]"


def judgements(endpoint: Any) -> list[dict[str, Any]]:
    folder = Path(endpoint.service.config.feedback_path)
    lines = [line for file in folder.glob("*.jsonl") for line in file.read_text().splitlines()]
    return [json.loads(line) for line in lines]


def say(tab: Tab, text: str) -> None:
    tab.value("document.getElementById('prompt').focus()")
    tab.send("Input.insertText", text=text)
    enter = {"key": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
    tab.send("Input.dispatchKeyEvent", type="keyDown", **enter)
    tab.send("Input.dispatchKeyEvent", type="keyUp", key="Enter", windowsVirtualKeyCode=13)
    tab.wait("document.getElementById('send').disabled || document.querySelector('.judge')")
    tab.wait("!document.getElementById('send').disabled")


def test_one_chats_compares_two_models_and_gives_feedback(tab: Tab, endpoint: Any, tmp_path: Path):
    before = len(judgements(endpoint))
    tab.send("Page.navigate", url=f"{endpoint.root}/playground")
    tab.wait("document.querySelector('#left select')?.options.length === 5")
    tab.value("document.getElementById('temperature').value = 0; document.getElementById('max_tokens').value = 12")
    say(tab, "What is the capital of France?")
    asked: Any = [{"role": "user", "content": "What is the capital of France?"}]
    client = endpoint.client()
    wanted = client.chat.completions.create(model="tiny", messages=asked, temperature=0, max_tokens=12)
    assert tab.value(f"{answers('left')}.at(-1).textContent") == wanted.choices[0].message.content
    tab.value("document.querySelector('#left .judge button[aria-label=\"good answer\"]').click()")
    tab.wait("document.querySelector('#left .judge span').textContent === 'Thank you, kept.'")

    tab.value("document.getElementById('clear').click(); document.getElementById('compare').click()")
    tab.value("document.querySelector('#right select').value = 'tiny:b'")
    say(tab, "<img src=x onerror=\"document.title='owned'\"> red")
    tab.wait("!document.getElementById('prefer').classList.contains('hidden')")
    left, right = (tab.value(f"{answers(side)}.at(-1).textContent") for side in ("left", "right"))
    assert left != right
    tab.value("document.querySelector('#prefer button[data-side=right]').click()")
    tab.wait("document.querySelector('#prefer span').textContent === 'Thank you, kept.'")
    rated, preferred = judgements(endpoint)[before:]
    assert (rated["rating"], rated["response"], rated["messages"]) == ("up", wanted.choices[0].message.content, asked)
    assert (preferred["preferred"], preferred["rejected"], preferred["model"]) == (right, left, "tiny:b")

    tab.screenshot(tmp_path / "playground.png")
    assert tab.value("document.title") == "raytune_ft playground"
    assert tab.value("document.images.length") == 0
    assert tab.value("document.documentElement.scrollWidth <= innerWidth")
    assert [problem for problem in tab.problems if "favicon" not in problem] == []


def test_an_error_is_shown_and_the_chat_goes_on(tab: Tab, endpoint: Any):
    tab.send("Page.navigate", url=f"{endpoint.root}/playground")
    tab.wait("document.querySelector('#left select')?.options.length === 5")
    tab.value("document.getElementById('max_tokens').value = 1000")
    say(tab, "red")
    tab.wait("document.querySelector('.turn.error .text')?.textContent === 'max_tokens: at most 96 here (got 1000)'")
    tab.value("document.getElementById('max_tokens').value = 3")
    say(tab, "blue")
    tab.wait("document.querySelector('.turn.assistant')")

"""A real headless Chromium, driven over the DevTools protocol."""

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
KEYS = {"ArrowLeft": 37, "ArrowRight": 39, "Enter": 13}


class Tab:
    """A page of a running Chromium."""

    def __init__(self, address: str) -> None:
        from websockets.sync.client import connect

        # Every wait has an end of its own; a page that is busy need not answer pings meanwhile.
        self.socket = connect(address, max_size=None, open_timeout=PATIENCE_S, ping_interval=None)
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
                return dict(message["result"]) if "result" in message else {"exceptionDetails": message["error"]}
            entry = message.get("params", {}).get("entry", {})
            if message.get("method") == "Runtime.exceptionThrown" or entry.get("level") in {"error", "warning"}:
                self.problems.append(json.dumps(message["params"]))

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
            assert time.monotonic() < until, (expression, self.value("document.body.innerText"), self.problems)
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

    def click(self, selector: str, times: int = 1) -> None:
        """Clicks the middle of an element; twice is a double click."""
        box = f"document.querySelector({json.dumps(selector)}).getBoundingClientRect()"
        x, y = (self.value(f"{box}.{edge} + {box}.{size} / 2") for edge, size in (("left", "width"), ("top", "height")))
        for count in range(1, times + 1):
            for kind in ("mousePressed", "mouseReleased"):
                self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=count)
            time.sleep(0.1)

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

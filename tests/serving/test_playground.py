"""The playground in a real headless Chromium, driven over the DevTools protocol."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ..browser import Tab  # noqa: TID252 - tests are no installed package


@pytest.fixture(scope="module")
def tab(chromium: str) -> Tab:
    return Tab(chromium)


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

    say(tab, "and now?")
    tab.wait("!document.getElementById('parted').classList.contains('hidden')")
    assert tab.value("document.getElementById('prefer').classList.contains('hidden')")

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

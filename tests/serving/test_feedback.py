"""What comes back is on the disk, survives a crash, and is read as training data."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from raytune_ft.core.records import Message, Record
from raytune_ft.data.formats import detect, to_record
from raytune_ft.data.readers import read_rows
from raytune_ft.data.sources import find_files
from raytune_ft.serving.config import ServingConfig
from raytune_ft.serving.feedback import Feedback, Journal

from ..processes import no_larger_than, unshrinkable_file  # noqa: TID252 - tests are no installed package

ASKED = [{"role": "user", "content": "Grüße?"}]


def records(folder: Path) -> list[Record]:
    """What `prepare` makes of a folder's rows."""
    found = []
    for file in find_files([str(folder)]):
        for row in read_rows(file):
            assert row.values is not None, row.fault
            form = detect(row.values)[0]
            found.append(to_record(row.values, form, source=str(file.label), position=row.position))
    return found


def post(root: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(
        f"{root}/v1/feedback", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_feedback_is_read_back_as_prepare_reads_it(endpoint):
    folder = Path(endpoint.service.config.feedback_path)
    sent = [
        {"messages": ASKED, "response": "A", "rating": "up", "model": "tiny", "id": "chatcmpl-1"},
        {"messages": ASKED, "response": "A", "rating": 2},
        {"messages": ASKED, "response": "A", "correction": "B", "comment": "nearly"},
        {"messages": ASKED, "preferred": "B", "rejected": "A"},
    ]
    for body in sent:
        assert post(endpoint.root, body) == (201, {"status": "kept"})
    asked = (Message("user", "Grüße?"),)
    up, down, corrected, pair = records(folder)[-4:]
    assert (up.messages, up.label) == ((*asked, Message("assistant", "A")), True)
    assert (up.metadata["model"], up.metadata["id"]) == ("tiny", "chatcmpl-1")
    assert down.label is False
    assert corrected.messages == (*asked, Message("assistant", "B"))
    assert (pair.chosen, pair.rejected) == ((Message("assistant", "B"),), (Message("assistant", "A"),))


def test_feedback_takes_the_turns_that_the_endpoint_answers(endpoint):
    parts = [{"type": "text", "text": "Grü"}, {"type": "text", "text": "ße?"}]
    turns: Any = [
        {"role": "developer", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "red"}], "name": "Ada"},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "user", "content": parts},
    ]
    asked = endpoint.client().chat.completions.create(model="tiny", messages=turns, max_tokens=3, temperature=0)
    answer = asked.choices[0].message.content
    assert post(endpoint.root, {"messages": turns, "response": answer, "rating": "up"}) == (201, {"status": "kept"})
    (logged, judged) = (records(Path(path))[-1] for path in (
        endpoint.service.config.request_log_path, endpoint.service.config.feedback_path
    ))  # fmt: skip
    assert judged.messages == logged.messages
    assert [(turn.role, turn.content) for turn in judged.messages[:-1]] == [
        ("system", "Be short."), ("user", "red"), ("assistant", ""), ("user", "Grüße?")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        ({"content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "parts must be text"),
        ({"content": "x", "tool_call_id": "1"}, "messages.0.tool_call_id: this option is not supported"),
        ({"content": None}, "content"),
        ({"content": "\ud800"}, "must be valid Unicode"),
    ],
)
def test_feedback_refuses_the_turns_that_the_endpoint_refuses(turn: dict[str, Any], said: str, endpoint):
    judged = {"messages": [{"role": "user", **turn}], "response": "A", "rating": 1}
    code, body = post(endpoint.root, judged)
    assert code == 400 and said in body["error"]["message"]


def test_the_request_log_holds_conversations_that_prepare_reads(endpoint):
    client = endpoint.client()
    chat = client.chat.completions.create(model="tiny", messages=ASKED, max_tokens=5, temperature=0)
    stream = client.chat.completions.create(model="tiny:a", messages=ASKED, max_tokens=5, temperature=0, stream=True)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    text = client.completions.create(model="tiny", prompt="red", max_tokens=3, temperature=0)
    asked = client.completions.create(model="tiny", prompt="blue", max_tokens=0, echo=True)
    folder = Path(endpoint.service.config.request_log_path)
    (file,) = folder.iterdir()
    scored = json.loads(file.read_text().splitlines()[-1])
    assert (scored["id"], scored["completion"]) == (asked.id, ""), "its one token was never sent"
    found = records(folder)[-4:-1]
    assert [record.metadata["id"] for record in found][::2] == [chat.id, text.id], "feedback names them so"
    assert [record.messages[-1].content for record in found] == [
        chat.choices[0].message.content, streamed, text.choices[0].text
    ]  # fmt: skip
    assert [record.messages[0].content for record in found] == ["Grüße?", "Grüße?", "red"]
    assert [record.metadata["model"] for record in found] == ["tiny", "tiny:a", "tiny"]
    assert file.stat().st_mode & 0o077 == 0, "others may read what was asked"


def test_an_answer_is_not_withheld_where_the_log_cannot_be_written(tiny_model: Path, tmp_path: Path, serve_here: Any):
    (tmp_path / "file").write_text("no folder")
    config = ServingConfig(model_path=str(tiny_model), name="tiny", request_log_path=str(tmp_path / "file"))
    with serve_here(config) as running:
        asked: Any = {"model": "tiny", "prompt": "red", "max_tokens": 3}
        assert running.client().completions.create(**asked).choices
        assert list(running.client().completions.create(**asked, stream=True))[-1].choices[0].finish_reason
        with urllib.request.urlopen(f"{running.root}/metrics", timeout=30) as answer:
            assert 'raytune_ft_log_lost_total{replica="r1"} 2.0' in answer.read().decode()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"response": "A"}, "a judgement is needed"),
        ({"rating": "up"}, "response: the answer that is judged is needed"),
        ({"response": "A", "rating": 6}, "from 1 to 5"),
        ({"response": "A", "rating": True}, "not true or false; send up for true and down for false"),
        ({"preferred": "A"}, "one is nothing without the other"),
        ({"preferred": "A", "rejected": "A"}, "are the same answer"),
        ({"response": "A", "rating": "down", "correction": "A"}, "is the answer that it corrects"),
        ({"response": "A", "rating": "up", "path": "/etc/passwd"}, "path"),
    ],
)
def test_feedback_that_says_nothing_is_refused(body: dict[str, Any], said: str):
    with pytest.raises(ValidationError, match=said):
        Feedback.model_validate({"messages": ASKED, **body})


def test_feedback_must_be_of_what_was_asked(endpoint):
    code, body = post(
        endpoint.root, {"messages": [{"role": "assistant", "content": "x"}], "response": "A", "rating": 1}
    )
    assert (code, body["error"]["type"]) == (400, "invalid_request_error")
    code, body = post(endpoint.root, {"messages": ASKED, "response": "\ud800", "rating": 1})
    assert code == 400


def test_every_line_is_whole_whatever_writes_beside_it(tmp_path: Path):
    journal = Journal(tmp_path, "feedback-r1")
    assert list(tmp_path.iterdir()) == [], "a file without lines would be no source"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: journal.append({"n": number, "text": "x" * 5000}), range(64)))
    journal.close()
    lines = journal.path.read_text().splitlines()
    assert sorted(json.loads(line)["n"] for line in lines) == list(range(64))


def test_a_line_that_does_not_fit_on_the_disk_leaves_the_others_whole(tmp_path: Path):
    program = (
        "import resource, signal, sys\n"
        "from raytune_ft.serving.feedback import Journal\n"
        f"journal = Journal({str(tmp_path)!r}, 'feedback-r1')\n"
        "journal.append({'n': 1})\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "everything = resource.getrlimit(resource.RLIMIT_FSIZE)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (journal.path.stat().st_size + 4, everything[1]))\n"
        "try:\n"
        "    sys.exit(journal.append({'n': 2}) or 'it was written')\n"
        "except OSError:\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, everything)\n"
        "journal.append({'n': 3})\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    (file,) = tmp_path.iterdir()
    assert [json.loads(line)["n"] for line in file.read_text().splitlines()] == [1, 3]


def test_why_a_line_was_not_written_is_told_also_where_a_half_of_it_cannot_be_taken_back(tmp_path: Path):
    journal = Journal(tmp_path, "feedback-r1")
    journal._file = file = unshrinkable_file()
    journal.append({"n": 1})
    whole = os.fstat(file).st_size
    with no_larger_than(whole + 4), pytest.raises(OSError, match="File too large"):
        journal.append({"n": 2})
    assert os.fstat(file).st_size == whole + 4
    with pytest.raises(OSError, match="Operation not permitted"):  # rather than go on from the half of a line
        journal.append({"n": 3})
    assert os.fstat(file).st_size == whole + 4
    journal.close()


def test_lines_that_the_disk_does_not_take_are_told_once_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    journal = Journal(tmp_path, "requests-r1")
    everything = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4, everything[1]))
    try:
        lost = [journal.keep({"n": number}) for number in range(3)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, everything)
    assert lost == [False] * 3
    assert journal.keep({"n": 3}) and journal.keep({"n": 4})
    assert [json.loads(line)["n"] for line in journal.path.read_text().splitlines()] == [3, 4]
    assert [record.message.partition(" Make")[0] for record in caplog.records] == [
        f"{journal.path}: cannot be written (File too large): lines are lost until it can.",
        f"{journal.path}: is written again; 3 lines were lost",
    ]


def test_what_was_acknowledged_survives_a_kill(tmp_path: Path):
    program = (
        "import itertools, sys\n"
        "from raytune_ft.serving.feedback import Journal\n"
        f"journal = Journal({str(tmp_path)!r}, 'feedback-r1')\n"
        "for n in itertools.count():\n"
        "    journal.append({'n': n})\n"
        "    print(n, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) == 20:
            os.kill(process.pid, signal.SIGKILL)
            break
    acknowledged = 20 + len(process.stdout.readlines())
    process.wait()
    (file,) = tmp_path.iterdir()
    kept = [json.loads(line)["n"] for line in file.read_text().splitlines()]
    assert kept == list(range(len(kept)))
    assert len(kept) > acknowledged

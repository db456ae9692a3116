"""The local server of the judging page: it gives the page, and takes votes; to this machine alone."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from raytune_ft.core.errors import ConfigError
from raytune_ft.core.loopback import asked_by_own_name
from raytune_ft.core.manifest import now
from raytune_ft.core.pages import template
from raytune_ft.evaluation.judging import Choice, Vote
from raytune_ft.evaluation.pairs import Pair, Pairs
from raytune_ft.evaluation.votes import VotesFile

HOST = "127.0.0.1"
_MOST_BYTES = 4096
_MOST_LETTERS = 80


def render_page(pairs: Pairs) -> str:
    """The self-contained page; it names no model, and what models said reaches it as data, never as markup."""
    content = {
        "pairs": [
            {
                "id": pair.id,
                "prompt": pair.prompt,
                "turns": pair.turns,
                "reference": pair.reference,
                "a": pair.answers[pair.labels["a"]],
                "b": pair.answers[pair.labels["b"]],
            }
            for pair in pairs.shown
        ]
    }
    return str(template("evaluation/judge.html.j2").render(data=_inert(content), nonce=secrets.token_urlsafe(16)))


class JudgeServer(ThreadingHTTPServer):
    """Serves the page of `pairs` on 127.0.0.1 and appends votes to a file as they come."""

    daemon_threads = True

    def __init__(self, pairs: Pairs, votes: VotesFile, *, port: int = 0, page: str | None = None) -> None:
        self.page = (page or render_page(pairs)).encode()
        self.pairs = {pair.id: pair for pair in pairs.shown}
        self.places = {(pair.row, pair.model, pair.other): pair for pair in pairs.shown}
        self.votes = votes
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise ConfigError(f"port {port}: cannot be listened on ({error.strerror}); choose another") from None

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self.server_port}/"

    def said(self, judge: str) -> dict[str, dict[str, str]]:
        """What a judge has said of each pair: the choice as the page knows it, and what stood on the left."""
        found = {}
        for key, vote in self.votes.of_judge(judge).items():
            pair = self.places.get(key)
            if pair is not None:
                names = {label: name for name, label in pair.labels.items()}
                choice = {"model": names[pair.model], "other": names[pair.other]}.get(vote.choice, vote.choice)
                found[pair.id] = {"choice": choice, "left": names.get(vote.left, "a")}
        return found

    def take(self, entry: Any) -> Vote:
        """Stores what the page sent.

        Raises:
            ValueError: if it is not a vote on one of the pairs.
            OSError: if the disk does not take it.
        """
        pair = self.pairs.get(_text(entry, "pair"))
        if pair is None:
            raise ValueError("there is no such pair; reload the page")
        left = _text(entry, "left")
        if left not in pair.labels:
            raise ValueError("left: must be a or b")
        judge = judge_name(_text(entry, "judge"))
        vote = Vote(
            judge=judge,
            row=pair.row,
            model=pair.model,
            other=pair.other,
            choice=_choice(pair, _text(entry, "choice")),
            left=pair.labels[left],
            at=now(),
        )
        self.votes.append(vote)
        return vote


class _Handler(BaseHTTPRequestHandler):
    server: JudgeServer
    timeout = 30

    def do_GET(self) -> None:
        if not self._is_local():
            return
        address = urlsplit(self.path)
        if address.path == "/":
            self._send(HTTPStatus.OK, self.server.page, "text/html; charset=utf-8")
        elif address.path == "/votes":
            judge = parse_qs(address.query).get("judge", [""])[0]
            self._answer(HTTPStatus.OK, {"votes": self.server.said(judge)})
        else:
            self._answer(HTTPStatus.NOT_FOUND, {"error": "there is nothing here"})

    def do_POST(self) -> None:
        if self._is_local():
            self._answer(*self._vote())

    def _vote(self) -> tuple[HTTPStatus, dict[str, Any]]:
        """Stores the vote in the request's body; what to answer."""
        if urlsplit(self.path).path != "/votes" or self.headers.get_content_type() != "application/json":
            self.close_connection = True
            return HTTPStatus.NOT_FOUND, {"error": "votes are JSON, posted to /votes"}
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > _MOST_BYTES:
            self.close_connection = True
            return HTTPStatus.BAD_REQUEST, {"error": f"a vote has at most {_MOST_BYTES} bytes"}
        try:
            self.server.take(json.loads(self.rfile.read(int(length))))
        except (ValueError, RecursionError) as error:
            return HTTPStatus.BAD_REQUEST, {"error": str(error)}
        except OSError as error:
            return HTTPStatus.INSUFFICIENT_STORAGE, {"error": f"the disk did not take it: {error.strerror or error}"}
        return HTTPStatus.OK, {"saved": True}

    def log_message(self, *_: Any) -> None:
        """Votes are the log."""

    def _is_local(self) -> bool:
        """Refuses what another site's page asks for in the judge's browser (a foreign name for this address, too)."""
        host, origin = self.headers.get("Host"), self.headers.get("Origin")
        if asked_by_own_name(host, origin, port=self.server.server_port):
            return True
        self.close_connection = True
        self._answer(HTTPStatus.FORBIDDEN, {"error": f"open {self.server.url}"})
        return False

    def _answer(self, status: HTTPStatus, content: Mapping[str, Any]) -> None:
        self._send(status, json.dumps(content).encode(), "application/json")

    def _send(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        self.end_headers()
        self.wfile.write(body)


def judge_name(text: str) -> str:
    """A judge's name, blanks around it stripped.

    Raises:
        ValueError: if it is empty, too long, or has characters that cannot be seen.
    """
    name = " ".join(text.split())
    if not name or len(name) > _MOST_LETTERS or not name.isprintable():
        raise ValueError(f"judge: expected a name of 1 to {_MOST_LETTERS} letters")
    return name


def _choice(pair: Pair, said: str) -> Choice:
    if said in pair.labels:
        return "model" if pair.labels[said] == pair.model else "other"
    if said == "tie":
        return "tie"
    if said == "both bad":
        return "both bad"
    raise ValueError("choice: must be a, b, tie or both bad")


def _text(entry: Any, name: str) -> str:
    value = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected a text")
    return value


def _inert(content: Any) -> str:
    """JSON that cannot end the element it stands in, whatever it quotes."""
    text = json.dumps(content, ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")

"""Finished reports whose answers are written by hand."""

from __future__ import annotations

import contextlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from raytune_ft.core.artifacts import Artifact
from raytune_ft.core.draft import begin
from raytune_ft.core.manifest import ArtifactKind
from raytune_ft.evaluation.config import ComparisonConfig, EvaluationConfig
from raytune_ft.evaluation.measurement import compared, measured
from raytune_ft.evaluation.metrics import make_metric
from raytune_ft.evaluation.report import write_report
from raytune_ft.evaluation.results import Answer, ComparisonResult, EvaluationResult, ModelScores, write_answers

MakeResult = Callable[..., EvaluationResult]
MakeReport = Callable[..., Artifact]


@pytest.fixture
def make_result() -> MakeResult:
    """Makes a result from the answers of each model; the reference of row n is ``answer n``."""

    def make(
        said: Mapping[str, Sequence[str]],
        *,
        ids: Sequence[str] | None = None,
        metrics: Sequence[str] = ("exact_match",),
    ) -> EvaluationResult:
        rows = len(next(iter(said.values())))
        names = [f"row{n}" for n in range(rows)] if ids is None else list(ids)
        if len(said) > 2:
            kind: type[EvaluationResult] = ComparisonResult
            config = ComparisonConfig(model_paths=[f"m/{label}" for label in said], dataset_path="d", metrics=metrics)
        else:
            kind, config = EvaluationResult, EvaluationConfig(model_path="m", dataset_path="d", metrics=metrics)
        chosen = {metric: make_metric(metric, config.resolved()) for metric in config.metrics}
        models = []
        for label, answers in said.items():
            made = tuple(
                Answer(
                    name,
                    f"question {name}",
                    f"answer {name.removeprefix('row')}",
                    text,
                    "stop",
                    len(text.split()),
                    nll=float(len(text)),
                    tokens=3,
                )
                for name, text in zip(names, answers, strict=True)
            )
            models.append(measured(ModelScores(label, f"m/{label}", f"digest {label}", {}, {}, made), chosen, seed=0))
        dataset = {"path": "d", "split": "test", "rows": rows, "digest": "4567"}
        return kind(
            config.resolved(),
            dataset,
            tuple(models),
            compared(models, chosen, seed=0),
            "2026-01-01T00:00:00+00:00",
        )

    return make


@pytest.fixture
def make_report(make_result: MakeResult, tmp_path: Path) -> MakeReport:
    """Makes a finished report in a folder of `tmp_path` from what `make_result` takes."""

    def make(name: str, said: Mapping[str, Sequence[str]], **how: Sequence[str]) -> Artifact:
        result = make_result(said, **how)
        draft = begin(tmp_path / name, ArtifactKind.REPORT, settings=result.settings)
        with draft:
            for model in result.models:
                write_answers(draft.folder / model.file, model.answers)
            write_report(draft.folder, result)
        return draft.artifact

    return make


class ChatServer:
    """Answers completions as `behaviour` says, by the user's text (or prompt) and how often it was asked before."""

    @staticmethod
    def completion(text: object, reason: str = "stop") -> dict[str, object]:
        return {
            "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}],
            "usage": {"completion_tokens": 3},
        }

    def __init__(self) -> None:
        self.behaviour: Callable[[str, int], tuple[int, object]]
        self.behaviour = lambda text, times: (200, self.completion(text.upper()))
        self.served = ["tiny"]
        self.asked: Counter[str] = Counter()
        self.bodies: list[dict[str, object]] = []
        self.at_once = self.most_at_once = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.give(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in outer.served]})

            def do_POST(self) -> None:
                outer.at_once += 1
                outer.most_at_once = max(outer.most_at_once, outer.at_once)
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                outer.bodies.append(body)
                text = body["messages"][-1]["content"] if "messages" in body else str(body["prompt"])
                outer.asked[text] += 1
                status, answer = outer.behaviour(text, outer.asked[text])
                outer.at_once -= 1
                self.give(status, answer)

            def give(self, status: int, answer: object) -> None:
                content = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                with contextlib.suppress(BrokenPipeError):
                    self.wfile.write(content)

            def log_message(self, *said: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server() -> Iterator[ChatServer]:
    """An endpoint that behaves as it is told."""
    found = ChatServer()
    yield found
    found.http.shutdown()
    found.http.server_close()

"""People judge a report's answers: the page is served, votes are kept, and what they amount to joins the report."""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from raytune_ft.core.artifacts import Artifact, open_artifact
from raytune_ft.core.errors import ConfigError
from raytune_ft.core.grammar import number_of
from raytune_ft.core.manifest import ArtifactKind
from raytune_ft.core.refusals import told_in_words
from raytune_ft.core.termination import signals_calling
from raytune_ft.evaluation.judge_server import JudgeServer, render_page
from raytune_ft.evaluation.judging import Judging
from raytune_ft.evaluation.pairs import Pairs, pairs
from raytune_ft.evaluation.preferences import preference_records
from raytune_ft.evaluation.report import write_report
from raytune_ft.evaluation.results import EvaluationResult, read_result, with_votes
from raytune_ft.evaluation.votes import FOLDER, VOTES, VotesFile, parse_votes

PAGE = "page.html"
PREFERENCES = "preferences.jsonl"

logger = logging.getLogger("raytune_ft")


@dataclass(frozen=True)
class JudgingFolder:
    """A report, and the folder that its judging lies in."""

    result: EvaluationResult
    path: Path

    @classmethod
    def of(cls, report: str, output_dir: str | None = None) -> JudgingFolder:
        """The folder ``judging`` in the report's, or another.

        Raises:
            ArtifactError: if there is no finished report.
            ConfigError: if the report lies on an object store, and no local folder is named.
        """
        artifact = open_artifact(report, ArtifactKind.REPORT)
        if output_dir is None and not artifact.location.is_local:
            raise ConfigError(f"{report}: votes are written to a local folder; name one with --output-dir")
        path = Path(output_dir) if output_dir is not None else _inside(artifact)
        return cls(read_result(artifact), path)

    def conclude(self) -> Judging:
        """Writes what the votes amount to: the report with them, and preference records; gives the summary.

        Raises:
            ConfigError: if there are no votes.
            ArtifactError: if the file of votes is damaged, or the folder cannot be written to.
        """
        path = self.path / VOTES
        votes = parse_votes(path.read_text(encoding="utf-8"), str(path)) if path.exists() else []
        if not votes:
            raise ConfigError(f"{path}: holds no votes; run `raytune-ft judge` and open the page that it names")
        joined = with_votes(self.result, votes)
        assert joined.judging is not None
        with told_in_words(self.path):
            write_report(self.path, joined)
            (self.path / "judging.json").write_text(
                json.dumps(asdict(joined.judging), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
            )
            lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in preference_records(self.result, votes)]
            (self.path / PREFERENCES).write_text("".join(lines), encoding="utf-8")
        records = number_of(len(lines), "preference record")
        logger.info("Judging: %s; %s, %s", number_of(len(votes), "vote"), self.path / "report.html", records)
        return joined.judging


def judge(
    report: str,
    *,
    output_dir: str | None = None,
    models: Sequence[str] | None = None,
    max_pairs: int | None = None,
    port: int = 0,
    seed: int = 0,
    ready: Callable[[str], None] = lambda url: None,
) -> Judging | None:
    """Serves the judging page of a report until it is interrupted (Ctrl-C or SIGTERM), then sums the votes up.

    Args:
        report: the folder of a report.
        output_dir: where votes and the joined report go; ``judging`` in the report's folder by default.
        models: labels of the models to judge; all by default.
        max_pairs: only so many pairs of answers.
        port: of 127.0.0.1; any free one by default.
        seed: of the order of the pairs.
        ready: is called with the page's address once it can be opened.

    Returns:
        The summary; None if there are no votes.

    Raises:
        UserError: if there is nothing to judge, the port or the file of votes is taken, or the folder cannot be
            written to.
    """
    folder = JudgingFolder.of(report, output_dir)
    shown = pairs(folder.result, models=models, max_pairs=max_pairs, seed=seed)
    page = render_page(shown)
    with told_in_words(folder.path):
        opened = VotesFile(folder.path)
    with opened as votes, JudgeServer(shown, votes, port=port, page=page) as server:
        with told_in_words(folder.path):
            (folder.path / PAGE).write_text(page, encoding="utf-8")
        logger.info("Judging: %s (%s); Ctrl-C ends it", server.url, said_of(shown))
        ready(server.url)
        _serve(server)
        voted = bool(votes.votes)
    return folder.conclude() if voted else None


def conclude(report: str, output_dir: str | None = None) -> Judging | None:
    """Sums up the votes that there are, without serving; see `JudgingFolder.conclude`."""
    return JudgingFolder.of(report, output_dir).conclude()


def said_of(shown: Pairs) -> str:
    """How many pairs there are, and why there are not more."""
    words = f"{number_of(len(shown.shown), 'pair')} of answers"
    if shown.identical:
        words += f", {shown.identical} more with the same answer twice"
    if shown.left_out:
        words += f", {shown.left_out} left out by --max-pairs"
    return words


def _serve(server: JudgeServer) -> None:
    """Until Ctrl-C, or SIGTERM, which is taken as one while this runs."""
    with signals_calling(_interrupt, signal.SIGTERM):
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            logger.info("Judging: stopped")


def _interrupt() -> None:
    raise KeyboardInterrupt


def _inside(artifact: Artifact) -> Path:
    return Path(artifact.location.path) / FOLDER

"""The analysis of an endpoint's A/B test: logs of exposures and feedback to a report that says what to do."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import numpy as np

from raytune_ft.core.artifacts import Artifact
from raytune_ft.core.draft import Draft, begin
from raytune_ft.core.figures import COLOURS
from raytune_ft.core.manifest import ArtifactKind, Parent
from raytune_ft.core.pages import image
from raytune_ft.core.storage import Location
from raytune_ft.evaluation import ab_plots
from raytune_ft.evaluation.ab_result import ABResult, analysed
from raytune_ft.evaluation.ab_tables import contrast_table, time_table, variant_table
from raytune_ft.evaluation.config_ab import ABAnalysisConfig
from raytune_ft.evaluation.exposures import Exposures, LogFiles, read_exposures
from raytune_ft.evaluation.ratings import Ratings, read_ratings
from raytune_ft.evaluation.report import page_template, write_plots
from raytune_ft.evaluation.results import plain

logger = logging.getLogger("raytune_ft")

RESULT = "ab.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Look:
    """What the logs hold at one moment."""

    exposures: Exposures
    ratings: Ratings

    @property
    def files(self) -> dict[str, LogFiles]:
        """What was read, by its role."""
        rated = {"feedback": self.ratings.files} if self.ratings.files else {}
        return {"exposures": self.exposures.files, **rated}

    @property
    def last(self) -> float:
        """The last moment that the logs tell of, in seconds since 1970."""
        rated = self.ratings.time[np.isfinite(self.ratings.time)]
        return max(float(self.exposures.time.max()), float(rated.max()) if len(rated) else -math.inf)

    @property
    def name(self) -> str:
        """Of the look's folder: its last moment, and what the logs' content begins with as hashed."""
        moment = datetime.fromtimestamp(self.last, UTC).strftime("%Y%m%dT%H%M%SZ")
        digest = hashlib.sha256("".join(file.digest for file in self.files.values()).encode()).hexdigest()
        return f"{moment}-{digest[:6]}"


def analyse_ab_test(config: ABAnalysisConfig) -> Artifact:
    """Analyses the logs of `config` as they are now; leaves ``ab.json``, ``report.html`` and plots in a folder of
    `output_dir`, and says what to do.

    Raises:
        ConfigError: if the log holds several tests and none is named.
        DataError: if there is no log, a line of it cannot be read, or the test was changed while it ran.
    """
    exposures = read_exposures(config.exposures_path, config.test)
    look = Look(exposures, read_ratings(config.feedback_path, exposures))
    draft = begin(
        Location.at(config.output_dir) / look.name,
        ArtifactKind.REPORT,
        settings=config.resolved(),
        identity=config.identity(),
        parents=[Parent(role=role, where=file.where, digest=file.digest) for role, file in look.files.items()],
    )
    if draft.finished is not None:
        logger.info("A/B test: nothing came since the report in %s", draft.location)
        _tell(decision["words"] for decision in draft.finished.read_json(RESULT)["decisions"])
        return draft.finished
    with draft:
        result = analysed(look.exposures, look.ratings, config)
        _write(draft, config, look, result)
    _tell(decision.words for decision in result.decisions)
    return draft.artifact


def _tell(decisions: Iterable[str]) -> None:
    for words in decisions:
        logger.info("%s", words)


def _write(draft: Draft, config: ABAnalysisConfig, look: Look, result: ABResult) -> None:
    content = {
        "schema_version": SCHEMA_VERSION,
        **asdict(result),
        "words": [found.words for found in result.contrasts],
        "torn_lines": {role: file.torn for role, file in look.files.items()},
        "lines": {role: file.lines for role, file in look.files.items()},
    }
    draft.write_json(RESULT, plain(content))
    plots = ab_plots.draw(look.exposures, look.ratings, config)
    write_plots(draft.folder, plots)
    page = page_template("evaluation/ab.html.j2").render(
        title=f"A/B test {result.test}",
        result=result,
        first=_day(result.first),
        last=_day(look.last),
        tables=[variant_table(result), time_table(result), contrast_table(result, config)],
        colours=[COLOURS[number % len(COLOURS)] for number in range(len(result.variants))],
        plots=[(image(plot.svg()), ab_plots.CAPTIONS[name]) for name, plot in plots.items()],
        config=config,
        files=look.files,
    )
    (draft.folder / "report.html").write_text(page, encoding="utf-8")
    draft.numbers.update(
        requests=len(look.exposures.variant),
        subjects=len(look.exposures.subject_variant),
        decision={decision.variant: decision.action for decision in result.decisions},
        gain={c.variant: c.difference for c in result.contrasts if c.measure.role == "goal" and c.enough},
    )


def _day(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M UTC")

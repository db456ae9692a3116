"""The honest ladder: a model and its smaller versions on the same rows, with what each step down costs and gives."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from raytune_ft.core.artifacts import Artifact
from raytune_ft.core.draft import Draft, begin
from raytune_ft.core.errors import ConfigError, RunError
from raytune_ft.core.figures import COLOURS, Plot
from raytune_ft.core.grammar import number_of
from raytune_ft.core.manifest import ArtifactKind
from raytune_ft.core.pages import image
from raytune_ft.core.records import Record
from raytune_ft.core.storage import Location
from raytune_ft.evaluation.config import ComparisonConfig
from raytune_ft.evaluation.config_inference import is_endpoint
from raytune_ft.evaluation.config_ladder import LadderConfig, LadderLimits
from raytune_ft.evaluation.inference import on_worker
from raytune_ft.evaluation.metric_names import EvaluationMetric
from raytune_ft.evaluation.pace import measure_apart
from raytune_ft.evaluation.report import page_template, write_plots
from raytune_ft.evaluation.results import (
    EvaluationResult,
    ModelScores,
    intervals,
    leading_metric,
    numbers,
    plain,
    read_result,
)
from raytune_ft.evaluation.rows import check_rows, read_rows
from raytune_ft.evaluation.run import compare
from raytune_ft.evaluation.tables import span_text
from raytune_ft.models.references import shared_model

logger = logging.getLogger("raytune_ft")

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Rung:
    """One model of the ladder: quality with intervals, likeness to the original (1 for itself), size, memory, speed."""

    label: str
    path: str
    values: dict[str, float]
    """Each metric's headline."""
    intervals: dict[str, tuple[float, float]]
    same_answers: float | None
    """Share of the rows with the original's very answer; None where no metric needs answers."""
    same_tokens: float
    """Share of the reference tokens at which both rank the same token first."""
    megabytes: float
    peak_megabytes: float
    load_s: float
    first_token_ms: float
    per_token_ms: float
    tokens_per_s: float
    device: str


def ladder(config: LadderConfig) -> Artifact:
    """Measures the models of `config`; leaves ``ladder.json``, ``report.html`` and plots.

    Raises:
        ConfigError: if a model is an endpoint, whose size and memory cannot be seen, or a limit names no metric that
            is measured.
        DataError: if rows and metrics do not fit each other.
        RunError: if a smaller model breaks a limit; the report is written before.
    """
    refuse_unmeasurable(config)
    records = pace_records(config)
    target = Location.at(config.output_dir)
    quality_at = target.parent / f"{target.name}-quality"
    quality = compare(_comparison(config, quality_at))
    result = read_result(quality)
    draft = begin(
        target,
        ArtifactKind.REPORT,
        settings=config.resolved(),
        identity=config.identity(),
        parents=[quality.as_parent("quality"), *(p for p in quality.manifest.parents if p.role != "dataset")],
    )
    if draft.finished is not None:
        logger.info("Ladder: found finished in %s", draft.location)
        kept = json.loads((target / "ladder.json").read())
        _refuse_broken(config.limits, [_kept_rung(rung) for rung in kept["rungs"]], target)
        return draft.finished
    with draft:
        rungs = _climb(config, records, result, target)
        _write(draft, config, result, rungs)
    for line in lines(rungs, leading_metric(result)):
        logger.info("%s", line)
    _refuse_broken(config.limits, rungs, target)
    return draft.artifact


def refuse_unmeasurable(config: LadderConfig) -> None:
    """Checks what settings alone tell.

    Raises:
        ConfigError: if a model is an endpoint, or a limit names no metric that is measured.
    """
    for path in config.model_paths:
        if is_endpoint(path):
            raise ConfigError(f"model_paths: {path} is an endpoint: its size and memory cannot be measured from here")
    for metric in config.limits.max_drop:
        if metric not in config.metrics:
            raise ConfigError(f"limits.max_drop: {metric} is not measured; add it to metrics")
    if config.limits.min_same_answers is not None and not any(metric.needs_answers for metric in config.metrics):
        wanted = ", ".join(config.metrics)
        raise ConfigError(f"limits.min_same_answers: no answers are generated for {wanted}; add a metric of answers")


def _comparison(config: LadderConfig, where: Location) -> ComparisonConfig:
    settings = config.model_dump(exclude={"pace", "limits", "output_dir"})
    return ComparisonConfig(**settings, output_dir=where.uri)


def pace_records(config: LadderConfig) -> list[Record]:
    """The rows that speed and likeness are measured on.

    Raises:
        DataError: if some row lacks a prompt or a reference.
    """
    rows = read_rows(config.dataset_path, config.split, config.max_rows)
    check_rows(rows, needs_answers=True, needs_references=True)
    return list(rows.records[: max(config.pace.prompts, config.pace.agreement_rows)])


def _climb(config: LadderConfig, records: Sequence[Record], result: EvaluationResult, target: Location) -> list[Rung]:
    settings = {**config.pace.model_dump(), "precision": str(config.precision)}
    rungs: list[Rung] = []
    original: list[list[int]] = []
    for scores in result.models:
        logger.info("Ladder: measures the speed of %s", scores.label)
        path = shared_model(config.models[scores.label], target.parent)
        pace = on_worker(measure_apart, path, records, settings)
        tokens, too_long = pace.pop("top_tokens"), pace.pop("too_long")
        if too_long:
            logger.warning(
                "Ladder: %s no room for an answer in the context of %s: its speed is of others",
                number_of(too_long, "prompt leaves", "prompts leave"),
                scores.label,
            )
        original = original or tokens
        rungs.append(_rung(scores, result, path, pace, same_tokens=share_of_same(original, tokens)))
    return rungs


def _rung(
    scores: ModelScores, result: EvaluationResult, path: str, pace: Mapping[str, Any], *, same_tokens: float
) -> Rung:
    both = zip(result.models[0].answers, scores.answers, strict=True)  # the same rows in the same order
    same = [own.answer == their.answer for own, their in both if their.answer is not None]
    return Rung(
        label=scores.label,
        path=path,
        values={str(metric): scores.values[metric.facts.headline] for metric in result.metrics},
        intervals={str(metric): scores.intervals[str(metric)] for metric in result.metrics},
        same_answers=sum(same) / len(same) if same else None,
        same_tokens=same_tokens,
        **pace,
    )


def _kept_rung(entry: Mapping[str, Any]) -> Rung:
    """A rung of ``ladder.json``."""
    return Rung(**{**entry, "values": numbers(entry["values"]), "intervals": intervals(entry["intervals"])})


def share_of_same(original: Sequence[Sequence[int]], other: Sequence[Sequence[int]]) -> float:
    """Share of the places at which both name the same token; rows of other lengths (another tokenizer) have none."""
    pairs = [(one, two) for one, two in zip(original, other, strict=True) if len(one) == len(two)]
    places = sum(map(len, original))
    same = sum(a == b for one, two in pairs for a, b in zip(one, two, strict=True))
    return same / places if places else 0.0


def broken_limits(limits: LadderLimits, rungs: Sequence[Rung]) -> list[str]:
    """What each smaller model (all but the first) does not hold, a sentence each."""
    found = []
    first = rungs[0]
    for rung in rungs[1:]:
        for metric, most in limits.max_drop.items():
            lost = first.values[str(metric)] - rung.values[str(metric)]
            lost = -lost if EvaluationMetric(metric).facts.lower_is_better else lost
            if not lost <= most:  # of a value that is no number, neither holds
                found.append(f"{rung.label}: {metric} is worse by {lost:.4g}, at most {most:g} was asked for")
        for name, limit in limits.model_dump(exclude={"max_drop"}).items():
            side, _, what = name.partition("_")
            value = getattr(rung, what)
            if limit is not None and value is not None and (value > limit if side == "max" else value < limit):
                words = "at most" if side == "max" else "at least"
                found.append(f"{rung.label}: {what} is {value:.4g}, {words} {limit:g} was asked for")
    return found


def best_trades(rungs: Sequence[Rung], metric: EvaluationMetric, cost: str) -> list[str]:
    """Labels of the models that no other one beats in both quality and `cost` (an attribute; the less the better)."""
    sign = 1 if metric.facts.lower_is_better else -1

    def place(rung: Rung) -> tuple[float, float]:
        value = rung.values[str(metric)]
        return sign * value if math.isfinite(value) else math.inf, float(getattr(rung, cost))

    def beaten(rung: Rung) -> bool:
        quality, price = place(rung)
        return any(q <= quality and c <= price and (q, c) != (quality, price) for q, c in map(place, rungs))

    return [rung.label for rung in rungs if not beaten(rung)]


def lines(rungs: Sequence[Rung], metric: EvaluationMetric) -> list[str]:
    """The ladder as lines of text."""
    heads = f"{'':24}{metric:>14}{'interval':>22}{'same':>7}{'MB':>8}{'peak MB':>9}{'first ms':>10}{'ms/token':>10}"
    found = [heads + f"{'tokens/s':>10}"]
    for rung in rungs:
        span = span_text(rung.intervals[str(metric)])
        found.append(
            f"{rung.label:24}{rung.values[str(metric)]:14.4f}{span:>22}{rung.same_tokens:7.1%}"
            f"{rung.megabytes:8.0f}{rung.peak_megabytes:9.0f}{rung.first_token_ms:10.1f}{rung.per_token_ms:10.1f}"
            f"{rung.tokens_per_s:10.1f}"
        )
    return found


def _refuse_broken(limits: LadderLimits, rungs: Sequence[Rung], target: Location) -> None:
    broken = broken_limits(limits, rungs)
    if broken:
        raise RunError(f"{target}: {number_of(len(broken), 'limit is', 'limits are')} broken: {'; '.join(broken)}")


def _write(draft: Draft, config: LadderConfig, result: EvaluationResult, rungs: Sequence[Rung]) -> None:
    metric = leading_metric(result)
    costs = {"megabytes": "megabytes of weights", "per_token_ms": "milliseconds a token"}
    trades = {cost: best_trades(rungs, metric, cost) for cost in costs}
    content = {
        "schema_version": SCHEMA_VERSION,
        "metric": str(metric),
        "rows": result.dataset["rows"],
        "rungs": [asdict(rung) for rung in rungs],
        "best_trades": trades,
        "broken_limits": broken_limits(config.limits, rungs),
    }
    draft.write_json("ladder.json", plain(content))
    plots = {cost: trade_plot(rungs, metric, cost, label, trades[cost]) for cost, label in costs.items()}
    write_plots(draft.folder, plots)
    page = page_template("evaluation/ladder.html.j2").render(
        title=f"Ladder of {rungs[0].label}",
        content=content,
        metrics=[(str(found), found.facts.title) for found in result.metrics],
        original=rungs[0].label,
        comparisons=[found.words for found in result.comparisons if found.other == rungs[0].label],
        dataset=result.dataset,
        pace=config.pace.model_dump(),
        plots=[image(plot.svg()) for plot in plots.values()],
    )
    (draft.folder / "report.html").write_text(page, encoding="utf-8")
    for rung in rungs:
        draft.numbers[rung.label] = {
            str(metric): rung.values[str(metric)],
            "megabytes": rung.megabytes,
            "tokens_per_s": rung.tokens_per_s,
            "same_tokens": rung.same_tokens,
        }


def trade_plot(rungs: Sequence[Rung], metric: EvaluationMetric, cost: str, label: str, best: Sequence[str]) -> Plot:
    """Quality against a cost; the models that none beats in both are joined by a line."""

    def paint(axes: Any) -> None:
        finite = [rung for rung in rungs if math.isfinite(rung.values[str(metric)])]
        front = sorted((float(getattr(r, cost)), r.values[str(metric)]) for r in finite if r.label in best)
        axes.plot([x for x, _ in front], [y for _, y in front], color="#c9ced6", zorder=1)
        for number, rung in enumerate(rungs):
            x, y = float(getattr(rung, cost)), rung.values[str(metric)]
            if not math.isfinite(y):
                continue
            low, high = (end if math.isfinite(end) else y for end in rung.intervals[str(metric)])
            colour = COLOURS[number % len(COLOURS)]
            axes.errorbar([x], [y], yerr=[[y - low], [high - y]], fmt="o", color=colour, capsize=2)
            axes.annotate(
                rung.label, (x, y), textcoords="offset points", xytext=(7, 5 + 11 * (number % 3)), color=colour
            )
        axes.set_xlabel(label)
        axes.set_ylabel(metric.facts.title)
        axes.set_xlim(left=0)
        axes.margins(x=0.25, y=0.15)

    return Plot(paint, height=3.4, grid="both")

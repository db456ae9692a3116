"""The steps in their order: each takes finished artifacts and leaves one, so a second run redoes nothing.

Meets Ray only through the rooms that it calls.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from raytune_ft.compression.run import prune, quantize
from raytune_ft.core import cluster
from raytune_ft.core.artifacts import Artifact, has_manifest
from raytune_ft.core.config import masked
from raytune_ft.core.draft import begin
from raytune_ft.core.errors import RunError, first_line
from raytune_ft.core.grammar import number_of
from raytune_ft.core.manifest import ArtifactKind
from raytune_ft.core.records import Record
from raytune_ft.core.row_files import rows_of
from raytune_ft.core.storage import Location
from raytune_ft.data.config import DataCollectionConfig
from raytune_ft.data.run import prepare
from raytune_ft.evaluation.config import EvaluationMetric
from raytune_ft.evaluation.gate import GateDecision, gate
from raytune_ft.evaluation.ladder import ladder
from raytune_ft.evaluation.results import leading_metric, read_result
from raytune_ft.evaluation.run import evaluate
from raytune_ft.models.references import shared_model
from raytune_ft.pipeline.config import FOLDERS, SUMMARY, PipelineConfig, shaped_like
from raytune_ft.pipeline.preflight import refuse_early, refuse_misfits, refuse_unfit
from raytune_ft.pipeline.report import Story, render
from raytune_ft.pipeline.sources import placed
from raytune_ft.serving.config import ServingConfig
from raytune_ft.serving.keys import hashed, new_key
from raytune_ft.serving.run import ModelServer
from raytune_ft.training.run import train
from raytune_ft.tuning.run import tune

logger = logging.getLogger("raytune_ft")

_LONGEST_ANSWER = 128
"""Tokens of the answer that the endpoint is asked for."""


class Pipeline:
    """Runs the steps of its settings, one after the other."""

    def __init__(self, config: PipelineConfig) -> None:
        self.config = config

    def run(self) -> Artifact:
        """Runs what is not finished yet, and returns the pipeline's artifact (``report.html``, ``summary.json``).

        Raises:
            UserError: for what the user can mend.
            RunError: if a step failed; the finished steps stay, and the same command goes on from there. Also if the
                gate stays shut: the pipeline's artifact is there then, with the figures.
        """
        return run_pipeline(self.config)


@dataclass
class _Steps:
    """Counts the steps, and keeps what they made."""

    names: list[str]
    made: dict[str, Artifact] = field(default_factory=dict)

    def take(self, name: str, work: Callable[[], Artifact]) -> Artifact:
        """Does a step and keeps its artifact."""
        logger.info("[%d/%d] %s", self.names.index(name) + 1, len(self.names), name)
        started = time.perf_counter()
        self.made[name] = work()
        seconds = time.perf_counter() - started
        logger.info("[%d/%d] %s: %.0f s", self.names.index(name) + 1, len(self.names), name, seconds)
        return self.made[name]


def run_pipeline(config: PipelineConfig) -> Artifact:
    """The verb: see `Pipeline.run`."""
    names = [name for name in FOLDERS if getattr(config, name) is not None]
    for line in plan(config, names):
        logger.info("%s", line)
    storage, given = config.storage, config
    config = config.with_overrides(model_path=shared_model(config.model_path, storage))
    refuse_early(config, names)
    refuse_misfits(config, names, cluster.connect())
    steps = _Steps(names)
    steps.take("prepare", lambda: prepare(_placed(config.prepare, storage)))
    refuse_unfit(config, names)
    if config.serve is not None:
        _first_test_record(steps.made["prepare"])
    training = config.train
    if config.tune is not None:
        search = config.tune
        found = steps.take("tune", lambda: tune(search))
        training = training.with_overrides(**found.numbers["best_settings"])
    logger.info("train: learning_rate %g, lora_r %d", training.learning_rate, training.lora_r)
    steps.take("train", lambda: train(training))
    if config.align is not None:
        aligning = shaped_like(training, config.align)
        steps.take("align", lambda: train(aligning))
    if config.evaluate is not None:
        evaluation = config.evaluate
        steps.take("evaluate", lambda: evaluate(evaluation))
    decision = _decision(config, steps)
    if decision is None or decision.passed:
        _shrink(config, steps)
        if config.serve is not None:
            serving = config.serve
            steps.take("serve", lambda: ask_endpoint(serving, steps.made, storage / "endpoint"))
    artifact = _conclude(given, steps, decision)
    if decision is not None and not decision.passed:
        raise RunError(f"the new model goes no further: {decision.words} What was measured: {artifact.location}")
    return artifact


def _decision(config: PipelineConfig, steps: _Steps) -> GateDecision | None:
    """Whether the tuned model may take the place of the one before it; None if nobody asks."""
    asked = config.gate_settings
    if asked is None:
        return None
    result = read_result(steps.made["evaluate"])
    other = result["previous" if config.previous_path is not None else "base"]
    decision = gate(
        result["tuned"],
        other,
        asked.metric or leading_metric(result),
        max_drop=asked.max_drop,
        confidence=asked.confidence,
        seed=int(result.settings["seed"]),
        settings=result.settings,
    )
    logger.info("gate: %s", decision.words)
    return decision


def _shrink(config: PipelineConfig, steps: _Steps) -> None:
    """Smaller versions of the tuned model, and what they cost."""
    if config.prune is not None:
        pruning = config.prune
        steps.take("prune", lambda: prune(pruning))
    if config.heal is not None:
        healing = config.heal
        steps.take("heal", lambda: train(healing))
    if config.quantize is not None:
        job = config.quantize
        steps.take("quantize", lambda: quantize(job))
    if config.ladder is not None:
        rungs = config.ladder
        steps.take("ladder", lambda: ladder(rungs))


def plan(config: PipelineConfig, names: list[str]) -> list[str]:
    """What the pipeline is going to do, a line a step, with what is finished already."""
    workers = number_of(config.train.num_workers, "worker")
    words = {
        "prepare": f"clean, split and tokenize {', '.join(config.prepare.sources)}",
        "tune": f"search {', '.join(config.tune.space)}" if config.tune else "",
        "train": f"{config.train.method} with {workers}, ZeRO-{config.train.zero_stage}",
        "align": f"{config.align.loss_type} on {config.align.dataset_path}" if config.align else "",
        "evaluate": f"{_evaluated(config)} on the test split",
        "prune": f"{config.prune.method}, {config.prune.target_sparsity:.0%} of the weights" if config.prune else "",
        "heal": "full fine-tuning of the pruned model, its zeros held",
        "ladder": "quality, size and speed of the smaller versions",
        "quantize": f"{config.quantize.method}, {config.quantize.bits} bits" if config.quantize else "",
        "serve": "host it, and send one held-out request",
    }
    lines = [f"Plan for {config.model_path}, everything below {config.storage}:"]
    for number, name in enumerate(names, start=1):
        state = " (finished before)" if has_manifest(config.storage / FOLDERS[name]) else ""
        lines.append(f"  {number}. {name}: {words[name]} -> {FOLDERS[name]}/{state}")
    return [str(masked(line)) for line in lines]


def _evaluated(config: PipelineConfig) -> str:
    if config.previous_path is None:
        return "the base and the tuned model"
    return f"the base, the tuned and the previous model ({config.previous_path})"


def ask_endpoint(config: ServingConfig, made: dict[str, Artifact], where: Location) -> Artifact:
    """Serves the last model, sends it the first test record's prompt by the `openai` client, and keeps the exchange.

    Where only those with a key may ask, it is served with one more, which is forgotten afterwards.

    Raises:
        RunError: if the dataset has no test record to ask for, or the endpoint does not answer.
    """
    model = next(made[step] for step in ("quantize", "heal", "prune", "align", "train") if step in made)
    draft = begin(
        where,
        ArtifactKind.ENDPOINT,
        settings=config.resolved(),
        identity=config.identity(),
        parents=[model.as_parent("model"), made["prepare"].as_parent("dataset")],
    )
    if draft.finished:
        logger.info("serve: found finished at %s", where)
        return draft.finished
    with draft:
        record, key = _first_test_record(made["prepare"]), new_key()
        asked = config.with_overrides(api_keys=(*config.api_keys, hashed(key))) if config.api_keys else config
        with ModelServer(asked) as server:
            exchange = _ask(server.url, asked, record, key)
        draft.write_json("exchange.json", exchange)
        draft.numbers |= {"seconds": exchange["seconds"], "as_expected": exchange["answer"] == exchange["expected"]}
        logger.info("served model says: %s (expected: %s)", exchange["answer"], exchange["expected"])
    return draft.artifact


def _ask(url: str, config: ServingConfig, record: Record, key: str) -> dict[str, Any]:
    from openai import DefaultHttpxClient, OpenAI, OpenAIError

    messages: Any = [{"role": message.role, "content": message.content} for message in record.prompt]
    direct = DefaultHttpxClient(trust_env=False)  # this machine's own address needs no proxy
    client = OpenAI(base_url=url, api_key=key, max_retries=0, http_client=direct)
    most = min(_LONGEST_ANSWER, config.max_new_tokens)
    started = time.perf_counter()
    try:
        reply = client.chat.completions.create(
            model=config.served_name, messages=messages, temperature=0, max_tokens=most
        )
    except OpenAIError as error:
        raise RunError(f"serve: the endpoint did not answer the held-out request: {first_line(error)}") from None
    return {
        "url": url,
        "messages": messages,
        "answer": reply.choices[0].message.content,
        "expected": record.answer,
        "usage": reply.usage.model_dump() if reply.usage else None,
        "seconds": round(time.perf_counter() - started, 3),
    }


def _first_test_record(dataset: Artifact) -> Record:
    for name in sorted(dataset.manifest.files):
        if name.startswith("test/") and name.endswith(".parquet"):
            row, _ = next(rows_of(dataset / name))
            return Record.from_row(row)
    raise RunError(f"{dataset.location}: has no test split to take a held-out request from; set prepare.test_split")


def _placed(config: DataCollectionConfig, storage: Location) -> DataCollectionConfig:
    return config.with_overrides(
        sources=[placed(source, storage) for source in config.sources],
        test_sources=[placed(source, storage) for source in config.test_sources],
    )


def _conclude(config: PipelineConfig, steps: _Steps, decision: GateDecision | None) -> Artifact:
    draft = begin(
        config.storage / SUMMARY,
        ArtifactKind.PIPELINE,
        settings=config.resolved(),
        identity={"steps": steps.names} if decision is None else {"steps": steps.names, "gate": decision.words},
        parents=[artifact.as_parent(name) for name, artifact in steps.made.items()],
        renew=True,
    )
    if draft.finished:
        return draft.finished
    with draft:
        story = Story.of(steps.made)
        (draft.folder / "report.html").write_text(render(story), encoding="utf-8")
        draft.numbers |= headline(steps.made)
        if decision is not None:
            draft.numbers |= {"Promoted": decision.passed, "Gate": decision.words}
        draft.write_json("summary.json", draft.numbers)
    return draft.artifact


def headline(made: dict[str, Artifact]) -> dict[str, Any]:
    """The pipeline's figures: what was measured of base and tuned model, sizes, and the time each step took."""
    numbers: dict[str, Any] = {}
    if "tune" in made:
        numbers["Best settings"] = made["tune"].numbers["best_settings"]
    if "evaluate" in made:
        result = read_result(made["evaluate"])
        for metric in EvaluationMetric:
            if metric in result.metrics:
                values = [f"{model.label} {model.values[metric.facts.headline]:.3f}" for model in result.models]
                numbers[metric.facts.title] = " -> ".join(values)
    if "quantize" in made:
        before, after = (made["quantize"].numbers[key] / 1e6 for key in ("bytes_before", "bytes_after"))
        numbers["Size"] = f"{before:.0f} MB -> {after:.0f} MB ({made['quantize'].manifest.settings['bits']} bits)"
    if "serve" in made:
        right = "as expected" if made["serve"].numbers["as_expected"] else "not as expected"
        numbers["Held-out request"] = f"answered {right} in {made['serve'].numbers['seconds']} s"
    numbers["Seconds"] = {name: artifact.seconds for name, artifact in made.items()}
    return numbers

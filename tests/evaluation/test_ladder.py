"""The ladder: what its figures are, and a small one climbed for real."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from raytune_ft.core.errors import ConfigError, DataError, RunError
from raytune_ft.core.records import Message, Record
from raytune_ft.evaluation.config import EvaluationMetric
from raytune_ft.evaluation.config_ladder import LadderConfig, LadderLimits
from raytune_ft.evaluation.ladder import Rung, best_trades, broken_limits, ladder, share_of_same, trade_plot
from raytune_ft.evaluation.pace import measure, measure_apart, weight_bytes
from raytune_ft.models.loading import load_model


def rung(label: str, exact_match: float, megabytes: float, **figures: float) -> Rung:
    common = {
        "same_answers": 1.0, "same_tokens": 1.0, "peak_megabytes": 900.0, "load_s": 1.0, "first_token_ms": 20.0,
        "per_token_ms": 10.0, "tokens_per_s": 100.0,
    }  # fmt: skip
    quality = {"values": {"exact_match": exact_match}, "intervals": {"exact_match": (0.0, 1.0)}}
    return Rung(label, f"runs/{label}", megabytes=megabytes, device="cpu", **quality, **{**common, **figures})


def test_the_best_trades_are_those_that_no_other_beats_in_both() -> None:
    rungs = [rung("whole", 0.8, 500), rung("8 bits", 0.8, 200), rung("4 bits", 0.5, 120), rung("worse", 0.5, 300)]
    assert best_trades(rungs, EvaluationMetric.EXACT_MATCH, "megabytes") == ["8 bits", "4 bits"]


def test_of_a_metric_that_is_better_lower_the_lower_one_is_better() -> None:
    rungs = [rung("a", 0, 500), rung("b", 0, 200)]
    for one, perplexity in zip(rungs, (2.0, 3.0), strict=True):
        one.values["perplexity"] = perplexity
    assert best_trades(rungs, EvaluationMetric.PERPLEXITY, "megabytes") == ["a", "b"]
    rungs[1].values["perplexity"] = 1.9
    assert best_trades(rungs, EvaluationMetric.PERPLEXITY, "megabytes") == ["b"]


def test_every_limit_that_is_broken_is_named_with_its_value() -> None:
    rungs = [rung("whole", 0.8, 500), rung("small", 0.7, 200, same_tokens=0.9, per_token_ms=12.5)]
    limits = LadderLimits(
        max_drop={"exact_match": 0.05}, min_same_tokens=0.95, max_per_token_ms=12, max_megabytes=250, min_tokens_per_s=1
    )
    assert broken_limits(limits, rungs) == [
        "small: exact_match is worse by 0.1, at most 0.05 was asked for",
        "small: same_tokens is 0.9, at least 0.95 was asked for",
        "small: per_token_ms is 12.5, at most 12 was asked for",
    ]
    assert broken_limits(LadderLimits(max_drop={"exact_match": 0.2}), rungs) == []
    assert broken_limits(limits, rungs[:1]) == [], "the original has to hold nothing"


def test_the_share_of_same_tokens_is_over_all_places() -> None:
    assert share_of_same([[1, 2, 3], [4]], [[1, 2, 9], [4]]) == 0.75
    assert share_of_same([[1, 2, 3], [4]], [[1, 2], [4]]) == 0.25, "a row of another length has none"


def test_endpoints_and_unmeasured_limits_are_refused(tmp_path: Path) -> None:
    common = {"dataset_path": "rows.jsonl", "metrics": ["exact_match"], "output_dir": str(tmp_path / "out")}
    with pytest.raises(ConfigError, match="http://x/v1 is an endpoint"):
        ladder(LadderConfig(model_paths=["a", "http://x/v1"], **common))
    with pytest.raises(ConfigError, match="perplexity is not measured"):
        ladder(LadderConfig(model_paths=["a", "b"], limits={"max_drop": {"perplexity": 1}}, **common))
    likelihoods = {**common, "metrics": ["perplexity"], "limits": {"min_same_answers": 0.9}}
    with pytest.raises(ConfigError, match=r"limits\.min_same_answers: no answers are generated for perplexity"):
        ladder(LadderConfig(model_paths=["a", "b"], **likelihoods))
    with pytest.raises(ConfigError, match="must be 0 or more"):
        LadderConfig(model_paths=["a", "b"], limits={"max_drop": {"exact_match": -1}}, **common)


def test_a_models_pace_is_measured_on_its_own_prompts(tiny_model: Path) -> None:
    records = [Record(messages=(Message("user", "a b c"), Message("assistant", "d")), position=n) for n in range(3)]
    settings = {"prompts": 2, "new_tokens": 4, "batch_size": 3, "agreement_rows": 3, "threads": 1, "precision": "fp32"}
    pace = measure(str(tiny_model), records, settings)
    assert pace.megabytes == pytest.approx((tiny_model / "model.safetensors").stat().st_size / 1e6)
    assert pace.megabytes == weight_bytes(str(tiny_model)) / 1e6
    assert min(pace.first_token_ms, pace.per_token_ms, pace.tokens_per_s, pace.load_s) > 0
    assert len(pace.top_tokens) == 3
    assert pace.top_tokens[0] == pace.top_tokens[1] != []


def test_rows_beyond_the_context_are_windowed_and_prompts_without_room_passed_over(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "short"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}))
    chat = load_model(str(folder)).chat

    def record(asked: str, answer: str) -> Record:
        return Record(messages=(Message("user", asked), Message("assistant", answer)))

    records = [record("x" * 90, "b"), record("x" * 30, "b"), record("a", "x" * 90)]
    long, near, short = (len(chat.prompt_ids(one.prompt)) for one in records)
    assert short < 32 < near < 62 < long
    settings = {"prompts": 2, "new_tokens": 32, "batch_size": 2, "agreement_rows": 3, "threads": 1, "precision": "fp32"}
    monkeypatch.setattr("raytune_ft.evaluation.pace.time", SimpleNamespace(perf_counter=itertools.count().__next__))
    pace = measure(str(folder), records, settings)  # by this clock everything takes a second
    assert pace.too_long == 1
    assert pace.tokens_per_s == (64 - near) + 32
    assert len(pace.top_tokens[2]) > 64
    with pytest.raises(RunError, match="none of 1 prompts leaves room for an answer in the model's context of 64 tok"):
        measure_apart(str(folder), records[:1], settings)


def test_a_hub_models_size_is_that_of_its_snapshot_and_an_adapter_adds_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = tmp_path / "models--org--name"
    (hub / "snapshots" / "abc").mkdir(parents=True)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("abc")
    (hub / "snapshots" / "abc" / "model.safetensors").write_bytes(b"x" * 1000)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert weight_bytes("org/name") == 1000
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "org/name"}')
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"x" * 10)
    assert weight_bytes(str(tmp_path / "adapter")) == 1010


def test_rows_that_cannot_be_climbed_are_refused_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "raw"}\n')
    config = LadderConfig(
        model_paths=["nowhere/a", "nowhere/b"], dataset_path=str(tmp_path / "rows.jsonl"), metrics=["perplexity"],
        output_dir=str(tmp_path / "out"),
    )  # fmt: skip
    with pytest.raises(DataError, match="are raw text, with no question"):
        ladder(config)
    assert not (tmp_path / "out-quality").exists()


def test_a_rung_without_a_number_breaks_its_limit_and_is_no_best_trade() -> None:
    rungs = [rung("whole", 0, 500), rung("lost", 0, 200)]
    for one, value in zip(rungs, (2.0, float("nan")), strict=True):
        one.values["perplexity"] = value
    limits = LadderLimits(max_drop={"perplexity": 1})
    assert broken_limits(limits, rungs) == ["lost: perplexity is worse by nan, at most 1 was asked for"]
    assert best_trades(rungs, EvaluationMetric.PERPLEXITY, "per_token_ms") == ["whole"]
    rungs[1].intervals["perplexity"] = rungs[0].intervals["perplexity"] = (1.0, 3.0)
    assert trade_plot(rungs, EvaluationMetric.PERPLEXITY, "megabytes", "MB", ["whole"]).svg()


@pytest.mark.ray
def test_a_model_and_its_smaller_versions_are_climbed(
    ray_cluster: object, tiny_model: Path, orders: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from raytune_ft.compression.config import PruningConfig, QuantizationConfig
    from raytune_ft.compression.prune import write_pruned
    from raytune_ft.compression.quantize import write_quantized

    write_quantized(str(tiny_model), tmp_path / "quantized", QuantizationConfig(bits=8))
    write_pruned(str(tiny_model), tmp_path / "pruned", PruningConfig(target_sparsity=0.9))
    config = LadderConfig(
        model_paths=[str(tiny_model), str(tmp_path / "quantized"), str(tmp_path / "pruned")],
        dataset_path=str(orders),
        metrics=["perplexity", "exact_match"],
        max_rows=6,
        decoding={"max_new_tokens": 4},
        output_dir=str(tmp_path / "ladder"),
        pace={"prompts": 2, "new_tokens": 4, "batch_size": 2, "agreement_rows": 4},
        limits={"min_same_tokens": 0.999, "max_megabytes": 0.001},
    )
    with pytest.raises(RunError, match=r"limits are broken: .*quantized: megabytes is"):
        ladder(config)
    found = json.loads((tmp_path / "ladder/ladder.json").read_text())  # written before the limits are looked at
    original, quantized, pruned = found["rungs"]
    assert (original["same_tokens"], original["same_answers"]) == (1.0, 1.0)
    assert quantized["megabytes"] < original["megabytes"]
    assert quantized["same_tokens"] >= pruned["same_tokens"]
    assert pruned["values"]["perplexity"] != original["values"]["perplexity"]
    page = (tmp_path / "ladder/report.html").read_text()
    assert "quantized" in page
    assert "data:image/svg+xml" in page
    assert (tmp_path / "ladder/plots/megabytes.png").exists()
    assert (tmp_path / "ladder-quality/report.html").exists()

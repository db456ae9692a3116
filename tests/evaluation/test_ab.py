"""The verb: logs to a report, looked at again while the test runs, from the command line."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raytune_ft.cli import run_verb
from raytune_ft.core.artifacts import open_artifact
from raytune_ft.core.errors import ConfigError
from raytune_ft.core.manifest import ArtifactKind
from raytune_ft.evaluation.ab import analyse_ab_test
from raytune_ft.evaluation.config_ab import ABAnalysisConfig

from .ab_logs import exposure, feedback, write_lines, write_test


@pytest.fixture
def config(tmp_path: Path) -> ABAnalysisConfig:
    """Settings for the logs of a test of three variants, of which one is better and one slow."""
    where, said = write_test(
        tmp_path, good={"base": 0.5, "new": 0.8, "slow": 0.8}, subjects=2400, latency={"slow": 1.5},
        shares={"base": 0.4, "new": 0.3, "slow": 0.3},
    )  # fmt: skip
    return ABAnalysisConfig(exposures_path=where, feedback_path=said, output_dir=str(tmp_path / "out"))


def test_a_report_says_what_to_do_and_brings_its_numbers_and_plots(config: ABAnalysisConfig) -> None:
    artifact = open_artifact(analyse_ab_test(config).location, ArtifactKind.REPORT)
    assert set(artifact.manifest.files) == {
        "ab.json", "report.html", "plots/gain.svg", "plots/gain.png", "plots/latency.svg", "plots/latency.png"
    }  # fmt: skip
    assert [parent.role for parent in artifact.manifest.parents] == ["exposures", "feedback"]
    content = artifact.read_json("ab.json")
    assert [(one["variant"], one["action"]) for one in content["decisions"]] == [("new", "promote"), ("slow", "keep")]
    assert artifact.numbers["requests"] == sum(one["requests"] for one in content["variants"]) == 7200
    assert artifact.numbers["gain"]["new"] == pytest.approx(0.3, abs=0.05)
    page = (artifact / "report.html").read().decode()
    for one in content["decisions"]:
        assert one["words"] in page
    assert "<script" not in page
    assert page.count("data:image/svg+xml") == 2


def test_the_same_logs_give_the_same_report_and_new_lines_another(config: ABAnalysisConfig) -> None:
    first = analyse_ab_test(config).location
    assert analyse_ab_test(config).location == first
    write_lines(Path(config.exposures_path) / "exposures-r3.jsonl", [
        exposure(9000, "new", "late", shares={"base": 0.4, "new": 0.3, "slow": 0.3})
    ])  # fmt: skip
    second = analyse_ab_test(config)
    assert second.location != first
    assert second.location.parent == first.parent
    assert second.numbers["requests"] == 7201
    open_artifact(first)
    write_lines(Path(config.feedback_path or "") / "feedback-r2.jsonl", [feedback(9000, "up")])
    assert analyse_ab_test(config).location not in {first, second.location}


def test_unknown_numbers_are_null_in_json(tmp_path: Path) -> None:
    folder = write_lines(tmp_path / "ab/e.jsonl", [exposure(1, "new", "x", status=500, id=None, first_token_s=None)])
    artifact = analyse_ab_test(ABAnalysisConfig(exposures_path=str(folder), output_dir=str(tmp_path / "out")))
    text = (artifact / "ab.json").read().decode()
    content = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert content["contrasts"][0]["sample"]["mean"] is None
    assert (artifact / "report.html").is_file()


def test_what_clients_say_stays_text_in_the_page(tmp_path: Path) -> None:
    lines = [exposure(n, "base", f"s{n}", test="<script>alert(1)</script>") for n in range(3)]
    folder = write_lines(tmp_path / "ab/e.jsonl", lines)
    artifact = analyse_ab_test(ABAnalysisConfig(exposures_path=str(folder), output_dir=str(tmp_path / "out")))
    assert "<script>alert" not in (artifact / "report.html").read().decode()


@pytest.fixture
def own_logging() -> Iterator[None]:
    """Gives back what the command line makes of our logger."""
    logger = logging.getLogger("raytune_ft")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


def settings(tmp_path: Path, text: str) -> str:
    path = tmp_path / "ab.yaml"
    path.write_text(text)
    return str(path)


def test_the_command_prints_the_decision_and_is_done(
    own_logging: None, config: ABAnalysisConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = settings(tmp_path, f"exposures_path: {config.exposures_path}\nfeedback_path: {config.feedback_path}\n")
    assert run_verb("ab", [path, f"output_dir={config.output_dir}"]) == 0
    said = capfd.readouterr()
    assert "new: promote it in the place of base" in said.err and "regression of latency" in said.err
    shown = dict(line.split()[:2] for line in said.out.splitlines()[1:])
    assert (shown["decision.new"], shown["decision.slow"], shown["requests"]) == ("promote", "keep", "7200")
    assert run_verb("ab", [path, f"output_dir={config.output_dir}"]) == 0
    again = capfd.readouterr().err
    assert "nothing came since the report in" in again and "new: promote it in the place of base" in again


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("exposures_path: nowhere\n", "nowhere: there is no such file or folder"),
        ("min_effect: 0.1\n", "exposures_path: is required and was not given"),
        ("exposures_path: x\nmin_effect: 0\n", "min_effect: must be more than 0.0 (got 0)"),
        ("exposures_path: x\nmin_subjects: 3\n", "min_subjects: must be at least 20 (got 3)"),
        ("exposures_path: x\nconfidence: 1\n", "confidence: must be less than 1.0 (got 1)"),
        ("exposures_path: x\nmin_efect: 0.1\n", "did you mean min_effect?"),
    ],
)
def test_mistakes_are_one_message_and_exit_code_2(
    own_logging: None, tmp_path: Path, capfd: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    assert run_verb("ab", [settings(tmp_path, text)]) == 2
    message = capfd.readouterr().err
    assert said in message
    assert "Traceback" not in message


def test_a_feedback_folder_that_is_not_there_is_refused(config: ABAnalysisConfig) -> None:
    changes: dict[str, Any] = {"feedback_path": "nowhere"}
    with pytest.raises(Exception, match=r"feedback_path: .*nowhere: there is no such") as refused:
        analyse_ab_test(config.with_overrides(**changes))
    assert refused.value.exit_code == 2  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="there is no test 'autumn'"):
        analyse_ab_test(config.with_overrides(test="autumn"))

"""What is asked of models, and what else decides the answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raytune_ft.evaluation.config import EvaluationConfig
from raytune_ft.evaluation.workload import Target, settings_parents


def digests(target: Target, **settings: Any) -> dict[str, str]:
    config = EvaluationConfig(
        **{"model_path": target.path, "dataset_path": "d", "metrics": ["exact_match"], **settings}
    )
    return {parent.role: parent.digest for parent in settings_parents(config, [target])}


def test_files_that_settings_name_count_by_their_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    files = [
        tmp_path / name for name in ("schema.json", "my_scores.py", "text.txt", "tasks/a.yaml", "tok/tokenizer.json")
    ]
    settings = {
        "metrics": ["json_schema", "custom", "perplexity"],
        "json_schema": str(files[0]),
        "custom_functions": {"f": "my_scores:f"},
        "forgetting": {"text_path": str(files[2])},
        "harness": {"tasks": ["a"], "include_path": str(tmp_path / "tasks")},
        "endpoint": {"tokenizer": str(tmp_path / "tok")},
    }
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_text("f = 1")
    served = Target("m", "http://host/v1#m")
    before = digests(served, **settings)
    assert list(before) == [
        "json_schema",
        "custom_functions my_scores",
        "forgetting.text_path",
        "harness.include_path",
        "endpoint.tokenizer",
    ]
    assert digests(served, **settings) == before
    for file, role in zip(files, before, strict=True):
        file.write_text("f = 2")
        changed = digests(served, **settings)
        assert {name for name in before if changed[name] != before[name]} == {role}
        before = changed
    (tmp_path / "tasks" / "b.yaml").write_text("f = 2")
    assert digests(served, **settings)["harness.include_path"] != before["harness.include_path"]


def test_what_is_not_looked_at_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text("{}")
    unused = {"json_schema": str(tmp_path / "schema.json"), "endpoint": {"tokenizer": "org/name"}}
    assert digests(Target("m", "folder"), **unused, metrics=["perplexity"]) == {}
    assert digests(Target("m", "http://host/v1#m"), **unused) == {}
    assert list(digests(Target("m", "http://host/v1#m"), **unused, metrics=["perplexity"])) == ["endpoint.tokenizer"]
    inline = {"metrics": ["json_schema"], "json_schema": {"type": "object"}}
    assert digests(Target("m", "folder"), **inline) == {}

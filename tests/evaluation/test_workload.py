"""What is asked of models, and what else decides the answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raytune_ft.evaluation.config import EvaluationConfig
from raytune_ft.evaluation.workload import settings_parents


def digests(model_path: str, **settings: Any) -> dict[str, str]:
    config = EvaluationConfig(**{"model_path": model_path, "dataset_path": "d", "metrics": ["exact_match"], **settings})
    return {parent.role: parent.digest for parent in settings_parents(config)}


def test_files_that_settings_name_count_by_their_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    files = [
        tmp_path / name for name in ("schema.json", "my_scores.py", "text.txt", "tasks/a.yaml", "tok/tokenizer.json")
    ]
    settings = {
        "base_model_path": "b",
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
    served = "http://host/v1#m"
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


def test_a_schema_in_the_settings_is_no_file() -> None:
    assert digests("folder", metrics=["json_schema"], json_schema={"type": "object"}) == {}

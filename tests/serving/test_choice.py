"""Engines are chosen with a reason, and what one cannot serve is refused with the one that can."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from raytune_ft.core.draft import begin
from raytune_ft.core.errors import ArtifactError, MissingDependencyError, ModelError, ServingError
from raytune_ft.core.manifest import ArtifactKind
from raytune_ft.models.golden import GOLDEN
from raytune_ft.serving import choice
from raytune_ft.serving.choice import check_config, choose_engine, not_under_vllm
from raytune_ft.serving.config import Engine, ServingConfig


def with_packages(monkeypatch: pytest.MonkeyPatch, *installed: str) -> None:
    monkeypatch.setattr(choice, "_installed", lambda package: package in installed)


def quantized(tiny_model: Path, folder: Path, method: str) -> str:
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
    return str(folder)


def test_auto_takes_vllm_where_it_can_serve_and_says_why(
    tiny_model: Path, adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = ServingConfig(model_path=str(tiny_model))
    with_packages(monkeypatch)
    assert choose_engine(config, gpus=True) == (Engine.TRANSFORMERS, "vllm is not installed")
    with_packages(monkeypatch, "vllm")
    assert choose_engine(config, gpus=False) == (Engine.TRANSFORMERS, "there is no GPU")
    assert choose_engine(config, gpus=True)[0] is Engine.VLLM
    packed = config.with_overrides(model_path=quantized(tiny_model, tmp_path / "packed", "compressed-tensors"))
    assert choose_engine(packed, gpus=False) == (Engine.VLLM, "it serves this format")
    keyed = config.with_overrides(api_keys=["0" * 64], feedback_path="feedback")
    assert choose_engine(keyed, gpus=True) == (Engine.TRANSFORMERS, "vllm knows no api_keys, feedback_path")
    limited = config.with_overrides(max_new_tokens=16, request_timeout_s=5)
    assert choose_engine(limited, gpus=True) == (
        Engine.TRANSFORMERS, "vllm knows no max_new_tokens, request_timeout_s"
    )  # fmt: skip
    adapter = config.with_overrides(model_path=str(adapters / "a"))
    assert choose_engine(adapter, gpus=True)[0] is Engine.TRANSFORMERS


def test_what_does_not_hold_under_vllm_is_told(monkeypatch: pytest.MonkeyPatch, tiny_model: Path):
    for name in ("max_new_tokens", "request_timeout_s", "golden_tolerance", "playground"):
        assert name in not_under_vllm()
    with_packages(monkeypatch, "vllm")
    config = ServingConfig(model_path=str(tiny_model), playground=False)
    assert choose_engine(config, gpus=True)[0] is Engine.VLLM, "without a page is how vLLM serves"


def test_vllm_is_refused_for_what_it_cannot_serve(
    tiny_model: Path, adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with_packages(monkeypatch, "vllm")
    config = ServingConfig(model_path=str(tiny_model), engine=Engine.VLLM)
    check_config(config)
    for changes, message in [
        ({"model_path": str(adapters / "a")}, r"serves no adapter as a model; merge it first"),
        ({"model_path": quantized(tiny_model, tmp_path / "nf4", "bitsandbytes")}, r"does not load bitsandbytes"),
        ({"golden_tolerance": 0.1, "max_request_mb": 1}, r"knows no max_request_mb, golden_tolerance; set engine"),
        ({"max_queued_requests": 0, "prefill_tokens": 64}, r"knows no max_queued_requests, prefill_tokens; set"),
        ({"adapters": {"a": str(adapters / "a")}}, r"knows no adapters; set engine: transformers"),
    ]:
        with pytest.raises(ServingError, match=message):
            check_config(config.with_overrides(**changes))
    with_packages(monkeypatch)
    with pytest.raises(MissingDependencyError, match=r"pip install 'raytune-ft\[vllm\]'.*engine: transformers"):
        check_config(config)


def test_a_format_that_transformers_cannot_load_here_is_refused_with_the_engine_that_can(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = quantized(tiny_model, tmp_path / "packed", "compressed-tensors")
    with_packages(monkeypatch)
    with pytest.raises(
        ServingError, match=r"compressed-tensors, which engine: vllm serves; .*pip install compressed-t"
    ):
        check_config(ServingConfig(model_path=folder))
    with_packages(monkeypatch, "compressed_tensors")
    check_config(ServingConfig(model_path=folder))


def test_weights_that_changed_on_the_disk_are_not_served(tiny_model: Path, tmp_path: Path):
    draft = begin(tmp_path / "model", ArtifactKind.MODEL, settings={})
    with draft:
        shutil.copytree(tiny_model, draft.folder, dirs_exist_ok=True)
    config = ServingConfig(model_path=str(draft.folder))
    check_config(config)
    weights = draft.folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ArtifactError, match=r"model.safetensors was changed"):
        check_config(config)


def test_an_adapter_that_is_none_is_refused(tiny_model: Path):
    with pytest.raises(ModelError, match=r"adapters\.a: .* is a whole model, not an adapter"):
        check_config(ServingConfig(model_path=str(tiny_model), adapters={"a": str(tiny_model)}))
    with pytest.raises(ModelError, match=r"adapters\.a: org/nope: there is no such adapter folder"):
        check_config(ServingConfig(model_path=str(tiny_model), adapters={"a": "org/nope"}))


def test_a_tolerance_without_golden_answers_is_said_to_change_nothing(
    tiny_model: Path, adapters: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    own, golden = ServingConfig(model_path=str(tiny_model)), Path(shutil.copytree(adapters / "a", tmp_path / "a"))
    (golden / GOLDEN).write_text("{}")
    bare = own.with_overrides(adapters={"b": str(adapters / "b")})
    for config in (own, bare):
        check_config(config)
        assert not caplog.messages
        check_config(config.with_overrides(golden_tolerance=0.1))
        assert caplog.messages == [
            "golden_tolerance is set and changes nothing: neither the model nor an adapter brings golden answers "
            "(golden.json)"
        ]
        caplog.clear()
    for later in ({"adapters": {"a": str(golden)}}, {"adapters_path": str(tmp_path), "admin_keys": ["0" * 64]}):
        check_config(own.with_overrides(golden_tolerance=0.1, **later))
    assert not caplog.messages

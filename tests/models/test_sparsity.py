"""Zeros that stay zero, and a form on disk without them."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from raytune_ft.compression.config import PruningConfig
from raytune_ft.compression.prune import write_pruned
from raytune_ft.core.errors import ModelError
from raytune_ft.models.adapters import add_lora, merge_adapter, save_adapter
from raytune_ft.models.loading import load_model, load_tokenizer
from raytune_ft.models.references import is_compact
from raytune_ft.models.sparsity import expand, zero_again, zeros_of


@pytest.fixture
def sparse(tiny_model: Path, tmp_path: Path) -> Path:
    write_pruned(str(tiny_model), tmp_path / "sparse", PruningConfig(target_sparsity=0.6))
    return tmp_path / "sparse"


@pytest.fixture
def compact(tiny_model: Path, tmp_path: Path) -> Path:
    made = write_pruned(str(tiny_model), tmp_path / "compact", PruningConfig(target_sparsity=0.6, storage="compact"))
    assert made.bytes_after == (tmp_path / "compact/weights.compact.safetensors").stat().st_size
    return tmp_path / "compact"


def test_the_compact_form_is_smaller_and_the_same_model(sparse: Path, compact: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert is_compact(compact)
    assert not is_compact(sparse)
    assert not list(compact.glob("model*.safetensors"))
    dense = (sparse / "model.safetensors").stat().st_size
    assert (compact / "weights.compact.safetensors").stat().st_size < 0.75 * dense
    one, other = load_model(str(sparse), device="cpu"), load_model(str(compact), device="cpu")
    for (name, a), (_, b) in zip(one.model.named_parameters(), other.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert load_tokenizer(str(compact)).chat_template == load_tokenizer(str(sparse)).chat_template


def test_plain_transformers_loads_what_a_compact_folder_expands_to(compact: Path, tmp_path: Path):
    from transformers import AutoModelForCausalLM

    expand(compact, tmp_path / "dense")
    assert zeros_of(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"))


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"{}" + data])
def test_a_damaged_compact_file_is_named(compact: Path, tmp_path: Path, damage):
    file = compact / "weights.compact.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ModelError, match=r"weights\.compact\.safetensors: is damaged"):
        expand(compact, tmp_path / "dense")


def test_zeros_become_zero_again(sparse: Path):
    model = load_model(str(sparse), device="cpu").model
    zeros = zeros_of(model)
    assert len(zeros) == 14
    name = next(iter(zeros))
    with torch.no_grad():
        dict(model.named_parameters())[name].add_(1.0)
    assert zero_again(model, zeros) == int(zeros[name].sum())
    assert zero_again(model, zeros) == 0


def test_merging_an_adapter_into_a_pruned_base_keeps_its_zeros(
    sparse: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    base = load_model(str(sparse), device="cpu")
    zeros = zeros_of(base.model)
    adapted = add_lora(base.model, rank=2, alpha=4, dropout=0.0, target_modules="all-linear", seed=0, base=str(sparse))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(len(name)))
    save_adapter(adapted, base.tokenizer, tmp_path / "adapter")
    with caplog.at_level(logging.INFO, "raytune_ft"):
        merge_adapter(str(tmp_path / "adapter"), tmp_path / "merged")
    assert "the base is pruned" in caplog.text
    merged = load_model(str(tmp_path / "merged"), device="cpu").model
    found = zeros_of(merged)
    assert all(bool(found[name][where].all()) for name, where in zeros.items())
    changed = dict(merged.named_parameters())
    original = dict(load_model(str(sparse), device="cpu").model.named_parameters())
    assert any(not torch.equal(changed[name], original[name]) for name in zeros)
    assert (tmp_path / "merged/pruning.json").exists()

